"""What serve starts: one command and environment per process of a cluster on this machine.

Knows the command line of every process command, this machine's cores and its devices. Starts
no cluster process itself.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from epserve.client import Target
from epserve.layout import Place, derive_layout, device_of, spread_devices
from epserve.options import DEFAULT_REGISTRY, LAUNCHER_KEY_HASH
from epserve.supervisor import ChildSpec
from gateway.api_keys import hash_of, new_key, read_keys
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.cluster import Role
from moe_core.config.expert_wait import DEFAULT_EXPERT_WAIT_S, check_expert_wait
from moe_core.config.kv_cache_size import check_kv_cache_size
from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import ConfigError
from moe_core.service.addresses import bound_socket, join_address
from moe_core.service.binding import require_own_ports, require_safe_bind
from moe_core.service.certificates import Certificates
from moe_core.service.lifecycle import DRAIN_TIMEOUT_S
from moe_core.service.peer_roles import PeerRole
from moe_core.service.tls_files import TlsFiles
from moe_core.service.trace_option import check_traces_endpoint

_DEVICE_QUESTION_TIMEOUT_S = 120.0
# Workers leave before the gateway, so that none of them sees its cluster vanish.
_STOP_STAGES = {Role.ATTN: 0, Role.EXPERT: 1, Role.GATEWAY: 2}


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """A cluster on this machine. None leaves a value to the process that it is for."""

    model: Path
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    transport: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    host: str = "127.0.0.1"
    grpc_port: int = 0  # 0: a free one is chosen when the plan is made
    http_port: int = 0  # likewise
    cluster_port: int = 0  # likewise; used with tls only
    tls: TlsFiles | None = None  # of all processes, so its certificate names all their roles
    insecure: bool = False
    api_keys: Path | None = None
    kv_cache_tokens: int | None = None
    kv_cache_memory: int | None = None  # bytes
    memory_utilization: float | None = None
    block_size: int | None = None
    max_num_seqs: int | None = None
    microbatches: str | None = None
    expert_wait_s: float = DEFAULT_EXPERT_WAIT_S
    hedge_after_s: float | None = None
    spare_expert_slots: int | None = None
    max_queued_requests: int | None = None
    rebalance_interval: float | None = None  # seconds
    attn_wait: float | None = None  # seconds
    orphan_grace: float | None = None  # seconds
    drain_timeout_s: float = DRAIN_TIMEOUT_S
    otlp_traces_endpoint: str | None = None
    log_json: bool = False
    debug: bool = False

    def __post_init__(self) -> None:
        check_traces_endpoint(self.otlp_traces_endpoint)
        check_kv_cache_size(self.kv_cache_tokens, self.kv_cache_memory, self.memory_utilization)
        check_expert_wait(self.expert_wait_s, self.hedge_after_s)
        require_safe_bind("host", self.host, self.tls, self.insecure)
        clusters = {} if self.tls is None else {"cluster_port": self.cluster_port}
        require_own_ports({"port": self.http_port, "grpc_port": self.grpc_port, **clusters})


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """Checked settings and everything that follows from them."""

    settings: ClusterSettings
    model: ModelConfig
    parallel: ParallelConfig
    places: tuple[Place, ...]
    num_cuda_devices: int = 0
    # With it serve watches a gateway that has API keys.
    launcher_key: str | None = field(default=None, repr=False)

    @property
    def target(self) -> str:
        """Where a client on this machine reaches the gateway by gRPC."""
        return self._local(self.settings.grpc_port)

    @property
    def client_target(self) -> Target:
        """The same for serve's own client."""
        tls = self.settings.tls and TlsFiles(self.settings.tls.ca)
        return Target(self.target, tls, self.launcher_key)

    @property
    def http_url(self) -> str:
        """Where a client on this machine reaches the gateway by HTTP."""
        scheme = "http" if self.settings.tls is None else "https"
        return f"{scheme}://{self._local(self.settings.http_port)}"

    def _local(self, port: int) -> str:
        host = "127.0.0.1" if self.settings.host in ("0.0.0.0", "") else self.settings.host
        host = "::1" if host.strip("[]") == "::" else host
        return join_address(host, port)

    def children(self) -> tuple[ChildSpec, ...]:
        return tuple(map(self._child, self.places))

    def child(self, role: Role, rank: int) -> ChildSpec:
        """One process, as it was planned, or of a rank that a tier has grown to since."""
        for place in self.places:
            if (place.role, place.rank) == (role, rank):
                return self._child(place)
        device = device_of(self.parallel, self.num_cuda_devices, role, rank)
        return self._child(Place(role, rank, device, port=0))

    def _child(self, place: Place) -> ChildSpec:
        return ChildSpec(
            place.name,
            (sys.executable, "-P", "-m", "epserve", *self._arguments(place)),
            {**_environment(place, self.parallel), **self._secrets(place)},
            _STOP_STAGES[place.role],
        )

    def _arguments(self, place: Place) -> list[str]:
        settings = self.settings
        arguments = [place.role.value, "--model", str(settings.model)]
        if settings.debug:
            arguments.append("--debug")
        if settings.tls is not None:
            arguments += settings.tls.arguments()
        if settings.log_json:
            arguments.append("--log-json")
        arguments += _given("--otlp-traces-endpoint", settings.otlp_traces_endpoint)
        arguments += ["--drain-timeout", str(settings.drain_timeout_s)]
        if place.role is Role.GATEWAY:
            return arguments + self._gateway_arguments()
        gateway = self.target if settings.tls is None else self._local(settings.cluster_port)
        arguments += ["--gateway", gateway, "--rank", str(place.rank)]
        arguments += ["--device", place.device, "--dtype", settings.dtype]
        arguments += ["--transport", settings.transport]
        if place.role is Role.ATTN:
            arguments += _given("--kv-cache-tokens", settings.kv_cache_tokens)
            arguments += _given("--kv-cache-memory", settings.kv_cache_memory)
            arguments += _given("--memory-utilization", settings.memory_utilization)
            arguments += _given("--block-size", settings.block_size)
            arguments += _given("--max-num-seqs", settings.max_num_seqs)
            arguments += _given("--microbatches", settings.microbatches)
            arguments += ["--expert-wait", str(settings.expert_wait_s)]
            arguments += _given("--hedge-after", settings.hedge_after_s)
            arguments += _given("--orphan-grace", settings.orphan_grace)
        else:
            arguments += _given("--spare-expert-slots", settings.spare_expert_slots)
        return arguments

    def _gateway_arguments(self) -> list[str]:
        settings = self.settings
        arguments = ["--host", settings.host, "--port", str(settings.http_port)]
        arguments += ["--grpc-port", str(settings.grpc_port), "--registry", DEFAULT_REGISTRY]
        if settings.tls is not None:
            arguments += ["--cluster-port", str(settings.cluster_port)]
        if settings.insecure:
            arguments.append("--insecure")
        arguments += _given("--api-keys", settings.api_keys)
        arguments += _given("--max-queued-requests", settings.max_queued_requests)
        arguments += _given("--rebalance-interval", settings.rebalance_interval)
        arguments += _given("--attn-wait", settings.attn_wait)
        return arguments + parallel_arguments(self.parallel)

    def _secrets(self, place: Place) -> Mapping[str, str]:
        """Only the digest leaves this process: whoever reads it there cannot use it."""
        if place.role is not Role.GATEWAY or self.launcher_key is None:
            return {}
        return {LAUNCHER_KEY_HASH: hash_of(self.launcher_key)}


def make_plan(settings: ClusterSettings) -> LaunchPlan:
    """Check everything that can be known before a process starts.

    Raises ConfigError for what cannot be set, CheckpointError for a damaged checkpoint.
    """
    model = Checkpoint.open(settings.model).config
    parallel = settings.parallel.with_model(model)
    if settings.tls is not None:
        Certificates(settings.tls, PeerRole.GATEWAY, PeerRole.ATTN, PeerRole.EXPERT)
    launcher_key = None
    if settings.api_keys is not None:
        read_keys(settings.api_keys)
        launcher_key = new_key()
    settings = _with_ports(settings)
    num_devices = num_cuda_devices(settings.device)
    devices = spread_devices(parallel, num_devices)
    places = derive_layout(
        parallel, model, *devices, gateway_ports=(settings.grpc_port, settings.http_port)
    )
    return LaunchPlan(settings, model, parallel, places, num_devices, launcher_key)


def num_cuda_devices(device: str) -> int:
    """How many CUDA devices the processes may use: none for "cpu", and for "auto" where there
    are none. Raises ConfigError for "cuda" without a device."""
    if device == "cpu" or (device == "auto" and not _has_cuda_driver()):
        return 0
    count = _devices_torch_sees()
    if device == "cuda" and count == 0:
        raise ConfigError("device", device, "torch sees no CUDA device on this machine", ["cpu"])
    return count


def parallel_arguments(parallel: ParallelConfig) -> list[str]:
    """The gateway's flags for a configuration that is settled for its model."""
    arguments = ["--enable-mla" if parallel.enable_mla else "--no-enable-mla"]
    if parallel.colocated:
        arguments.append("--colocated")
    for flag, value in (
        ("--attn-devices", parallel.attn_devices),
        ("--dp-size", parallel.dp_size),
        ("--expert-devices", parallel.expert_devices),
        ("--ep-size", parallel.ep_size),
        ("--expert-parallel-degree", parallel.degree),
        ("--num-redundant-experts", parallel.num_redundant_experts),
        ("--shared-experts", parallel.shared_experts),
    ):
        arguments += _given(flag, value)
    return arguments


def _given(flag: str, value: object | None) -> Sequence[str]:
    return () if value is None else (flag, str(value))


def _with_ports(settings: ClusterSettings) -> ClusterSettings:
    """The settings with ports that were free a moment ago. Raises ConfigError for a taken one."""
    host = settings.host
    with (
        _held_port("grpc_port", host, settings.grpc_port) as grpc_port,
        _held_port("port", host, settings.http_port) as http_port,
    ):
        settings = replace(settings, grpc_port=grpc_port, http_port=http_port)
        if settings.tls is None:
            return settings
        with _held_port("cluster_port", host, settings.cluster_port) as cluster_port:
            return replace(settings, cluster_port=cluster_port)


@contextmanager
def _held_port(setting: str, host: str, port: int) -> Iterator[int]:
    """The port (0: a free one), which nobody else gets meanwhile."""
    try:
        probe = bound_socket(host, port)
    except OSError as error:
        rule = f"cannot listen on {join_address(host, port)}: {error.strerror or error}"
        raise ConfigError(setting, port, rule, ["0 (any free one)"]) from None
    with probe:
        yield int(probe.getsockname()[1])


def _environment(place: Place, parallel: ParallelConfig) -> Mapping[str, str]:
    """Thread counts and waits, which libraries read when they load.

    The tiers take turns within a layer, so each tier's processes share out all cores. What the
    user has set already stays.
    """
    wanted = {"UCX_MM_ERROR_HANDLING": "y", "TOKENIZERS_PARALLELISM": "false"}
    if place.role is not Role.GATEWAY:
        tier = parallel.attn_devices if place.role is Role.ATTN else parallel.expert_devices
        cores = sorted(os.sched_getaffinity(0))
        num_threads = max(1, len(cores) // tier)
        wanted["OMP_NUM_THREADS"] = str(num_threads)
        wanted["GOMP_SPINCOUNT"] = "5000"
        if num_threads > 1 and place.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            # A rank that the tier has grown to shares the cores of one that was there before.
            slot = place.rank % (len(cores) // num_threads)
            own = cores[slot * num_threads : (slot + 1) * num_threads]
            # One thread a core: the kernel wakes a tier's threads on one core beside an idle one.
            wanted["OMP_PROC_BIND"] = "true"
            wanted["OMP_PLACES"] = ",".join(f"{{{core}}}" for core in own)
    return {name: value for name, value in wanted.items() if name not in os.environ}


def _has_cuda_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _devices_torch_sees() -> int:
    """Asked in a process of its own: importing torch here would cost seconds and memory."""
    question = "import torch; print(torch.cuda.device_count())"
    try:
        answer = subprocess.run(
            [sys.executable, "-P", "-c", question],
            capture_output=True,
            text=True,
            timeout=_DEVICE_QUESTION_TIMEOUT_S,
            check=True,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise ConfigError("device", "cuda", f"torch could not be asked: {error}", ["cpu"]) from None
    return int(answer.stdout)
