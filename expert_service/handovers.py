"""Both ends of this process's handovers: giving what it holds, and reaching who holds more.

Knows the runner's experts as bytes, and which wire may be asked for. Knows no message and no reason
why an expert moves.
"""

from torch import Tensor

from expert_service.expert_bytes import ExpertForm
from expert_service.expert_runner import ExpertRunner
from moe_core.cluster import Member
from moe_core.service.certificates import Certificates, expecting
from moe_core.service.own_thread import in_own_thread
from moe_core.service.peer_roles import PeerRole
from moe_core.transport.base import Identity, TransportOptions
from moe_core.transport.choice import offered_transports
from moe_core.transport.endpoint import NixlEndpoint
from moe_core.transport.handover import UnitName
from moe_core.transport.handover_client import UnitFetch
from moe_core.transport.handover_servicer import HandoverServicer


class Handovers:
    """`endpoint` is this process's one, for all its links; None: everything goes by grpc."""

    def __init__(
        self,
        runner: ExpertRunner,
        form: ExpertForm,
        model_fingerprint: str,
        identity: Identity,
        options: TransportOptions,
        endpoint: NixlEndpoint | None,
        tls: Certificates | None,
    ) -> None:
        self._runner = runner
        self._form = form
        self._spec = form.spec(model_fingerprint)
        self._rank = identity.rank
        self._transports = offered_transports(options, endpoint)
        self._endpoint = endpoint
        self._tls = tls
        self.servicer = HandoverServicer(self._spec, self.fill, identity.instance_epoch, endpoint)

    async def fill(self, name: UnitName, memory: Tensor) -> bytes | None:
        """A FillUnit."""
        layer_id, logical = name
        weights = self._runner.expert(layer_id, logical)
        if weights is None:
            return None
        return await in_own_thread(self._form.store, weights, memory)

    async def connect(self, peer: Member) -> UnitFetch:
        """A Connect: to an expert process that is in the cluster's state."""
        name = f"expert {peer.rank} ({peer.address})"
        security = expecting(self._tls, PeerRole.EXPERT)
        fetch = UnitFetch(peer.address, name, self._spec, security)
        try:
            await fetch.open(self._rank, self._transports, self._endpoint)
        except BaseException:
            await fetch.close()
            raise
        return fetch
