"""The members' table on a narrow terminal."""

import io

from rich.console import Console

from epserve.status import members_table
from moe_core.cluster import ClusterState, Member, MemberState, Role
from moe_core.config.parallel import ParallelConfig
from moe_core.placement import ExpertPlacement

DETAIL = "expert 0: NIXL says [/] NIXL_ERR_REMOTE_DISCONNECT"


def shown(address: str) -> list[str]:
    member = Member(
        Role.ATTN, 0, 12345, address, "cpu", MemberState.CONNECTING, 1, "here", 0, 0, detail=DETAIL
    )
    state = ClusterState(1, ParallelConfig(), (member,), ExpertPlacement(0, 1, 1, ()))
    out = io.StringIO()
    Console(file=out, width=80).print(members_table(state))
    return out.getvalue().splitlines()


def test_addresses_stay_whole_beside_a_long_detail():
    assert any("192.168.100.100:50051" in line for line in shown("192.168.100.100:50051"))


def test_a_detail_is_folded_but_complete_and_never_read_as_markup():
    lines = [line.split("│") for line in shown("127.0.0.1:5") if "│" in line]
    state = "".join("".join(cells[-2].split()) for cells in lines)
    assert state == "connecting" + "".join(DETAIL.split())
