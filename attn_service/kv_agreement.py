"""How the ranks of an attention TP group come to KV caches of the same shape.

Knows the group's store and the rule. Knows neither memory nor blocks; kv_budget.py does.

A plan's block ids point into the cache of every rank, so all must have as many blocks. Ranks
that measured what is left of their memory take the least that any of them found. A number that
was set is not lowered behind the user's back: then all must have the same, or none starts.

tp_rank 0 decides, and says so last of all: a rank that knows the outcome may follow at once.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]  # torch exports it silently

from attn_service.tensor_parallel import GroupLostError, GroupRank, bounded
from moe_core.errors import ConfigError

POLL_S = 0.1
_OUTCOME = "kv/outcome"


@dataclass(frozen=True, slots=True)
class KvOffer:
    """What one rank would hold by itself. measured: from the memory that it found."""

    num_blocks: int
    block_size: int
    measured: bool


def settle(offers: Sequence[KvOffer]) -> int:
    """The number of blocks of every rank, by their offers in rank order. Raises ConfigError."""
    sizes = [offer.block_size for offer in offers]
    if len(set(sizes)) > 1:
        raise ConfigError("block_size", sizes, "must be the same on all tp ranks", sizes[:1])
    counts = [offer.num_blocks for offer in offers]
    if len(set(counts)) > 1 and not all(offer.measured for offer in offers):
        rule = (
            "all tp ranks must have as many KV blocks; start them with the same kv_cache_tokens, "
            "kv_cache_memory or memory_utilization"
        )
        raise ConfigError("KV blocks by tp rank", counts, rule)
    return min(counts)


async def agree(
    rank: GroupRank,
    store: Store,
    offer: KvOffer,
    accept: Callable[[int], None],
    timeout_s: float,
) -> int:
    """The number of blocks that this rank is to have; every rank of the group calls it.

    On tp_rank 0 `accept` is called with it before any other rank knows it. Raises ConfigError
    where the offers do not fit together, GroupLostError when a rank is lost or does not come in
    time.
    """
    mine = json.dumps(asdict(offer))
    bounded(lambda: store.set(_key(rank.tp_rank), mine), _lost_store(rank))
    if rank.tp_rank != 0:
        (outcome,) = await _values(rank, store, [_OUTCOME], timeout_s)
        if "refused" in outcome:
            raise ConfigError(*outcome["refused"])
        return int(outcome["num_blocks"])
    keys = [_key(each) for each in range(rank.tp_size)]
    offers = [KvOffer(**value) for value in await _values(rank, store, keys, timeout_s)]
    try:
        num_blocks = settle(offers)
    except ConfigError as error:
        refused = error.setting, error.value, error.rule
        store.set(_OUTCOME, json.dumps({"refused": refused}))
        raise
    accept(num_blocks)
    store.set(_OUTCOME, json.dumps({"num_blocks": num_blocks}))
    return num_blocks


async def _values(
    rank: GroupRank, store: Store, keys: Sequence[str], timeout_s: float
) -> list[dict[str, Any]]:
    """Polls, so that the loop goes on and the wait can be cancelled."""
    missing = list(keys)
    try:
        async with asyncio.timeout(timeout_s):
            while missing := [each for each in missing if not _is_there(rank, store, each)]:
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise GroupLostError(
            f"{rank}: no {', '.join(missing)} in the TP store within {timeout_s:g} s"
        ) from None
    texts = bounded(lambda: [store.get(key) for key in keys], _lost_store(rank))
    return [json.loads(text) for text in texts]


def _is_there(rank: GroupRank, store: Store, key: str) -> bool:
    return bool(bounded(lambda: store.check([key]), _lost_store(rank)))


def _lost_store(rank: GroupRank) -> str:
    return f"{rank} lost the TP store of tp_rank 0"


def _key(tp_rank: int) -> str:
    return f"kv/offer of tp_rank {tp_rank}"
