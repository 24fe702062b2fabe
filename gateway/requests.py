"""What a generation request is inside the gateway, whoever brought it in.

Knows the fields of design section 8. Knows neither protobuf nor HTTP, and checks nothing:
admission.py does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.callers import ANONYMOUS, Caller
from moe_core.parked_kv import KvSource


@dataclass(frozen=True, slots=True)
class Sampling:
    """As the client said it: None is a field that was left out."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int | None = None
    n: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """`prompt` is text or token ids; an empty request_id or model stands for "any". traceparent is
    the client's W3C header, as it came. resume_from: of a request whose gateway was lost, how many
    tokens of each choice its client has; None for any other request. admitted: its first choice,
    where admission has seen it already."""

    request_id: str
    model: str
    prompt: str | tuple[int, ...] | None
    sampling: Sampling
    priority: int = 0
    caller: Caller = ANONYMOUS
    traceparent: str = ""
    resume_from: tuple[int, ...] | None = None
    admitted: "Sequence | None" = None


@dataclass(frozen=True, slots=True)
class Sequence:
    """One choice of a request that was admitted, with every default filled in: what an engine is
    told, and the stop strings, which stay with the gateway. traceparent: of the span that its work
    belongs to, or nothing. output_ids: what another group has generated of it already. owner: whose
    it is, as Caller.tag. kv_source: who has keys and values of its first tokens."""

    request_id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop_token_ids: tuple[int, ...]  # end-of-sequence ids included unless ignored
    min_tokens: int
    stop: tuple[str, ...]
    priority: int
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    index: int = 0
    traceparent: str = ""
    output_ids: tuple[int, ...] = ()
    owner: str = ANONYMOUS.tag
    kv_source: KvSource | None = None

    @property
    def sequence_id(self) -> str:
        """The same at every gateway, and no other caller's."""
        return f"{self.owner}/{self.request_id}/{self.index}"

    @property
    def num_tokens(self) -> int:
        """The most tokens whose keys and values it ever holds: the last output is not computed."""
        return len(self.prompt_ids) + max(1, self.max_tokens) - 1


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one choice. cached_tokens: of the prompt's, those whose keys and values were there."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """What the model thought of one token: see logprobs.proto."""

    token_id: int
    logprob: float
    rank: int
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(slots=True)  # not frozen, which would cost each token a microsecond more
class Chunk:
    """New tokens and new text of one choice; the last one has finish_reason and usage. logprobs
    has one entry per token where they were asked for, else none; prompt_logprobs, on the first
    chunk and where asked for, one for each token of the prompt but the first."""

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str = ""
    usage: Usage | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
