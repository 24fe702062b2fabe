"""Drives a Decoder by hand: the simplest engine there can be, for tests of the model.

Knows one batch of prompts that prefill together and decode together; the routed experts are
run_experts on all of them, in this process. Knows no scheduler.
"""

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from moe_core.model.batch import AttentionBatch, SequenceSlice
from moe_core.model.decoder import Decoder
from moe_core.model.experts import run_experts
from moe_core.model.kv_cache import KvCache
from moe_core.model.weights import ExpertLayerWeights

Experts = dict[int, ExpertLayerWeights]
Result = TypeVar("Result")


@torch.no_grad()
def step(
    decoder: Decoder,
    experts: Experts,
    cache: KvCache,
    slices: Sequence[SequenceSlice],
    token_ids: Sequence[int],
) -> Tensor:
    """Logits of every slice's last token, [num_slices, vocab]."""
    device = experts[min(experts)].w13[0].device
    batch = AttentionBatch.build(slices, cache.block_size, device)
    hidden = decoder.embed(torch.tensor(token_ids, device=device))
    for layer in decoder.layers:
        residual, hidden_states = layer.attend(hidden, batch, cache)
        if layer.is_moe:
            topk_ids, topk_weights = layer.route(hidden_states)
            routed = run_experts(experts[layer.layer_id], hidden_states, topk_ids, topk_weights)
            hidden = layer.finish(residual, routed, layer.shared(hidden_states))
        else:
            hidden = layer.dense(residual, hidden_states)
    last = torch.tensor(batch.query_start[1:], device=device) - 1
    return decoder.logits(hidden[last])


@dataclass
class Generation:
    """first_logits [num_prompts, vocab] of the prompts' last tokens, and greedy tokens."""

    first_logits: Tensor
    tokens: list[list[int]]


@dataclass(frozen=True)
class Sequences:
    """Prompts and the blocks they own, dealt out in random order so that tables matter."""

    prompts: Sequence[tuple[int, ...]]
    num_tokens: int
    block_size: int
    num_blocks: int
    blocks: list[list[int]]

    @classmethod
    def deal(
        cls, prompts: Sequence[tuple[int, ...]], num_tokens: int, block_size: int = 4
    ) -> "Sequences":
        each = [-(-(len(prompt) + num_tokens) // block_size) for prompt in prompts]
        free = list(range(sum(each)))
        random.Random(0).shuffle(free)
        blocks = [[free.pop() for _ in range(count)] for count in each]
        return cls(prompts, num_tokens, block_size, sum(each), blocks)


def generate(
    decoder: Decoder,
    experts: Experts,
    cache: KvCache,
    sequences: Sequences,
    prefill_chunk: int | None = None,
) -> Generation:
    """Greedy. With prefill_chunk, prompts enter in pieces of that many tokens, and a sequence
    decodes while others still prefill."""
    known = [list(prompt) for prompt in sequences.prompts]
    wanted = [len(prompt) + sequences.num_tokens for prompt in sequences.prompts]
    computed = [0] * len(known)
    first: dict[int, Tensor] = {}
    while running := [i for i, tokens in enumerate(known) if len(tokens) < wanted[i]]:
        slices, token_ids = [], []
        for i in running:
            count = min(len(known[i]) - computed[i], prefill_chunk or len(known[i]))
            slices.append(SequenceSlice(sequences.blocks[i], computed[i], count))
            token_ids += known[i][computed[i] : computed[i] + count]
        logits = step(decoder, experts, cache, slices, token_ids)
        for row, i in enumerate(running):
            computed[i] = slices[row].seq_len
            if computed[i] == len(known[i]):
                first.setdefault(i, logits[row])
                known[i].append(int(logits[row].argmax()))
    new = [tokens[len(p) :] for tokens, p in zip(known, sequences.prompts, strict=True)]
    return Generation(torch.stack([first[i] for i in range(len(known))]), new)


@dataclass
class ThreadedTensorParallel:
    """One rank of a TP group whose ranks are threads of this process."""

    rank: int
    size: int
    barrier: threading.Barrier
    mailbox: list[Tensor]

    @classmethod
    def group(cls, size: int, timeout_s: float = 30.0) -> "list[ThreadedTensorParallel]":
        barrier = threading.Barrier(size, timeout=timeout_s)
        mailbox = [torch.empty(0)] * size
        return [cls(rank, size, barrier, mailbox) for rank in range(size)]

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self.mailbox[self.rank] = x
        self.barrier.wait()
        every = list(self.mailbox)
        self.barrier.wait()
        return every

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x)).sum(dim=0)

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        parts = self._exchange(x)
        assert [part.shape[0] for part in parts] == list(sizes)
        return torch.cat(parts)


def run_ranks(work: Callable[[ThreadedTensorParallel], Result], size: int) -> list[Result]:
    """`work` once per rank, in threads; the first failure breaks the barrier and is raised."""
    ranks = ThreadedTensorParallel.group(size)
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def run(tp: ThreadedTensorParallel) -> None:
        try:
            results[tp.rank] = work(tp)
        except BaseException as error:  # handed to the caller below
            errors.append(error)
            tp.barrier.abort()

    threads = [threading.Thread(target=run, args=(tp,)) for tp in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120.0)
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]
