"""Progress: a bar on a terminal, sparse log lines elsewhere."""

import io
import logging
import sys

import pytest

from moe_core.checkpoint.progress import shown_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with shown_progress("loading experts", "layer") as progress:
        progress(1, 4)
        progress(4, 4)
    assert "loading experts" in terminal.getvalue()
    assert "4/4" in terminal.getvalue()


def test_elsewhere_the_end_is_logged_and_not_every_step(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO),
        shown_progress("loading experts", "layer") as progress,
    ):
        for done in range(1, 101):
            progress(done, 100)
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("loading experts: 100 of 100 layers in ")
