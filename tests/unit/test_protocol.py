import pytest

from moe_core.errors import ProtocolError
from moe_core.protocol import (
    OLDEST_PROTOCOL,
    PROTOCOL_VERSION,
    PROTOCOL_VERSIONS,
    UNSAID,
    common_version,
)


def test_a_release_speaks_its_own_version_and_that_of_the_release_before() -> None:
    assert PROTOCOL_VERSIONS in ((PROTOCOL_VERSION,), (OLDEST_PROTOCOL, PROTOCOL_VERSION))
    assert PROTOCOL_VERSION - OLDEST_PROTOCOL in (0, 1)


def test_the_highest_version_that_both_speak_is_used() -> None:
    newer = [PROTOCOL_VERSION, PROTOCOL_VERSION + 1]
    assert common_version("expert 1", newer, "the gateway") == PROTOCOL_VERSION
    older = [OLDEST_PROTOCOL]
    assert common_version("expert 1", older, "the gateway") == OLDEST_PROTOCOL


@pytest.mark.parametrize("offered", [[], [OLDEST_PROTOCOL - 1], [PROTOCOL_VERSION + 1]])
def test_none_in_common_is_refused_with_both_sides_versions(offered: list[int]) -> None:
    with pytest.raises(ProtocolError) as refused:
        common_version("expert 1", offered, "the gateway")
    words = str(refused.value)
    assert f"expert 1 speaks {offered}" in words
    assert f"the gateway speaks {list(PROTOCOL_VERSIONS)}" in words


def test_who_says_nothing_speaks_the_first_version() -> None:
    assert UNSAID == (1,)
