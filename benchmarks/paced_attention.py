"""An attention tier without a model, for measuring what is in front of it.

Run as a process by gateway_overhead.py. What serves is attn_service's own servicer and streams, in
the server that every process runs; instead of an engine there is a clock: a sequence's first token
comes at once and the others one a step, for all sequences at a fixed pace. Knows no gateway but the
one that it joins, as both tiers.
"""

import argparse
import asyncio
from collections import defaultdict
from pathlib import Path
from typing import Any, NoReturn, cast

import uvloop

from attn_service.engine_stream import EngineStream
from attn_service.live_sequences import LiveSequences
from attn_service.sequence import FinishReason, Sequence, SequenceOutput, SequenceRequest
from attn_service.servicer import AttentionServicer
from child import say, until_closed
from gateway.tokenizer import TextTokenizer
from moe_core.checkpoint.checkpoint import Checkpoint
from moe_core.cluster import Role
from support.fake_attention import FakeWorker


class PacedSequences:
    """A SequenceHost whose sequences are never parked, and never taken over."""

    def __init__(self, token_ids: list[int]) -> None:
        self.step = 0
        self.failure = None
        self.orphan_grace_s = 0.0
        self._token_ids = token_ids
        self._owner: dict[Sequence, EngineStream] = {}
        self._left: dict[Sequence, int] = {}

    def open_stream(self) -> EngineStream:
        return EngineStream(self)

    def add(self, stream: EngineStream, request: SequenceRequest) -> Sequence:
        sequence = Sequence(request)
        self._owner[sequence] = stream
        self._left[sequence] = request.sampling.max_tokens
        asyncio.get_running_loop().call_soon(self._put_out, [sequence])
        return sequence

    def discard(self, sequence: Sequence) -> None:
        if self._owner.pop(sequence, None) is not None:
            del self._left[sequence]

    def find(self, sequence_id: str) -> None:
        return None

    def park(self, sequence: Sequence) -> None:
        raise NotImplementedError

    def unpark(self, sequence_id: str) -> None:
        """Nothing is kept."""

    def hand_over(self, sequence: Sequence, stream: EngineStream) -> None:
        raise NotImplementedError

    def forget(self, stream: EngineStream) -> None:
        """Streams are known by their sequences alone."""

    async def run(self, step_s: float) -> NoReturn:
        while True:
            await asyncio.sleep(step_s)
            self._put_out(list(self._owner))

    def _put_out(self, sequences: list[Sequence]) -> None:
        self.step += 1
        by_stream: defaultdict[EngineStream, list[SequenceOutput]] = defaultdict(list)
        for sequence in sequences:
            if sequence in self._owner:
                by_stream[self._owner[sequence]].append(self._next(sequence))
        for stream, outputs in by_stream.items():
            stream.deliver(self.step, outputs)

    def _next(self, sequence: Sequence) -> SequenceOutput:
        left = self._left[sequence] = self._left[sequence] - 1
        token_id = self._token_ids[left * 7919 % len(self._token_ids)]
        if not left:
            self.discard(sequence)
        reason = None if left else FinishReason.LENGTH
        return SequenceOutput(sequence.request.sequence_id, (token_id,), reason)


def text_tokens(model: Path, vocab_size: int) -> list[int]:
    """Those with a text of their own, as nearly all tokens of a text are, so that each has its
    event; all of them where the tokenizer cannot say."""
    tokenizer = TextTokenizer.from_directory(model)
    assert tokenizer is not None, f"{model} has no tokenizer"
    ids = range(vocab_size)
    return [each for each in ids if tokenizer.whole_text(each)] or list(ids)


async def serve(gateway: str, model: Path, step_s: float) -> None:
    checkpoint = Checkpoint.open(model)
    sequences = PacedSequences(text_tokens(model, checkpoint.config.vocab_size))
    servicer = AttentionServicer()
    servicer.lead(cast(LiveSequences, sequences))
    workers: list[tuple[Role, Any]] = [(Role.ATTN, servicer), (Role.EXPERT, None)]
    joined = []
    for role, served in workers:
        worker = FakeWorker(gateway, checkpoint.fingerprint(), role)
        await worker.start(served, total_kv_blocks=16_384, join_timeout_s=60)
        joined.append(worker)
    stepping = asyncio.create_task(sequences.run(step_s))
    say(ready=True)
    await until_closed()
    stepping.cancel()
    for worker in joined:
        await worker.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gateway", required=True, help="host:port of the one to join")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--step", type=float, required=True, help="seconds")
    options = parser.parse_args()
    uvloop.run(serve(options.gateway, options.model, options.step))


if __name__ == "__main__":
    main()
