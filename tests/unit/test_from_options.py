"""What each process command hands to its service, from all that can be set."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from attn_service.settings import AttnSettings
from epserve import cli, process_commands
from epserve.cluster_settings import ClusterSettings
from expert_service.process import ExpertSettings
from gateway.entrance import QueueLimits
from gateway.settings import GatewaySettings
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import ConfigError

Run = Callable[[str, str, str], object]
PARALLEL = """
attn-devices: 2
dp-size: 2
expert-devices: 2
ep-size: 2
expert-parallel-degree: 2
enable-mla: false
num-redundant-experts: 3
shared-experts: expert
colocated: true
"""
CUT = ParallelConfig(
    attn_devices=2,
    dp_size=2,
    expert_devices=2,
    ep_size=2,
    expert_parallel_degree=2,
    enable_mla=False,
    num_redundant_experts=3,
    shared_experts="expert",
    colocated=True,
)
WORKER = """
model: m
gateway: far:7
host: 0.0.0.0
insecure: true
port: 8
advertise-address: near:8
rank: 1
device: cuda:1
dtype: bfloat16
transport: grpc
threads: 2
drain-timeout: 2.5
otlp-traces-endpoint: http://127.0.0.1:4317
"""
SPARE = "spare-expert-slots: 3\n"
GATEWAY = """
host: 0.0.0.0
insecure: true
grpc-port: 7
port: 8
cluster-port: 9
max-queued-requests: 10
rebalance-interval: 60
attn-wait: 4.5
api-keys: keys.yaml
drain-timeout: 2.5
otlp-traces-endpoint: http://127.0.0.1:4317
"""
CACHE = """
kv-cache-memory: 1KiB
max-num-seqs: 5
block-size: 32
microbatches: 2
expert-wait: 7
hedge-after: 0.5
orphan-grace: 2.5
"""


@pytest.fixture
def settings_of_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """What the function at a dotted path is called with when a command runs with a file."""
    monkeypatch.setattr(process_commands, "_configure_logging", lambda *_: None)

    def run(command: str, function: str, content: str) -> object:
        given: list[object] = []
        monkeypatch.setattr(function, lambda settings: given.append(settings) or 0)
        (tmp_path / "c.yaml").write_text(content)
        assert cli.run([command, "--config", str(tmp_path / "c.yaml")]) == 0
        return given.pop()

    return run


def test_the_gateway_gets_its_settings(settings_of_run: Run):
    content = f"{PARALLEL}{GATEWAY}model: m\nmodel-name: other\n"
    assert settings_of_run("gateway", "gateway.process.main", content) == GatewaySettings(
        model=Path("m"),
        host="0.0.0.0",
        port=7,
        http_port=8,
        cluster_port=9,
        parallel=CUT,
        model_name="other",
        limits=QueueLimits(max_requests=10),
        attn_wait_s=4.5,
        rebalance_interval=60.0,
        insecure=True,
        api_keys=Path("keys.yaml"),
        drain_timeout_s=2.5,
        otlp_traces_endpoint="http://127.0.0.1:4317",
    )


def test_an_attention_process_gets_its_settings(settings_of_run: Run):
    assert settings_of_run("attn", "attn_service.process.main", WORKER + CACHE) == AttnSettings(
        gateway="far:7",
        model=Path("m"),
        host="0.0.0.0",
        insecure=True,
        drain_timeout_s=2.5,
        otlp_traces_endpoint="http://127.0.0.1:4317",
        port=8,
        advertise_address="near:8",
        rank=1,
        device="cuda:1",
        dtype="bfloat16",
        transport="grpc",
        kv_cache_memory=1024,
        block_size=32,
        max_num_seqs=5,
        microbatches="2",
        expert_wait_s=7.0,
        hedge_after_s=0.5,
        orphan_grace_s=2.5,
        threads=2,
    )


def test_an_expert_process_gets_its_settings(settings_of_run: Run):
    assert settings_of_run(
        "expert", "expert_service.process.main", f"{WORKER}{SPARE}"
    ) == ExpertSettings(
        gateway="far:7",
        model=Path("m"),
        host="0.0.0.0",
        insecure=True,
        drain_timeout_s=2.5,
        otlp_traces_endpoint="http://127.0.0.1:4317",
        port=8,
        advertise_address="near:8",
        rank=1,
        device="cuda:1",
        dtype="bfloat16",
        transport="grpc",
        threads=2,
        spare_expert_slots=3,
    )


def test_a_whole_cluster_gets_its_settings(settings_of_run: Run):
    content = f"{PARALLEL}{CACHE}{GATEWAY}{SPARE}model: m\ntransport: grpc\ndevice: cpu\n"
    content += "dtype: float32\nlog-json: true\ndebug: true\n"
    assert settings_of_run("serve", "epserve.serve.serve", content) == ClusterSettings(
        model=Path("m").absolute(),
        parallel=CUT,
        transport="grpc",
        device="cpu",
        dtype="float32",
        host="0.0.0.0",
        grpc_port=7,
        http_port=8,
        cluster_port=9,
        max_queued_requests=10,
        rebalance_interval=60.0,
        attn_wait=4.5,
        orphan_grace=2.5,
        insecure=True,
        api_keys=Path("keys.yaml").absolute(),
        drain_timeout_s=2.5,
        otlp_traces_endpoint="http://127.0.0.1:4317",
        log_json=True,
        kv_cache_memory=1024,
        block_size=32,
        max_num_seqs=5,
        microbatches="2",
        expert_wait_s=7.0,
        hedge_after_s=0.5,
        spare_expert_slots=3,
        debug=True,
    )


@pytest.mark.parametrize("size", ["kv-cache-tokens: 640", "memory-utilization: 0.5"])
def test_the_size_of_the_kv_cache_may_be_given_otherwise(size: str, settings_of_run: Run):
    settings = settings_of_run("attn", "attn_service.process.main", f"model: m\n{size}\n")
    name, value = size.replace("-", "_").split(": ")
    assert str(getattr(settings, name)) == value


def test_every_parallel_setting_was_tried():
    tried = [field for field in fields(ParallelConfig) if field.name != "live"]  # no setting
    assert all(getattr(CUT, field.name) != field.default for field in tried)


@pytest.mark.parametrize("value", ["-1", "inf", "nan"])
@pytest.mark.parametrize("option", ["--attn-wait", "--orphan-grace"])
def test_seconds_that_nobody_can_wait_are_refused(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.run(["serve", "--model", "m", option, value]) == 2
    name = option.removeprefix("--").replace("-", "_")
    assert f"{name}={float(value)}: must be a number of seconds" in capsys.readouterr().err


def test_a_gateway_waits_for_no_negative_time():
    with pytest.raises(ConfigError, match="attn_wait_s=-1"):
        GatewaySettings(Path("m"), "127.0.0.1", 0, ParallelConfig(), attn_wait_s=-1)
