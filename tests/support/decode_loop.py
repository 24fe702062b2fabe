"""Drives a Decoder by hand: the simplest engine there can be, for tests of the model.

Knows one batch of prompts that prefill together and decode together; the routed experts are
run_experts on all of them, in this process. Knows no scheduler.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_core.model.batch import AttentionBatch, SequenceSlice
from moe_core.model.decoder import Decoder
from moe_core.model.experts import run_experts
from moe_core.model.kv_cache import KvCache
from moe_core.model.weights import ExpertLayerWeights

Experts = dict[int, ExpertLayerWeights]


@torch.no_grad()
def step(
    decoder: Decoder,
    experts: Experts,
    cache: KvCache,
    slices: Sequence[SequenceSlice],
    token_ids: Sequence[int],
) -> Tensor:
    """Logits of every slice's last token, [num_slices, vocab]."""
    device = experts[min(experts)].w13.device
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


@dataclass
class Sequences:
    """Blocks are dealt out in an order that is not ascending, so that tables matter."""

    prompts: Sequence[tuple[int, ...]]
    block_size: int
    num_tokens: int
    blocks: list[list[int]] = field(init=False)
    num_blocks: int = field(init=False)

    def __post_init__(self) -> None:
        each = [-(-(len(p) + self.num_tokens) // self.block_size) for p in self.prompts]
        self.num_blocks = sum(each) + 1
        free = [(i * 7919) % sum(each) + 1 for i in range(sum(each))]
        free = sorted(range(1, self.num_blocks), key=lambda block: (block * 7) % 11)
        self.blocks = [[free.pop() for _ in range(count)] for count in each]


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
    computed = [0] * len(known)
    first: list[Tensor | None] = [None] * len(known)
    while any(len(k) - len(p) < sequences.num_tokens for k, p in zip(known, sequences.prompts)):
        slices, token_ids, owners = [], [], []
        for i, (tokens, prompt) in enumerate(zip(known, sequences.prompts, strict=True)):
            if len(tokens) - len(prompt) >= sequences.num_tokens:
                continue
            count = min(len(tokens) - computed[i], prefill_chunk or len(tokens))
            slices.append(SequenceSlice(sequences.blocks[i], computed[i], count))
            token_ids += tokens[computed[i] : computed[i] + count]
            owners.append(i)
        logits = step(decoder, experts, cache, slices, token_ids)
        for row, (i, part) in enumerate(zip(owners, slices, strict=True)):
            computed[i] = part.seq_len
            if computed[i] == len(known[i]):
                first[i] = logits[row] if first[i] is None else first[i]
                known[i].append(int(logits[row].argmax()))
    new = [k[len(p) :] for k, p in zip(known, sequences.prompts, strict=True)]
    return Generation(torch.stack([row for row in first if row is not None]), new)


@dataclass
class ThreadedTensorParallel:
    """One rank of a TP group whose ranks are threads of this process."""

    rank: int
    size: int
    barrier: threading.Barrier
    mailbox: list[Tensor | None]

    @classmethod
    def group(cls, size: int, timeout_s: float = 30.0) -> "list[ThreadedTensorParallel]":
        barrier = threading.Barrier(size, timeout=timeout_s)
        mailbox: list[Tensor | None] = [None] * size
        return [cls(rank, size, barrier, mailbox) for rank in range(size)]

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self.mailbox[self.rank] = x
        self.barrier.wait()
        every = [part for part in self.mailbox if part is not None]
        self.barrier.wait()
        return every

    def all_reduce(self, x: Tensor) -> Tensor:
        first, *others = self._exchange(x)
        total = first.clone()
        for part in others:
            total += part
        self.barrier.wait()
        return total

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        parts = self._exchange(x)
        assert [part.shape[0] for part in parts] == list(sizes)
        return torch.cat(parts)


def run_ranks(work: Callable[[ThreadedTensorParallel], Generation], size: int) -> list[Generation]:
    """`work` once per rank, in threads; the first failure breaks the barrier and is raised."""
    ranks = ThreadedTensorParallel.group(size)
    results: list[Generation | None] = [None] * size
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
        thread.join()
    if errors:
        raise errors[0]
    return [result for result in results if result is not None]
