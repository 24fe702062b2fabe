"""A generation as the client's callers see it, plain values, and the messages that carry it.

Knows the messages of Gateway.Generate; knows no channel and no call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from google.protobuf.message import Message

from moe_core.errors import RequestError
from moe_core.pb.epserve.v1 import gateway_pb2, logprobs_pb2


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. What is None takes the gateway's default."""

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
class Usage:
    """Of one choice. cached_tokens: of the prompt's, those that were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token's logarithmic probability by the model alone, its rank (1: none is likelier), and
    the likeliest tokens with theirs, likeliest first."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Output:
    """What one choice gained since its last output. `finish_reason` is empty while it runs, and
    `usage` is there on its last output only. `logprobs` has one entry per token where they were
    asked for, else none; `prompt_logprobs`, on the first output and where asked for, one for each
    token of the prompt but the first."""

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    usage: Usage | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


def request_message(
    prompt: str | Sequence[int],
    sampling: Sampling | None,
    model: str,
    request_id: str,
    resume_from: Sequence[int],
) -> gateway_pb2.GenerateRequest:
    """Raises RequestError for what the wire cannot carry."""
    request = gateway_pb2.GenerateRequest(
        request_id=request_id,
        model=model,
        sampling=_sampling_message(sampling or Sampling()),
        resume_from=resume_from,
    )
    if isinstance(prompt, str):
        request.text = _utf8(prompt)
    else:
        request.token_ids.CopyFrom(_token_ids(prompt))
    return request


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"text: is not valid Unicode: {error}") from None
    return text


def _token_ids(prompt: Sequence[int]) -> gateway_pb2.TokenIds:
    try:
        return gateway_pb2.TokenIds(ids=prompt)
    except ValueError as error:
        rule = _range_words(gateway_pb2.TokenIds(), "ids")
        raise RequestError(f"token_ids: {rule} ({error})") from None


def _sampling_message(sampling: Sampling) -> gateway_pb2.SamplingParams:
    """The fields have the same names; one that is None is left out. Raises RequestError for a
    number that the wire cannot carry; what is sensible is the gateway's to say."""
    message = gateway_pb2.SamplingParams()
    for name, value in asdict(sampling).items():
        try:
            message.MergeFrom(gateway_pb2.SamplingParams(**{name: value}))
        except UnicodeEncodeError as error:
            raise RequestError(f"{name}: is not valid Unicode: {error}") from None
        except ValueError:
            rule = _range_words(message, name)
            raise RequestError(f"{name}={value}: {rule}") from None
    return message


def _range_words(message: Message, name: str) -> str:
    """What the wire can carry in a field of whole numbers, or in the keys of a map of them."""
    field = message.DESCRIPTOR.fields_by_name[name]
    if field.message_type is not None:
        field = field.message_type.fields_by_name["key"]
    bits = 64 if field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64) else 32
    signed = field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return f"must be from {low} to {high}"


def output_of(response: gateway_pb2.GenerateResponse) -> Output:
    usage = None
    if response.HasField("usage"):
        told = response.usage
        usage = Usage(told.prompt_tokens, told.completion_tokens, told.cached_tokens)
    return Output(
        response.request_id,
        response.index,
        tuple(response.token_ids),
        response.text,
        response.finish_reason,
        usage,
        tuple(map(_logprobs, response.logprobs)),
        tuple(map(_logprobs, response.prompt_logprobs)),
    )


def _logprobs(told: logprobs_pb2.TokenLogprobs) -> TokenLogprobs:
    top = tuple(zip(told.top_token_ids, told.top_logprobs, strict=True))
    return TokenLogprobs(told.token_id, told.logprob, told.rank, top)
