"""What serve checks before it starts anything, and the commands that it would start."""

from pathlib import Path

import pytest

from epserve import child_environment, cuda_devices, launch_plan
from epserve.cluster_settings import ClusterSettings
from epserve.launch_plan import make_plan
from epserve.layout import Place
from gateway.api_keys import hash_of
from moe_core.cluster import Role
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import ConfigError
from moe_core.service.peer_roles import PeerRole
from moe_core.service.tls_files import TlsFiles
from support.certificates import CertificateAuthority

TINY = Path(__file__).parents[2] / "epserve" / "tiny_model"


def settings(**changes: object) -> ClusterSettings:
    return ClusterSettings(**{"model": TINY, "device": "cpu", **changes})


def command_of(plan: launch_plan.LaunchPlan, name: str) -> str:
    return " ".join(next(child for child in plan.children() if child.name == name).command)


def test_each_process_gets_its_command():
    parallel = ParallelConfig(attn_devices=2, dp_size=2, expert_devices=2, ep_size=2)
    plan = make_plan(settings(parallel=parallel, kv_cache_tokens=512, dtype="float32"))
    assert [child.name for child in plan.children()] == [
        "gateway",
        "attn 0",
        "attn 1",
        "expert 0",
        "expert 1",
    ]
    gateway = command_of(plan, "gateway")
    assert f"--grpc-port {plan.settings.grpc_port}" in gateway
    assert f"--port {plan.settings.http_port} " in gateway
    assert plan.http_url == f"http://127.0.0.1:{plan.settings.http_port}"
    assert "--enable-mla" in gateway
    assert "--expert-parallel-degree 1" in gateway
    attn = command_of(plan, "attn 1")
    assert f"--gateway {plan.target} --rank 1 --device cpu --dtype float32" in attn
    assert "--kv-cache-tokens 512" in attn
    assert "--block-size" not in attn
    assert "--kv-cache-tokens" not in command_of(plan, "expert 1")


def test_the_size_of_the_kv_cache_travels_to_attention_processes():
    attn = command_of(make_plan(settings(kv_cache_memory=2 * 1024**3)), "attn 0")
    assert "--kv-cache-memory 2147483648" in attn
    plan = make_plan(settings(memory_utilization=0.4))
    assert "--memory-utilization 0.4" in command_of(plan, "attn 0")
    assert "--memory-utilization" not in command_of(plan, "expert 0")


def test_the_number_of_micro_batches_travels_to_attention_processes():
    plan = make_plan(settings(microbatches="3"))
    assert "--microbatches 3" in command_of(plan, "attn 0")
    assert "--microbatches" not in command_of(plan, "expert 0")


def test_spare_expert_slots_travel_to_expert_processes():
    plan = make_plan(settings(spare_expert_slots=4))
    assert "--spare-expert-slots 4" in command_of(plan, "expert 0")
    assert "--spare-expert-slots" not in command_of(plan, "attn 0")


def test_two_sizes_of_the_kv_cache_are_refused():
    with pytest.raises(ConfigError, match=r"kv_cache_tokens=64: .*memory_utilization=0\.4"):
        settings(kv_cache_tokens=64, memory_utilization=0.4)


def test_the_time_to_drain_travels_to_all_processes():
    plan = make_plan(settings(drain_timeout_s=2.5))
    for child in plan.children():
        assert "--drain-timeout 2.5" in " ".join(child.command)


def test_a_child_can_be_made_again_and_of_ranks_that_were_not_planned(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(child_environment.os, "sched_getaffinity", lambda _pid: set(range(4)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    plan = make_plan(settings(parallel=ParallelConfig(expert_devices=2, ep_size=2)))
    planned = {child.name: child for child in plan.children()}
    for role, rank in ((Role.GATEWAY, 0), (Role.ATTN, 0), (Role.EXPERT, 1)):
        child = plan.child(role, rank)
        assert child == planned[child.name]
    grown = plan.child(Role.EXPERT, 3)
    assert grown.name == "expert 3"
    assert "--rank 3 --device cpu" in " ".join(grown.command)
    assert "--load-niceness 10" in " ".join(grown.command)
    assert not any("--load-niceness" in child.command for child in planned.values())
    assert planned["expert 1"].environment["OMP_NUM_THREADS"] == "2"
    assert grown.environment["OMP_NUM_THREADS"] == "1"  # a share of four
    assert "OMP_PROC_BIND" not in grown.environment
    assert grown.stop_stage == planned["expert 1"].stop_stage


def test_processes_are_stopped_from_the_outside_in():
    plan = make_plan(settings(parallel=ParallelConfig(expert_devices=2, ep_size=2)))
    stages = [plan.child(role, 0).stop_stage for role in (Role.GATEWAY, Role.ATTN, Role.EXPERT)]
    assert stages == sorted(set(stages))


def test_a_rank_that_was_not_planned_takes_the_next_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_devices, "_has_cuda_driver", lambda: True)
    monkeypatch.setattr(cuda_devices, "_devices_torch_sees", lambda: 3)
    plan = make_plan(settings(device="auto"))
    devices = [plan.child(Role.EXPERT, rank).command for rank in range(3)]
    assert [words[words.index("--device") + 1] for words in devices] == [
        "cuda:1",
        "cuda:2",
        "cuda:0",
    ]


def test_port_zero_becomes_a_free_port():
    assert make_plan(settings(grpc_port=0)).settings.grpc_port > 0


def test_a_layout_that_the_model_does_not_allow_is_refused():
    with pytest.raises(ConfigError, match="tp_size"):
        make_plan(settings(parallel=ParallelConfig(attn_devices=8)))


def test_cuda_without_a_device_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_devices, "_devices_torch_sees", lambda: 0)
    with pytest.raises(ConfigError, match="device='cuda'"):
        make_plan(settings(device="cuda"))


def test_auto_takes_the_devices_that_torch_sees(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_devices, "_has_cuda_driver", lambda: True)
    monkeypatch.setattr(cuda_devices, "_devices_torch_sees", lambda: 2)
    places = make_plan(settings(device="auto")).places
    assert [place.device for place in places] == ["", "cuda:0", "cuda:1"]


def test_a_tiers_processes_share_out_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(child_environment.os, "sched_getaffinity", lambda _pid: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    plan = make_plan(settings(parallel=ParallelConfig(expert_devices=4, ep_size=4)))
    threads = {child.name: child.environment.get("OMP_NUM_THREADS") for child in plan.children()}
    assert threads["attn 0"] == "8"
    assert threads["expert 3"] == "2"
    assert threads["gateway"] is None
    places = {child.name: child.environment.get("OMP_PLACES") for child in plan.children()}
    assert places["attn 0"] == "{0},{1},{2},{3},{4},{5},{6},{7}"
    assert places["expert 3"] == "{6},{7}"


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("UCX_MM_ERROR_HANDLING", raising=False)  # which links in this process set
    (_, attn, _) = make_plan(settings()).children()
    assert not {"OMP_NUM_THREADS", "OMP_PLACES"} & attn.environment.keys()
    assert attn.environment["UCX_MM_ERROR_HANDLING"] == "y"


def test_libraries_say_errors_only_unless_the_user_wants_more(monkeypatch: pytest.MonkeyPatch):
    for child in make_plan(settings()).children():
        said = {child.environment[name] for name in ("NIXL_LOG_LEVEL", "GRPC_VERBOSITY")}
        assert (said, child.environment["UCX_LOG_LEVEL"]) == ({"ERROR"}, "error")
    monkeypatch.setenv("GRPC_VERBOSITY", "DEBUG")
    assert "GRPC_VERBOSITY" not in make_plan(settings()).children()[0].environment


@pytest.mark.parametrize(
    ("host", "target"),
    [("0.0.0.0", "127.0.0.1:7"), ("::", "[::1]:7"), ("10.1.2.3", "10.1.2.3:7")],
)
def test_the_target_is_where_this_machine_reaches_the_gateway(host: str, target: str):
    plan = make_plan(settings())
    places = (Place(Role.GATEWAY, 0, "", 7),)
    moved = launch_plan.LaunchPlan(
        settings(host=host, grpc_port=7, insecure=True), plan.model, plan.parallel, places
    )
    assert moved.target == target


def test_tls_files_and_keys_reach_the_processes_and_no_key_does(tmp_path: Path):
    every = PeerRole.GATEWAY, PeerRole.ATTN, PeerRole.EXPERT
    tls = CertificateAuthority().files(tmp_path, *every)
    key_file = tmp_path / "keys.yaml"
    key_file.write_text("[]")
    plan = make_plan(settings(tls=tls, api_keys=key_file))
    gateway, *workers = plan.children()
    assert plan.client_target.tls == TlsFiles(tls.ca)
    cluster_port = str(plan.settings.cluster_port)
    for child in (gateway, *workers):
        words = " ".join(child.command)
        assert " ".join(tls.arguments()) in words
        assert cluster_port in words
    assert f"--api-keys {key_file}" in " ".join(gateway.command)
    key = plan.launcher_key
    assert key is not None
    assert gateway.environment["EPSERVE_LAUNCHER_KEY_HASH"] == hash_of(key)
    for child in (gateway, *workers):
        assert key not in repr(child)
    assert key not in repr(plan.client_target)


def test_a_certificate_that_lacks_a_tier_is_refused_before_anything_starts(tmp_path: Path):
    tls = CertificateAuthority().files(tmp_path, PeerRole.GATEWAY, PeerRole.ATTN)
    with pytest.raises(ConfigError, match="epserve://expert"):
        make_plan(settings(tls=tls))
