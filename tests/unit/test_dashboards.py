"""The dashboards ask only for what a scrape holds, by the labels it has."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from gateway.metrics.exposition import PATH, Scrape, render
from support.scraped import make_state, observed_requests

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana").glob("*.json"))
METRIC = re.compile(r"\b(epserve_\w+)(?:\{([^}]*)\})?")
GROUPING = re.compile(r"\bby \(([^)]*)\)")
LEGEND = re.compile(r"\{\{(\w+)\}\}")


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """The labels of every series, by its name."""
    body, _ = render(Scrape(observed_requests().registry, make_state(), "tiny"))
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def panels(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["panels"]


def expressions(path: Path) -> Iterator[tuple[str, str]]:
    """Every PromQL expression and its legend."""
    for panel in panels(path):
        for target in panel["targets"]:
            yield target["expr"], target["legendFormat"]
    for variable in json.loads(path.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["definition"], ""


def test_there_is_one_dashboard_for_the_whole_and_one_for_each_tier() -> None:
    assert [path.stem for path in DASHBOARDS] == ["attention", "experts", "overview"]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_expressions_name_only_metrics_and_labels_that_are_exported(
    path: Path, exported: dict[str, set[str]]
) -> None:
    for expression, legend in expressions(path):
        names = METRIC.findall(expression)
        assert names, expression
        there: set[str] = set()
        for name, selector in names:
            assert name in exported, expression
            there |= exported[name]
            assert set(re.findall(r"(\w+)=", selector)) <= exported[name], expression
        for labels in GROUPING.findall(expression):
            assert {label.strip() for label in labels.split(",")} <= there, expression
        assert set(LEGEND.findall(legend)) <= there, legend


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_are_of_grafana_11s_form_and_let_one_choose_the_data_source(path: Path) -> None:
    dashboard = json.loads(path.read_text())
    assert dashboard["schemaVersion"] >= 39
    assert dashboard["uid"].startswith("epserve-")
    (chosen,) = [v for v in dashboard["templating"]["list"] if v["type"] == "datasource"]
    assert (chosen["name"], chosen["query"]) == ("datasource", "prometheus")
    ids = [panel["id"] for panel in panels(path)]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in panels(path):
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        for asked in (panel, *panel["targets"]):
            assert asked["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_example_scrape_asks_the_gateways_path() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert job["metrics_path"] == PATH
