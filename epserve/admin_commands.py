"""The commands that change a running cluster: `epserve scale`, `rebalance` and `drain`.

Knows their options and what they print. Knows nothing of how a change is made.
"""

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from epserve.options import common, network, security
from moe_core.cluster import Role
from moe_core.errors import ConfigError

if TYPE_CHECKING:
    from epserve.admin_client import Rebalanced
    from epserve.gateway_connection import Target

MAX_DEVICES = 1 << 16
MAX_LAYERS = 8


def scale(
    target: network.TargetOption = network.DEFAULT_TARGET,
    attn: Annotated[
        int | None, typer.Option("--attn", help="Processes of the attention tier, in whole groups.")
    ] = None,
    experts: Annotated[
        int | None, typer.Option("--experts", help="Processes of the expert tier, in whole groups.")
    ] = None,
    tls_ca: security.TlsCaOption = None,
    tls_cert: security.TlsCertOption = None,
    tls_key: security.TlsKeyOption = None,
    api_key: security.ApiKeyOption = None,
    config: common.ConfigOption = None,
    dump_config: common.DumpConfigOption = False,
    debug: common.DebugOption = False,
) -> None:
    """Change how many processes the tiers have, while they serve."""
    from epserve.gateway_connection import Target

    if attn is None and experts is None:
        raise ConfigError("experts", None, "give --experts, --attn or both")
    for name, value in (("attn", attn), ("experts", experts)):
        if value is not None and not 1 <= value <= MAX_DEVICES:
            raise ConfigError(name, value, f"must be from 1 to {MAX_DEVICES}", (1,))
    gateway = Target.of_options(target, tls_ca, tls_cert, tls_key, api_key)
    asyncio.run(_scale(gateway, attn, experts))


def rebalance(
    target: network.TargetOption = network.DEFAULT_TARGET,
    force: Annotated[
        bool, typer.Option("--force", help="Also where little is to be gained.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be changed.")
    ] = False,
    tls_ca: security.TlsCaOption = None,
    tls_cert: security.TlsCertOption = None,
    tls_key: security.TlsKeyOption = None,
    api_key: security.ApiKeyOption = None,
    config: common.ConfigOption = None,
    dump_config: common.DumpConfigOption = False,
    debug: common.DebugOption = False,
) -> None:
    """Place and copy experts so that the expert tier is loaded evenly."""
    from epserve.gateway_connection import Target

    gateway = Target.of_options(target, tls_ca, tls_cert, tls_key, api_key)
    asyncio.run(_rebalance(gateway, force=force, dry_run=dry_run))


def drain(
    role: Annotated[Literal["attn", "expert"], typer.Option(help="Its tier.")],
    rank: Annotated[int, typer.Option(min=0, max=MAX_DEVICES, help="Of the process.")],
    target: network.TargetOption = network.DEFAULT_TARGET,
    tls_ca: security.TlsCaOption = None,
    tls_cert: security.TlsCertOption = None,
    tls_key: security.TlsKeyOption = None,
    api_key: security.ApiKeyOption = None,
    config: common.ConfigOption = None,
    dump_config: common.DumpConfigOption = False,
    debug: common.DebugOption = False,
) -> None:
    """Ask one process to end in order; its work goes to others."""
    from epserve.gateway_connection import Target

    gateway = Target.of_options(target, tls_ca, tls_cert, tls_key, api_key)
    asyncio.run(_drain(gateway, Role(role), rank))


async def _scale(gateway: "Target", attn: int | None, experts: int | None) -> None:
    from epserve.admin_client import AdminClient

    async with AdminClient(gateway) as client:
        async for progress in client.scale(attn_devices=attn, expert_devices=experts):
            sizes = progress.sizes
            typer.echo(
                f"done: {sizes.attn_devices} attention and {sizes.expert_devices} expert processes"
                if progress.done
                else progress.phase
            )


async def _rebalance(gateway: "Target", *, force: bool, dry_run: bool) -> None:
    from epserve.admin_client import AdminClient

    async with AdminClient(gateway) as client:
        done = await client.rebalance(force=force, dry_run=dry_run)
    for line in rebalanced_lines(done, dry_run=dry_run):
        typer.echo(line)


def rebalanced_lines(done: "Rebalanced", *, dry_run: bool) -> Iterator[str]:
    """What was, or would be, changed; loads are of the most loaded EP group, over the mean."""
    if done.reason:
        yield f"nothing to do: {done.reason}"
        return
    verb = "would change" if dry_run else "changed"
    yield (
        f"{verb} {done.layers_changed} layers, {done.experts_moved} experts moved; the most loaded "
        f"EP group has {done.load_after:.2f} of the mean load, {done.load_before:.2f} before; "
        f"placement epoch {done.placement_epoch}"
    )
    for layer in done.layers[:MAX_LAYERS]:
        yield (
            f"  layer {layer.layer_id}: {layer.load_before:.2f} to {layer.load_after:.2f}, "
            f"{layer.experts_moved} experts"
        )
    if len(done.layers) > MAX_LAYERS:
        yield f"  and {len(done.layers) - MAX_LAYERS} more layers, which gain less"


async def _drain(gateway: "Target", role: Role, rank: int) -> None:
    from epserve.admin_client import AdminClient

    async with AdminClient(gateway) as client:
        await client.drain(role, rank)
    typer.echo(
        f"{role} {rank} is asked to drain and to leave; its tier stays without it until `epserve "
        "scale` asks for a size"
    )
