"""How errors of the exchange are put into words: which experts of which layer, of whom, and why.

The transport's own words name peer, layer, tokens, bytes, and the phase of a timeout; physical ids
mean nothing to it. Here they become experts. Knows placements; knows no links.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from moe_core.errors import TransportError
from moe_core.placement import LayerPlacement

MAX_EXPERTS = 16


def failed(error: TransportError, layer: LayerPlacement, physical_ids: Tensor) -> str:
    """What a failed dispatch of `physical_ids` (-1 where there was none) has met."""
    needed: list[int] = torch.unique(physical_ids[physical_ids >= 0]).tolist()
    logical = layer.physical_to_logical
    names = (str(logical[each]) if each < layer.num_physical else "shared" for each in needed)
    return f"{error} (for layer {layer.layer_id}, experts {_listed(dict.fromkeys(names))})"


def nobody_holds(layer: LayerPlacement, experts: Iterable[int], reasons: Iterable[str]) -> str:
    """That `experts`, logical ids, are on processes only that cannot be used for `reasons`."""
    return (
        f"layer {layer.layer_id} needs experts {_listed(map(str, experts))} "
        f"of {' and of '.join(reasons)}; no other process holds them"
    )


def _listed(names: Iterable[str]) -> str:
    all_names = list(names)
    more = ", …" if len(all_names) > MAX_EXPERTS else ""
    return ", ".join(all_names[:MAX_EXPERTS]) + more
