"""What the engine knows of one sequence, and the plain values its parts exchange.

Knows tokens, sampling settings, computed-token counts and block tables. Knows nothing of
scheduling rules, tensors or messages on the wire.
"""

import time
from dataclasses import dataclass, field
from enum import StrEnum

from attn_service.token_counts import TokenCounts
from moe_core.parked_kv import KvSource, ParkedKv


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    PARKED = "parked"  # another group goes on with it


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; every default has been filled by the gateway.

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and the penalties' defaults are off.
    `index` tells the choices of one request apart, so that they share a seed and still differ.
    `logprobs` is how many of the likeliest tokens are told beside the chosen one, None for no
    logprobs at all; `prompt_logprobs` is the same of the prompt's tokens. max_tokens 0: only the
    prompt is computed.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    index: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def penalises(self) -> bool:
        """Whether the next token depends on how often others have occurred."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """`output_ids` were generated before, by another process: the sequence goes on after them,
    and every setting counts them as outputs. priority: lower is served first; equal ones are
    served in order of arrival. traceparent: the W3C header of the span that it belongs to, or
    nothing. take_over: it may be here already, see `EngineStream.add`. kv_source: where its first
    tokens' keys and values are."""

    sequence_id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    output_ids: tuple[int, ...] = ()
    priority: int = 0
    traceparent: str = ""
    take_over: bool = False
    kv_source: KvSource | None = None

    @property
    def max_computed_tokens(self) -> int:
        """Tokens whose keys and values are ever stored: the last output is never computed."""
        return len(self.prompt_ids) + max(1, self.sampling.max_tokens) - 1


@dataclass(eq=False, slots=True)
class Sequence:
    """A sequence under way. Prompt and outputs form one row of tokens, of which the first
    `num_computed_tokens` have their keys and values in the cache.

    Between two steps it has blocks just if it is_running. arrival: its number among all
    sequences. block_keys: see prefix_cache.py. num_cached_tokens: those that were in the cache
    when it was first admitted; None before. told: what is known of the prompt's tokens, the first
    excepted, until it is put out. added_s, started_s, first_token_s: when it came, when
    its first step began and when that token was there, in seconds of time.perf_counter.
    blocked_since, retry_at: since when, in the same seconds, no step can compute it for want of an
    expert (None: it can), and when to try again. logprobs: of the tokens that were generated here,
    where they were asked for.
    """

    request: SequenceRequest
    token_ids: list[int] = field(init=False)
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    is_running: bool = False
    arrival: int = 0
    block_keys: list[bytes] = field(default_factory=list)
    num_cached_tokens: int | None = None
    told: list["TokenLogprobs"] = field(default_factory=list)
    added_s: float = field(default_factory=time.perf_counter)
    started_s: float | None = None
    first_token_s: float | None = None
    blocked_since: float | None = None
    retry_at: float = 0.0
    token_counts: TokenCounts | None = field(init=False, default=None)
    logprobs: list["TokenLogprobs"] = field(default_factory=list)

    def __post_init__(self) -> None:
        request, sampling = self.request, self.request.sampling
        self.token_ids = [*request.prompt_ids, *request.output_ids]
        if sampling.penalises:
            repeats = sampling.repetition_penalty != 1.0  # else the prompt plays no part
            self.token_counts = TokenCounts(
                request.prompt_ids if repeats else (), request.output_ids
            )

    @property
    def order(self) -> tuple[int, int]:
        """Who is served first: the smallest. No two sequences have the same."""
        return self.request.priority, self.arrival

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_pending_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def output_ids(self) -> tuple[int, ...]:
        return tuple(self.token_ids[len(self.request.prompt_ids) :])

    @property
    def num_cached_prompt_tokens(self) -> int:
        """Those of the prompt that were in the cache when it was first admitted."""
        return min(self.num_cached_tokens or 0, len(self.request.prompt_ids))

    @property
    def queued_us(self) -> int | None:
        """From its coming to its first step; None before that."""
        return None if self.started_s is None else round((self.started_s - self.added_s) * 1e6)

    @property
    def tells_prompt(self) -> bool:
        """Whether the prompt's logprobs are still to be put out. Whoever has outputs has them."""
        asked = self.request.sampling.prompt_logprobs is not None
        return asked and self.num_output_tokens == 0

    def append(self, token_id: int) -> FinishReason | None:
        """Take the next token; the reason why it is the last one, if it is."""
        self.token_ids.append(token_id)
        if self.token_counts is not None:
            self.token_counts.add(token_id)
        if token_id in self.request.sampling.stop_token_ids:
            return FinishReason.STOP
        if self.num_output_tokens >= self.request.sampling.max_tokens:
            return FinishReason.LENGTH
        return None


@dataclass(frozen=True, slots=True)
class AskedLogprobs:
    """What is told of the first rows of a slice: how likely each makes the one of token_ids that
    follows it, and which num_top tokens are the likeliest."""

    token_ids: tuple[int, ...]
    num_top: int


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """The tokens of one sequence that one step computes. needs_logits: of the last of them."""

    token_ids: tuple[int, ...]
    num_computed_tokens: int
    block_table: tuple[int, ...]
    needs_logits: bool
    asked_logprobs: AskedLogprobs | None = None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, as every rank of an attention group executes it, in num_microbatches parts (see
    microbatches.split)."""

    step: int
    placement_epoch: int
    slices: tuple[SequenceSlice, ...]
    num_microbatches: int = 1


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token's logarithmic probability among the model's own logits, its rank (1: none is
    likelier), and the likeliest tokens with theirs, likeliest first."""

    token_id: int
    logprob: float
    rank: int
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """New tokens of one sequence; `error_code` is a gRPC status name, set with ERROR only.
    `logprobs` has one entry per token where they were asked for, else none. num_cached_tokens,
    with the first token: those of the prompt that were not computed again. queued_us, with the
    first token: from its coming to its first step. go_elsewhere, with ERROR: attention.proto.
    prompt_logprobs, where asked for: with the first token, or with the end where there is none.
    parked, with PARKED: what has been kept of it."""

    sequence_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    error_code: str = ""
    error: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached_tokens: int = 0
    queued_us: int | None = None
    go_elsewhere: bool = False
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    parked: ParkedKv | None = None


@dataclass(frozen=True, slots=True)
class StepOutput:
    step: int
    outputs: tuple[SequenceOutput, ...]
