"""What a generation request is inside the gateway, whoever brought it in.

Knows the fields of design section 8. Knows neither protobuf nor HTTP, and checks nothing:
admission.py does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


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


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """`prompt` is text or token ids; an empty request_id or model stands for "any"."""

    request_id: str
    model: str
    prompt: str | tuple[int, ...] | None
    sampling: Sampling
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Sequence:
    """A request that was admitted, with every default filled in: what an engine is told, and
    the stop strings, which stay with the gateway."""

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
    index: int = 0

    @property
    def num_tokens(self) -> int:
        """The most tokens whose keys and values it ever holds: the last output is not computed."""
        return len(self.prompt_ids) + self.max_tokens - 1


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens and new text of one sequence; the last one has finish_reason and usage."""

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str = ""
    usage: Usage | None = None
