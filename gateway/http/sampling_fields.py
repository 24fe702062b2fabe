"""The fields that completions and chat share, and how they become a Sampling.

Knows names, types and which of OpenAI's and vLLM's fields are not served: those that would
change the output are refused by name, unless their value asks for nothing. Ranges are
admission's business.
"""

from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator, Field

from gateway.admission import check_choices
from gateway.http.answer import Streaming
from gateway.http.body import Body
from gateway.requests import Sampling
from moe_core.errors import RequestError

SEED_BITS = 64
Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
# Not a union, whose errors would name its members.
Texts = Annotated[
    list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]
# Values that ask for nothing, by field; None always does.
NOT_SERVED: Mapping[str, tuple[object, ...]] = {
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "ebnf": (),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "json_schema": (),
    "length_penalty": (1, 1.0),
    "logprob_token_ids": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "regex": (),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_regex": (),
    "structural_tag": (),
    "structured_outputs": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}


def refuse_unserved(values: Mapping[str, object]) -> None:
    """Raises RequestError for a field that would change the output and that nothing here reads."""
    for name in NOT_SERVED.keys() & values.keys():
        if values[name] is not None and values[name] not in NOT_SERVED[name]:
            raise RequestError(f"{name}: is not supported by this server; leave it out")


class StreamOptions(Body):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


def check_shared(body: "GenerationBody") -> None:
    """Before anything is made of the body. Raises RequestError."""
    check_choices(body.n)
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options: needs stream=true")


class GenerationBody(Body):
    """None is a field that was left out, as for OpenAI."""

    model: str | None = None
    n: Int32 | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Texts | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    # vLLM's names.
    top_k: Int32 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop_token_ids: list[Int32] | None = None
    ignore_eos: bool | None = False
    priority: Int32 | None = 0
    return_token_ids: bool | None = False
    return_tokens_as_token_ids: bool | None = False

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def streaming(self) -> Streaming | None:
        if not self.stream:
            return None
        options = self.stream_options or StreamOptions()
        at_end = bool(options.include_usage)
        return Streaming(at_end, at_end and bool(options.continuous_usage_stats))

    @property
    def shows_usage(self) -> bool:
        """Whether events have a usage, null where it is not told."""
        return self.streaming is not None and self.streaming.usage_at_end

    def to_sampling(self, max_tokens: int | None, logprobs: int | None) -> Sampling:
        """Raises RequestError for a logit_bias whose key is no token id."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=0 if self.top_k == -1 else self.top_k,  # vLLM's other "off"
            min_p=self.min_p,
            seed=None if self.seed is None else self.seed % 2**SEED_BITS,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logprobs=logprobs,
            logit_bias=_logit_bias(self.logit_bias or {}),
            min_tokens=self.min_tokens,
            n=self.n,
        )


def _logit_bias(biases: Mapping[str, float]) -> dict[int, float]:
    for key in biases:
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise RequestError(f"logit_bias: the key {key[:20]!r} must be a token id, as in '15'")
    return {int(key): bias for key, bias in biases.items()}
