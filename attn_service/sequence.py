"""What the engine knows of one sequence, and the plain values its parts exchange.

Knows tokens, sampling settings, computed-token counts and block tables. Knows nothing of
scheduling rules, tensors or messages on the wire.
"""

from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; every default has been filled by the gateway.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. `index` tells the choices of
    one request apart, so that they share a seed and still differ.
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


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    sequence_id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling

    @property
    def max_computed_tokens(self) -> int:
        """Tokens whose keys and values are ever stored: the last output is never computed."""
        return len(self.prompt_ids) + self.sampling.max_tokens - 1


@dataclass(eq=False, slots=True)
class Sequence:
    """A sequence under way. Prompt and outputs form one row of tokens, of which the first
    `num_computed_tokens` have their keys and values in the cache."""

    request: SequenceRequest
    token_ids: list[int] = field(init=False)
    num_computed_tokens: int = 0
    block_table: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_pending_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)

    def append(self, token_id: int) -> FinishReason | None:
        """Take the next token; the reason why it is the last one, if it is."""
        self.token_ids.append(token_id)
        if token_id in self.request.sampling.stop_token_ids:
            return FinishReason.STOP
        if self.num_output_tokens >= self.request.sampling.max_tokens:
            return FinishReason.LENGTH
        return None


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """The tokens of one sequence that one step computes."""

    token_ids: tuple[int, ...]
    num_computed_tokens: int
    block_table: tuple[int, ...]
    needs_logits: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, as every rank of an attention group executes it."""

    step: int
    placement_epoch: int
    slices: tuple[SequenceSlice, ...]


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """New tokens of one sequence; `error_code` is a gRPC status name, set with ERROR only."""

    sequence_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    error_code: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class StepOutput:
    step: int
    outputs: tuple[SequenceOutput, ...]
