"""NIXL as the rest of the transport uses it: loading it, one agent, registered memory, one poll.

Knows the nixl package. Knows no link, no slot and no event loop. One agent belongs to one thread
(using it from two without its locks crashes the process), and makes progress only when called.
"""

import importlib
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch

from moe_core.errors import ProtocolError, TransportError

DONE = "DONE"
UCX_ENVIRONMENT = {
    # Notifications through shared memory, and still a word when a peer dies.
    "UCX_MM_ERROR_HANDLING": "y",
    # stdout belongs to the program's output.
    "UCX_LOG_FILE": "stderr",
    # Where UCX_TLS leaves shared memory out, the first of these is unused, and that is fine.
    "UCX_WARN_UNUSED_ENV_VARS": "n",
}


class NixlUnavailable(Exception):
    """Why there is no NIXL here."""


class NixlAgent:
    """A nixl_agent with UCX. Failures of NIXL leave here as TransportError."""

    def __init__(self, name: str) -> None:
        """Raises NixlUnavailable."""
        api = _load()
        config = api.nixl_agent_config(backends=["UCX"], enable_prog_thread=False)
        try:
            self._agent: Any = api.nixl_agent(name, config)
        except (RuntimeError, api.nixlBind.nixlBackendError) as error:
            raise NixlUnavailable(f"the NIXL agent does not start: {error}") from error
        if "UCX" not in self._agent.backends:
            raise NixlUnavailable("this NIXL has no UCX plugin")
        bindings = api.nixlBind
        self.failures: tuple[type[Exception], ...] = tuple(
            value
            for value in vars(bindings).values()
            if isinstance(value, type) and issubclass(value, Exception)
        )
        self.name = name
        self._transfer = self._agent.transfer
        self._check = self._agent.check_xfer_state
        self._get_notifs = self._agent.get_new_notifs

    def register(self, memory: torch.Tensor) -> "Registration":
        return Registration(self._agent, memory)

    def add_peer(self, name: str, metadata: bytes) -> None:
        """Raises ProtocolError when `metadata` is not that of an agent called `name`."""
        try:
            found = self._agent.add_remote_agent(metadata)
        except self.failures as error:
            raise ProtocolError(
                f"the NIXL metadata of agent {name!r} is refused: {error}"
            ) from None
        if found != name.encode():
            self._agent.remove_remote_agent(found.decode())
            raise ProtocolError(f"the NIXL metadata of agent {name!r} is that of {found!r}")

    def remove_peer(self, name: str) -> None:
        try:
            self._agent.remove_remote_agent(name)
        except self.failures as error:
            logging.getLogger(__name__).debug("removing NIXL agent %s: %s", name, error)

    def prepare_write(
        self, local: tuple[int, int, int, str], remote: tuple[int, int, str], peer: str
    ) -> Any:  # noqa: ANN401 - nixl_xfer_handle, which has no type stub
        """A write from (address, bytes, device, memory type) to (address, device, memory type)."""
        address, num_bytes, device, memory_type = local
        remote_address, remote_device, remote_type = remote
        agent = self._agent
        source = agent.get_xfer_descs([(address, num_bytes, device)], memory_type)
        target = agent.get_xfer_descs([(remote_address, num_bytes, remote_device)], remote_type)
        try:
            return agent.initialize_xfer("WRITE", source, target, peer)
        except self.failures as error:
            raise TransportError(f"NIXL cannot write to {peer}: {error}") from None

    def post(self, handle: Any, note: bytes) -> bool:  # noqa: ANN401
        """Start the write; `note` follows it. True if it is done. Raises one of `failures`."""
        return bool(self._transfer(handle, note) == DONE or self._check(handle) == DONE)

    def done(self, handle: Any) -> bool:  # noqa: ANN401
        """Whether the posted write is done; asking makes progress. Raises one of `failures`."""
        return bool(self._check(handle) == DONE)

    def release(self, handle: Any) -> bool:  # noqa: ANN401
        """False when NIXL still needs the handle."""
        try:
            handle.release()
        except self.failures:
            return False
        return True

    def notifications(self) -> Mapping[str, list[bytes]]:
        """What arrived since the last call, by sender; this also makes progress."""
        notes: dict[str, list[bytes]] = self._get_notifs()
        return notes


class Registration:
    """Memory that NIXL knows."""

    def __init__(self, agent: Any, memory: torch.Tensor) -> None:  # noqa: ANN401
        self._agent = agent
        self.memory = memory
        self.memory_type = "VRAM" if memory.is_cuda else "DRAM"
        self.device_id = max(memory.get_device(), 0)
        self._descriptors: Any = agent.register_memory(memory)

    @property
    def address(self) -> int:
        return self.memory.data_ptr()

    def metadata(self) -> bytes:
        """What a peer needs to reach this agent and to write to this memory, and no other."""
        data: bytes = self._agent.get_partial_agent_metadata(self._descriptors, inc_conn_info=True)
        return data

    def release(self) -> None:
        self._agent.deregister_memory(self._descriptors)


def _load() -> Any:  # noqa: ANN401 - a module
    for name, value in UCX_ENVIRONMENT.items():  # read when UCX loads
        os.environ.setdefault(name, value)
    try:
        api = importlib.import_module("nixl._api")
    except ImportError as error:
        raise NixlUnavailable(f"nixl does not load: {error}") from error
    # It logs to stdout, which belongs to the program's output.
    nixl_logger = logging.getLogger("nixl")
    nixl_logger.handlers.clear()
    nixl_logger.propagate = True
    nixl_logger.setLevel(logging.WARNING)
    return api
