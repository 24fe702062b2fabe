"""What serve starts: one command and environment per process of a cluster on this machine.

Knows the settings, what follows from them, and which ports are free. Starts no cluster process
itself.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from epserve.child_arguments import child_arguments
from epserve.child_environment import child_environment
from epserve.cluster_settings import ClusterSettings
from epserve.cuda_devices import num_cuda_devices
from epserve.gateway_connection import Target
from epserve.layout import Place, derive_layout, device_of, spread_devices
from epserve.options.security import LAUNCHER_KEY_HASH
from epserve.supervisor import ChildSpec
from gateway.api_keys import hash_of, new_key, read_keys
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.cluster import Role
from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import ConfigError
from moe_core.service.addresses import bound_socket, join_address
from moe_core.service.certificates import Certificates
from moe_core.service.peer_roles import PeerRole
from moe_core.service.tls_files import TlsFiles

# From the outside in: new requests are refused at once, and those that run find all they need.
_STOP_STAGES = {Role.GATEWAY: 0, Role.ATTN: 1, Role.EXPERT: 2}
# What a tier grows by starts on the cores of those that serve: docs/performance.md, "Faults".
GROWTH_NICENESS = 10


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
            {**child_environment(place, self.parallel), **self._secrets(place)},
            _STOP_STAGES[place.role],
        )

    def _arguments(self, place: Place) -> list[str]:
        settings = self.settings
        gateway = self.target if settings.tls is None else self._local(settings.cluster_port)
        arguments = child_arguments(settings, self.parallel, place, gateway)
        if place not in self.places:
            arguments += ["--load-niceness", str(GROWTH_NICENESS)]
        return arguments

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
