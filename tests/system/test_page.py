"""The page in a real browser, against a live cluster of the bundled model."""

import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from playwright.sync_api import Page, Route, expect, sync_playwright

from support.processes import Running, serving

CHROMIUM = shutil.which("chromium")
LAYOUT = (
    *("--attn-devices", "2", "--dp-size", "2", "--expert-devices", "2", "--ep-size", "2"),
    *("--expert-parallel-degree", "2", "--num-redundant-experts", "2"),
    *("--kv-cache-tokens", "4096"),
)
MEMBERS = ("attn 0", "attn 1", "expert 0", "expert 1")
WAIT_MS = 20_000

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (the system package)")


@dataclass
class Seen:
    """What the browser asked for, and what it complained about."""

    origins: set[str] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)


@dataclass
class Live:
    running: Running
    page: Page
    seen: Seen
    url: str


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(*LAYOUT) as (running, _), sync_playwright() as playwright:
        (line,) = [line for line in running.out if "ready: serving" in line]
        url = line.split(" and ")[1].split()[0]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        seen = Seen()
        page.on("request", lambda request: seen.origins.add(_origin(request.url)))
        page.on("console", lambda told: seen.complaints.append(f"{told.type}: {told.text}"))
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.goto(url)
        yield Live(running, page, seen, url)
        browser.close()


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _pixels(page: Page) -> str:
    return str(page.evaluate("document.getElementById('heat').toDataURL()"))


def test_the_topology_shows_every_member_as_ready(live: Live):
    page = live.page
    page.wait_for_selector("#connection[data-state=live]", timeout=WAIT_MS)
    assert page.locator("#topology .box .name").all_text_contents() == list(MEMBERS)
    assert page.locator("#topology .box.ready").count() == len(MEMBERS)
    assert page.locator("#topology .link").count() == 4
    assert page.locator("#heat-empty").is_visible()


def test_a_prompt_streams_an_answer_and_the_heat_map_gets_drawn(live: Live):
    page = live.page
    before = _pixels(page)
    page.fill("#prompt", "The for statement")
    page.fill("#max-tokens", "32")
    page.click("#send")
    flowing = page.locator("#topology .link-labels text", has_text="tok/s")
    expect(flowing.first).to_be_visible(timeout=WAIT_MS)
    expect(page.locator("#answer-note")).to_contain_text("32 tokens in", timeout=WAIT_MS)
    assert page.locator("#answer").inner_text().strip()
    page.wait_for_selector("#heat-scroll:not([hidden])", timeout=WAIT_MS)
    assert _pixels(page) != before
    page.focus("#heat")
    page.keyboard.press("ArrowRight")
    words = page.locator("#tooltip").inner_text()
    assert "layer 1, expert 1" in words
    assert "on expert" in words
    assert page.locator("#groups tr").count() == 2


@pytest.mark.parametrize("width", [360, 768, 1920])
def test_the_page_fits_its_window(live: Live, width: int):
    live.page.set_viewport_size({"width": width, "height": 900})
    live.page.wait_for_timeout(300)
    assert live.page.evaluate("document.documentElement.scrollWidth") <= width


def test_nothing_is_asked_of_another_origin_and_nothing_is_complained_about(live: Live):
    assert live.seen.origins == {_origin(live.url)}
    assert live.seen.complaints == []


def test_a_gateway_with_keys_is_asked_with_the_key_that_was_typed(live: Live):
    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer right":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "no such key"}})

    with live.page.context.browser.new_context() as context:
        page = context.new_page()
        page.route("**/cluster", guard)
        page.goto(live.url)
        page.wait_for_selector("#key-form:not([hidden])", timeout=WAIT_MS)
        assert page.locator("#connection").inner_text() == "key needed"
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#connection")).to_have_text("key refused", timeout=WAIT_MS)
        page.fill("#key", "right")
        page.keyboard.press("Enter")
        page.wait_for_selector("#connection[data-state=live]", timeout=WAIT_MS)
        assert page.locator("#key-form").is_hidden()


def test_a_lost_process_and_then_a_lost_gateway_are_shown(live: Live):
    """Last: the cluster does not survive it. The launcher is stopped first, so that it does not
    end what is left."""
    page = live.page
    launcher = psutil.Process(live.running.pid)
    children = {_role(child): child for child in launcher.children(recursive=True)}
    live.running.send(signal.SIGSTOP)
    try:
        children["expert"].kill()
        page.wait_for_selector("#topology .box.lost", timeout=WAIT_MS)
        assert page.locator("#missing").is_visible()
        children["gateway"].kill()
        page.wait_for_selector("#connection[data-state=gone]", timeout=WAIT_MS)
        assert "reconnecting" in page.locator("#connection").inner_text()
        assert page.locator("#send").is_disabled()
    finally:
        live.running.send(signal.SIGCONT)


def _role(process: psutil.Process) -> str:
    """The tier's name, which is the first argument of `epserve`; the last process of a tier."""
    roles = [word for word in process.cmdline() if word in ("gateway", "attn", "expert")]
    return roles[0] if roles else Path(process.exe()).name
