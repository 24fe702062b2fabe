"""Addresses, statuses and the cluster's values on the wire, without any socket to a peer."""

from dataclasses import replace

import grpc
import grpc.aio
import pytest

from moe_core.cluster import (
    AttentionLoad,
    ClusterState,
    EngineMetrics,
    ExpertLoad,
    Join,
    LinkStats,
    Member,
    MemberState,
    Role,
    StatusReport,
    TierSizes,
)
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import (
    AccessError,
    AuthenticationError,
    CheckpointError,
    ConfigError,
    PeerTimeoutError,
    RequestError,
    UnavailableError,
)
from moe_core.pb.epserve.v1 import cluster_pb2
from moe_core.placement import ExpertPlacement, LayerPlacement
from moe_core.service import cluster_codec as codec
from moe_core.service.addresses import (
    advertised_address,
    host_id,
    join_address,
    new_instance_epoch,
    split_address,
)
from moe_core.service.grpc_channel import error_from_rpc, error_from_status, status_code

LINK = LinkStats("attn 0", "expert 1", "nixl", 1, 2, 3, 4, 5, 6, 0.5)
LOAD = AttentionLoad(1, 2, 3, 4, 5, 6, True)
METRICS = EngineMetrics(7, *(number / 8 for number in range(9)), 1, 2, 3, 4, 5, 6)


def test_cluster_state_survives_the_wire() -> None:
    parallel = ParallelConfig(
        attn_devices=2, expert_devices=2, ep_size=2, enable_mla=True, expert_parallel_degree=2
    )
    members = (
        Member(Role.GATEWAY, 0, 1, "h:1", "cpu", MemberState.READY, 2**63, "here",
               queued_requests=7, loop_tasks=8),
        Member(
            Role.ATTN, 1, 2, "h:2", "cpu", MemberState.LOADING, 4, "here", 0, 1,
            detail="d", store_address="s", attention_load=LOAD, links=(LINK,),
            engine_metrics=METRICS, used_epoch=2,
        ),
        Member(Role.EXPERT, 0, 3, "h:3", "cuda:0", MemberState.FAILED, 5, "there",
               ep_rank=0, etp_rank=0, experts=9, prepared_epoch=0, leaving=True, refused_epoch=4),
    )  # fmt: skip
    placement = ExpertPlacement(3, 4, 2, (LayerPlacement(1, (0, 1, 2, 3), (0, 0, 1, 1)),))
    load = ExpertLoad((1,), ((2**40, 0, 1, 2),))
    later = replace(placement, epoch=4)
    state = ClusterState(7, parallel, members, placement, load, later, TierSizes(2, 3))
    message = cluster_pb2.ClusterState.FromString(codec.cluster_to_pb(state).SerializeToString())
    assert codec.cluster_from_pb(message) == state


@pytest.mark.parametrize("rank", [None, 0, 3])
def test_join_tells_rank_zero_from_no_rank(rank: int | None) -> None:
    join = Join(Role.EXPERT, "h:1", "cpu", 1, "f", 2, "bfloat16", "here", rank)
    assert codec.join_from_pb(codec.join_to_pb(join)) == join
    placement = ExpertPlacement(1, 2, 1, (LayerPlacement(1, (0, 1), (0, 0)),))
    again = replace(join, placement=placement, parallel=ParallelConfig(enable_mla=False,
                    expert_parallel_degree=0))  # fmt: skip
    assert codec.join_from_pb(codec.join_to_pb(again)) == again


def test_report_survives_the_wire() -> None:
    report = StatusReport(MemberState.READY, "d", "s", LOAD, (LINK,), METRICS, 0, 3)
    assert codec.report_from_pb(codec.report_to_pb(report)) == report
    assert codec.report_from_pb(codec.report_to_pb(StatusReport(MemberState.READY))) == (
        StatusReport(MemberState.READY)
    )


def test_metrics_that_are_no_numbers_are_refused_by_name() -> None:
    report = codec.report_to_pb(StatusReport(MemberState.READY, engine_metrics=METRICS))
    report.engine_metrics.combine_s = float("nan")
    with pytest.raises(RequestError, match=r"engine_metrics\.combine_s=nan: must be finite"):
        codec.report_from_pb(report)


def test_role_and_state_of_another_version_are_refused_by_name() -> None:
    with pytest.raises(RequestError, match="role=0: must be one of gateway, attn, expert"):
        codec.join_from_pb(cluster_pb2.Join())
    with pytest.raises(RequestError, match="state=0: must be one of loading"):
        codec.report_from_pb(cluster_pb2.StatusReport())


def test_addresses_join_and_split() -> None:
    assert join_address("::1", 5) == "[::1]:5"
    assert split_address("gateway", "[::1]:5") == ("::1", 5)
    assert split_address("gateway", "host:50051") == ("host", 50051)


@pytest.mark.parametrize("address", ["", "host", "host:", ":5", "host:0", "host:x", "host:70000"])
def test_address_without_host_or_port_is_refused_by_name(address: str) -> None:
    with pytest.raises(ConfigError, match=r"gateway=.*HOST:PORT"):
        split_address("gateway", address)


@pytest.mark.parametrize(
    ("host", "advertise", "expected"),
    [
        ("127.0.0.1", None, "127.0.0.1:7"),
        ("0.0.0.0", None, "127.0.0.1:7"),
        ("0.0.0.0", "node3", "node3:7"),
        ("0.0.0.0", "node3:9", "node3:9"),
        ("::", "fe80::1", "[fe80::1]:7"),
        ("::", "[fe80::1]:9", "[fe80::1]:9"),
    ],
)
def test_advertised_address_is_one_that_peers_can_use(
    host: str, advertise: str | None, expected: str
) -> None:
    assert advertised_address(host, 7, advertise, "127.0.0.1:50051") == expected


@pytest.mark.parametrize(
    "advertise",
    [
        "node 3",
        "node3:0",
        "node3:99999",
        "a:b:c",
        "fe80::zz",
        "0.0.0.0",
        "[::]:9",
        "http://x",
    ],
)
def test_an_address_that_peers_cannot_use_is_not_advertised(advertise: str) -> None:
    with pytest.raises(ConfigError, match="advertise_address="):
        advertised_address("0.0.0.0", 7, advertise, "127.0.0.1:50051")


def test_host_id_is_stable_and_epochs_grow() -> None:
    assert host_id() == host_id()
    assert new_instance_epoch() < new_instance_epoch()


def test_statuses_and_errors_translate_both_ways() -> None:
    for error in (
        RequestError("x"),
        UnavailableError("x"),
        PeerTimeoutError("x"),
        AuthenticationError("x"),
        AccessError("x"),
    ):
        back = error_from_status(status_code(error).name, "x")
        assert (type(back), str(back)) == (type(error), "x")
    other = error_from_status(status_code(CheckpointError("x")).name, "x")
    assert other.code == "FAILED_PRECONDITION"
    assert error_from_status("UNKNOWN", "x").code == "UNKNOWN"


def test_a_broken_connection_is_said_to_be_one() -> None:
    none = grpc.aio.Metadata()
    words = "Stream removed (Socket closed)"
    gone = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, none, none, words)
    error = error_from_rpc(gone, "generate at h:1")
    assert str(error) == f"generate at h:1: the connection broke: {words}"


def test_a_call_that_the_other_end_let_go_of_may_be_made_elsewhere() -> None:
    none = grpc.aio.Metadata()
    dropped = grpc.aio.AioRpcError(grpc.StatusCode.CANCELLED, none, none, "CANCELLED")
    error = error_from_rpc(dropped, "generate at h:1")
    assert isinstance(error, UnavailableError)
    assert str(error).startswith("generate at h:1: the other end let go of the call")
