"""Which tokens the next step computes.

Knows waiting and running sequences, one token budget per step and the block pool. Knows no
tensors, no sampling and no clients.

There are no phases: a sequence is behind by `num_pending_tokens` (its prompt at first, one
token later on), and a step lets every running sequence catch up as far as the budget goes.

Invariants:
* Admission is first come, first served, and takes the blocks of the prompt and of all
  `max_tokens` outputs at once, so a running sequence never runs out of blocks.
* A sequence is admitted only while budget is left, and running ones are served in the order
  of admission. So at most one, the last, is short of its prompt, and since
  `max_num_seqs <= max_step_tokens` it never keeps another from its next token.
"""

from collections import deque
from dataclasses import dataclass

from attn_service.kv_blocks import BlockPool
from attn_service.sequence import Sequence, SequenceRequest
from moe_core.errors import ConfigError, RequestError


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """max_step_tokens: budget of one step. max_model_len: prompt and outputs together."""

    max_num_seqs: int
    max_step_tokens: int
    max_model_len: int

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ConfigError("max_num_seqs", self.max_num_seqs, "must be at least 1", (1,))
        if self.max_step_tokens < self.max_num_seqs:
            raise ConfigError(
                "max_step_tokens",
                self.max_step_tokens,
                f"a step must have room for one token of each of max_num_seqs="
                f"{self.max_num_seqs} sequences",
                (self.max_num_seqs,),
            )
        if self.max_model_len < 2:
            raise ConfigError(
                "max_model_len", self.max_model_len, "needs room for a prompt and an output", (2,)
            )


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`num_new_tokens` of `sequence`, from its computed tokens on, are computed next."""

    sequence: Sequence
    num_new_tokens: int

    @property
    def catches_up(self) -> bool:
        """Whether the step computes the sequence's last token, so that the next can follow."""
        return self.num_new_tokens == self.sequence.num_pending_tokens


class Scheduler:
    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self._config = config
        self._pool = pool
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def sequences(self) -> tuple[Sequence, ...]:
        """All sequences, running ones first."""
        return (*self._running, *self._waiting)

    def check(self, request: SequenceRequest) -> None:
        """Raises RequestError, with the numbers, for a request that can never run here."""
        prompt, outputs = len(request.prompt_ids), request.sampling.max_tokens
        if prompt < 1 or outputs < 1:
            raise RequestError(
                f"prompt of {prompt} tokens and max_tokens={outputs}: both must be at least 1"
            )
        if prompt + outputs > self._config.max_model_len:
            raise RequestError(
                f"prompt of {prompt} tokens and max_tokens={outputs} make {prompt + outputs} "
                f"tokens, but the context holds {self._config.max_model_len}; "
                f"shorten the prompt or lower max_tokens"
            )
        if self._pool.blocks_for(request.max_computed_tokens) > self._pool.num_blocks:
            raise RequestError(
                f"prompt of {prompt} tokens and max_tokens={outputs} need "
                f"{request.max_computed_tokens} tokens of KV cache, but the whole cache holds "
                f"{self._pool.num_tokens}; lower max_tokens or serve with a larger KV cache"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises RequestError as `check` does."""
        self.check(sequence.request)
        self._waiting.append(sequence)

    def schedule(self) -> tuple[Scheduled, ...]:
        """The next step: never more than max_step_tokens, in order of admission."""
        budget = self._config.max_step_tokens
        scheduled: list[Scheduled] = []
        served = 0
        while budget > 0 and (served < len(self._running) or self._admit_next()):
            sequence = self._running[served]
            count = min(sequence.num_pending_tokens, budget)
            scheduled.append(Scheduled(sequence, count))
            budget -= count
            served += 1
        return tuple(scheduled)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its blocks."""
        if sequence in self._running:
            self._running.remove(sequence)
            self._pool.free(sequence.block_table)
            sequence.block_table = ()
        else:
            self._waiting.remove(sequence)

    def _admit_next(self) -> bool:
        if not self._waiting or len(self._running) == self._config.max_num_seqs:
            return False
        count = self._pool.blocks_for(self._waiting[0].request.max_computed_tokens)
        if count > self._pool.num_free:
            return False
        sequence = self._waiting.popleft()
        sequence.block_table = self._pool.allocate(count)
        self._running.append(sequence)
        return True
