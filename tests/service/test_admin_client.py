"""AdminClient against the Admin servicer, with a rebalancer that has decided already."""

from epserve.admin_client import AdminClient
from gateway import rebalancing
from gateway.admin_servicer import AdminServicer
from gateway.leadership import SoleGateway
from gateway.placement_leader import PlacementLeader
from gateway.scaling import Scaling
from moe_core.cluster import LayerLoad
from moe_core.config.parallel import ParallelConfig
from moe_core.service.grpc_host import GrpcHost
from support.small_gateway import MODEL, make_registry


class Decided:
    async def rebalance(self, *, force: bool, dry_run: bool) -> rebalancing.Rebalanced:
        layers = (LayerLoad(3, 4, 2.0, 1.1), LayerLoad(1, 3, 1.25, 1.0))
        return rebalancing.Rebalanced(2, 7, 1.5, 1.1, int(dry_run), "", layers)


async def test_the_layers_that_change_come_with_their_loads() -> None:
    registry = make_registry(ParallelConfig())
    leadership = SoleGateway()
    scaling = Scaling(registry, PlacementLeader(registry, leadership), MODEL)
    host = GrpcHost()
    AdminServicer(registry, scaling, Decided(), leadership).add_to(host)
    port = await host.start("127.0.0.1", 0)
    try:
        async with AdminClient(f"127.0.0.1:{port}") as client:
            done = await client.rebalance(dry_run=True)
    finally:
        await host.stop(1.0)
    assert done.layers == (LayerLoad(3, 4, 2.0, 1.1), LayerLoad(1, 3, 1.25, 1.0))
    assert (done.layers_changed, done.experts_moved, done.placement_epoch) == (2, 7, 1)
