"""Where a setting's value comes from: command line, environment, file, default; and the dump."""

import os
from pathlib import Path
from typing import Annotated

import pytest
import typer
import yaml
from typer.core import TyperCommand

from epserve import cli
from epserve.environment import PREFIX
from epserve.options import common, security
from epserve.parent_death import PARENT_PID_VARIABLE
from epserve.settings_command import SettingsCommand
from support.command_options import (
    arguments,
    commands,
    config_text,
    configurable,
    environment,
    shown_settings,
    two_values,
)

TINY = Path(__file__).parents[2] / "epserve" / "tiny_model"
CONFIGURABLE = sorted(configurable())
ORDER = ("command line", "environment", "file", "default")
PAIRS = [(high, low) for at, high in enumerate(ORDER) for low in ORDER[at + 1 :]]


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)


def dump(given: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.run([*given, "--dump-config"]) == 0
    return capsys.readouterr().out


def refusal(given: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.run(given) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("epserve: ")
    assert captured.err.count("\n") == 1
    return captured.err


def sources(text: str) -> dict[str, str]:
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return {line.partition(":")[0]: line.rpartition("# ")[2] for line in lines}


def texts(text: str) -> dict[str, object]:
    """Values as a command line would name them."""
    values: dict[str, object] = {}
    for key, value in yaml.safe_load(text).items():
        word = value[0] if isinstance(value, list) else value
        values[key] = {True: "true", False: "false"}.get(word, str(word))
    return values


def expected(command: TyperCommand, which: int) -> dict[str, str]:
    return {
        option.name.replace("_", "-"): two_values(option)[which]
        for option in shown_settings(command)
    }


def test_the_commands_that_run_or_ask_a_cluster_take_a_config_file():
    assert {"serve", "gateway", "attn", "expert", "generate", "status"} <= set(CONFIGURABLE)


def test_every_command_reads_its_options_alike():
    assert all(isinstance(command, SettingsCommand) for command in commands().values())


@pytest.mark.parametrize(("high", "low"), PAIRS)
@pytest.mark.parametrize("name", CONFIGURABLE)
def test_of_two_sources_of_every_option_the_higher_counts(
    name: str,
    high: str,
    low: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    command = configurable()[name]
    given = name.split()
    for which, source in enumerate((high, low)):
        if source == "command line":
            given += arguments(command, which)
        elif source == "environment":
            for variable, value in environment(command, which).items():
                monkeypatch.setenv(variable, value)
        elif source == "file":
            (tmp_path / "c.yaml").write_text(config_text(command, which))
            given += ["--config", str(tmp_path / "c.yaml")]
    text = dump(given, capsys)
    assert texts(text) == expected(command, 0)
    for key, source in sources(text).items():
        variable = f"EPSERVE_{key.replace('-', '_').upper()}"
        said = {"command line": high, "environment": variable}
        assert source.startswith(said.get(high, f"{tmp_path / 'c.yaml'}, line "))


def test_what_nobody_set_is_the_default(capsys: pytest.CaptureFixture[str]):
    text = dump(["attn", "--model", "m"], capsys)
    values = yaml.safe_load(text)
    assert (values["rank"], values["max-num-seqs"], values["dtype"]) == (None, 64, "auto")
    assert sources(text).pop("model") == "command line"
    derived = "default: half of --expert-wait"
    assert sources(text).pop("hedge-after") == derived
    assert sources(text).pop("kv-cache-tokens").startswith("default, where no size is given: what")
    others = {each for each in sources(text).values() if not each.startswith("default")}
    assert others == {"command line", "not set"}
    for key, value in values.items():
        assert (sources(text)[key] in ("command line", "default")) == (value is not None), key


def test_every_default_that_is_derived_says_from_what(capsys: pytest.CaptureFixture[str]):
    said = sources(dump(["serve", "--model", "m"], capsys))
    assert said["expert-parallel-degree"] == "default: 0 if ep size is 1, else 1"
    assert said["enable-mla"] == "default: as the model"


@pytest.mark.parametrize("name", CONFIGURABLE)
def test_a_dump_is_read_back_as_it_was(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    required = ["--model", "m"] if name in ("serve", "gateway", "attn", "expert") else []
    required += ["--role", "attn", "--rank", "1"] if name == "drain" else []
    words = name.split()
    for given in ([*words, *required], [*words, *arguments(configurable()[name], 1)]):
        text = dump(given, capsys)
        (tmp_path / "dump.yaml").write_text(text)
        again = dump([*words, "--config", str(tmp_path / "dump.yaml")], capsys)
        assert yaml.safe_load(again) == yaml.safe_load(text)


def test_texts_that_mean_something_in_yaml_survive_a_dump(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prompts = ["a: b # c\n'd'", "null", "0123", "12:34", "~", "true", "- x", "", "é" * 300]
    for prompt in prompts:
        stops = [f"--stop={text}" for text in prompts]
        text = dump(["generate", f"--prompt={prompt}", "--temperature=inf", *stops], capsys)
        (tmp_path / "dump.yaml").write_text(text)
        again = dump(["generate", "--config", str(tmp_path / "dump.yaml")], capsys)
        assert yaml.safe_load(again) == yaml.safe_load(text)
        assert yaml.safe_load(again)["prompt"] == prompt
        assert yaml.safe_load(again)["stop"] == prompts


def test_the_file_itself_may_be_named_by_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "c.yaml").write_text("model: m\nep_size: 4\n")
    monkeypatch.setenv("EPSERVE_CONFIG", str(tmp_path / "c.yaml"))
    assert yaml.safe_load(dump(["gateway"], capsys))["ep-size"] == 4


def test_a_switch_of_the_environment_is_undone_by_an_argument(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("EPSERVE_COLOCATED", "true")
    given = ["serve", "--model", "m", "--no-colocated"]
    assert yaml.safe_load(dump(given, capsys))["colocated"] is False


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("ep-sice: 2", "line 2: ep-sice=2: is no setting of serve; nearest valid: ep-size"),
        ("config: x", "config=x: is no setting of serve"),
        ("dp-size: two", "'--dp-size'"),
        ("dp-size: two", "c.yaml, line 2: dp-size=two)"),
        ("dp_size: 3", "dp_size=3: must be a power of two; nearest valid: 1 ("),
        ("dp_size: 3", "c.yaml, line 2: dp-size=3)"),
        ("grpc-port: 99999", "at most 65535; nearest valid: 65535 ("),
        ("colocated: 1", "colocated=1: must be true or false"),
        ("dtype: int4", "'int4' is not one of"),
        ("kv-cache-memory: lots", "kv_cache_memory='lots'"),
        ("ep-size: [2]", "ep-size=[...]: must be one value"),
    ],
)
def test_a_refused_setting_of_a_file_is_named_with_its_place(
    content: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "c.yaml").write_text(f"model: {TINY}\n{content}\n")
    error = refusal(["serve", "--config", str(tmp_path / "c.yaml")], capsys)
    assert words in error
    assert "c.yaml" in error
    assert "line 2" in error


def test_a_secret_is_neither_dumped_nor_quoted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def ask(
        secret: Annotated[int, typer.Option(hide_input=True)] = 0,
        inner: Annotated[int, typer.Option(hidden=True)] = 0,
        dump_config: common.DumpConfigOption = False,
    ) -> None:
        pass

    app = typer.Typer(rich_markup_mode=None)
    app.command(cls=SettingsCommand)(ask)
    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setenv("EPSERVE_SECRET", "1234")
    assert cli.run(["--dump-config"]) == 0
    assert capsys.readouterr().out == (
        "# epserve epserve\n# secret is not shown  # EPSERVE_SECRET\n"
    )
    monkeypatch.setenv("EPSERVE_SECRET", "hidden words")
    assert cli.run([]) == 2
    assert capsys.readouterr().err.endswith(" (EPSERVE_SECRET=(not shown))\n")


def test_a_refused_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("EPSERVE_DP_SIZE", "3")
    error = refusal(["serve", "--model", str(TINY)], capsys)
    assert error.endswith(
        "dp_size=3: must be a power of two; nearest valid: 1 (EPSERVE_DP_SIZE=3)\n"
    )
    monkeypatch.setenv("EPSERVE_DP_SIZE", "two")
    assert "(EPSERVE_DP_SIZE=two)" in refusal(["serve", "--model", str(TINY)], capsys)


def test_a_refused_argument_is_not_laid_on_a_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("EPSERVE_DP_SIZE", "1")
    error = refusal(["serve", "--model", str(TINY), "--dp-size", "3"], capsys)
    assert "EPSERVE_DP_SIZE" not in error


@pytest.mark.parametrize(
    "given", [["status"], ["serve", "--model", str(TINY)], ["keys", "new", "x"]]
)
def test_a_variable_that_no_command_reads_is_refused_with_the_nearest(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("EPSERVE_API_KEY_", "a secret")
    error = refusal(given, capsys)
    assert "environment='EPSERVE_API_KEY_': no command has such a setting" in error
    assert "nearest valid: EPSERVE_API_KEY, EPSERVE_API_KEYS" in error
    assert "a secret" not in error


@pytest.mark.parametrize("given", [["--help"], ["status", "--help"], ["attn", "-h"]])
def test_help_is_shown_whatever_the_variables(given: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EPSERVE_DP_SICE", "2")
    assert cli.run(given) == 0


def test_a_variable_of_another_command_is_no_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name in ("EPSERVE_RANK", "EPSERVE_PROMPT", PARENT_PID_VARIABLE, security.LAUNCHER_KEY_HASH):
        monkeypatch.setenv(name, "1")
    assert yaml.safe_load(dump(["status"], capsys))["json"] is False


def test_variables_that_kubernetes_makes_up_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """For Services called epserve, epserve-gateway and epserve-grpc, in any container beside."""
    for name, value in {
        "EPSERVE_SERVICE_HOST": "10.0.0.1",
        "EPSERVE_SERVICE_PORT": "8000",
        "EPSERVE_SERVICE_PORT_HTTP": "8000",
        "EPSERVE_PORT": "tcp://10.0.0.1:8000",
        "EPSERVE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "EPSERVE_PORT_8000_TCP_PROTO": "tcp",
        "EPSERVE_PORT_8000_TCP_ADDR": "10.0.0.1",
        "EPSERVE_GATEWAY_SERVICE_HOST": "10.0.0.2",
        "EPSERVE_GATEWAY_PORT": "udp://10.0.0.2:1",
        "EPSERVE_GATEWAY_PORT_1_UDP_PORT": "1",
        "EPSERVE_GRPC_PORT": "tcp://10.0.0.3:9",
    }.items():
        monkeypatch.setenv(name, value)
    assert cli.run(["gateway", "--model", "m", "--dump-config"]) == 0
    captured = capsys.readouterr()
    values = yaml.safe_load(captured.out)
    assert (values["port"], values["grpc-port"]) == (8000, 50051)
    told = captured.err.splitlines()
    assert [line.partition("=")[0] for line in told] == [
        "epserve: EPSERVE_GRPC_PORT",
        "epserve: EPSERVE_PORT",
    ]
    assert all("Kubernetes sets it" in line for line in told)


def test_a_port_that_is_no_link_is_still_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("EPSERVE_PORT", "http://10.0.0.1:80")
    assert "EPSERVE_PORT=http://10.0.0.1:80" in refusal(["gateway", "--model", "m"], capsys)
