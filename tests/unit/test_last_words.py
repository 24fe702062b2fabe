"""What is quoted of a process that has ended."""

import pytest

from epserve.last_words import telling


@pytest.mark.parametrize(
    "line",
    [
        "timestamp='2026-11-30T18:05:56.9' level='info' event='experts loaded' rank=1",
        "timestamp='2026-11-30T18:05:56.9' level='debug' event='a step'",
        '{"event": "joined", "level": "info", "service": "attn"}',
        "I1130 18:12:47.175016   16929 chttp2_transport.cc:1403] Got goaway",
        "[1764520000.1] [host:123:0]  ucp_worker.c:1 UCX  INFO  self cfg#0",
    ],
)
def test_what_went_well_is_not_quoted(line: str) -> None:
    assert telling([line]) == []


@pytest.mark.parametrize(
    "line",
    [
        "timestamp='2026-11-30T18:05:56.9' level='warning' event='the drain was cut short'",
        "timestamp='2026-11-30T18:05:56.9' level='error' event='level='info''",
        '{"event": "ended", "level": "error", "error": "no such tensor"}',
        "{'no': 'json'}",
        "epserve attn: rank=5: must be below 2",
        "Fatal Python error: Segmentation fault",
        "[1764520000.1] [host:123:0]  ucp_worker.c:1 UCX  ERROR  connection reset",
        "E1130 18:12:47.175016   16929 nixl_agent.cpp:12] no such descriptor",
    ],
)
def test_warnings_errors_and_plain_words_are_quoted(line: str) -> None:
    assert telling([line]) == [line]
