"""Placements of later epochs, made by hand.

Knows placement tables only.
"""

from collections.abc import Mapping, Sequence

from moe_core.placement import ExpertPlacement, LayerPlacement


def placed(layer_id: int, held: Sequence[Sequence[int]]) -> LayerPlacement:
    """From the logical experts of every EP group, in slot order."""
    logical = tuple(expert for group in held for expert in group)
    ranks = tuple(rank for rank, group in enumerate(held) for _ in group)
    return LayerPlacement(layer_id, logical, ranks)


def after(
    old: ExpertPlacement,
    changed: Mapping[int, Sequence[Sequence[int]]],
    *,
    ep_size: int | None = None,
    epoch: int | None = None,
) -> ExpertPlacement:
    """The next epoch, in which the layers of `changed` are held as it says."""
    layers = tuple(
        placed(layer.layer_id, changed[layer.layer_id]) if layer.layer_id in changed else layer
        for layer in old.layers
    )
    number = old.epoch + 1 if epoch is None else epoch
    return ExpertPlacement(number, old.num_logical_experts, ep_size or old.ep_size, layers)
