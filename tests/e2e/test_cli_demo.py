"""`epserve demo`: runs by itself and explains what it measured."""

import re

import pytest

from epserve.demo import PROMPT
from support.processes import epserve


@pytest.mark.timeout(240)
def test_demo_shows_a_completion_and_what_it_cost():
    done = epserve("demo", timeout_s=220)
    assert done.returncode == 0, done
    assert done.stderr == ""
    for words in ("Level 1", "Level 2", "tokens/s", PROMPT, "KV cache per token"):
        assert words in done.stdout
    assert "640 bytes with MLA, 2,560 without" in done.stdout
    text, _, _ = done.stdout.partition(PROMPT)[2].partition("Level 2")
    words = re.findall("[a-z]+", text)
    assert len(words) > 20
    assert {"the", "is"} <= set(words)
    assert "\ufffd" not in text
    counted = _row(done.stdout, "bytes dispatched per layer, counted")
    predicted = _row(done.stdout, "… by the formula")
    assert counted[0] == predicted[0]
    assert counted[1] <= predicted[1]
    assert counted == _row(done.stdout, "bytes combined per layer, counted")


def _row(text: str, label: str) -> list[int]:
    """The figures of one row, one per level."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(label)]
    return [int(figure.replace(",", "")) for figure in re.findall(r"[\d,]{3,}", line)]
