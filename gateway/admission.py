"""Which requests are let in, and what their defaults become.

Knows the model's limits and the largest KV pool. Every refusal is a RequestError that names the
field, its value and the rule, before the request has cost anything. Knows no engine.
"""

import secrets
from dataclasses import dataclass

from gateway.requests import GenerationRequest, Sampling, Sequence
from gateway.tokenizer import TextTokenizer
from moe_core.config.model import ModelConfig
from moe_core.errors import NotFoundError, RequestError

MAX_SEED = 2**64 - 1
# The engine's numbers are float32: what rounds to 0 or to infinity there is refused as such here.
LEAST_FLOAT32, MOST_FLOAT32 = 2.0**-149, (2 - 2**-23) * 2.0**127
MAX_STOP_STRINGS = 16
MAX_REQUEST_ID = 256
MAX_STOP_LENGTH = 1_000
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1_024
MAX_CHOICES = 64
MAX_TOP_LOGPROBS = 20
QUICK_PROMPT_IDS = 8_192  # so many are checked within a millisecond
MAX_PROMPT_LOGPROBS = 2**19  # numbers told of a prompt, of all choices together


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model under the name that requests use. Without a tokenizer prompts are token ids."""

    name: str
    config: ModelConfig
    tokenizer: TextTokenizer | None

    @property
    def max_model_len(self) -> int:
        return self.config.max_position_embeddings


def admit(request: GenerationRequest, model: ServedModel, kv_tokens: int) -> Sequence:
    """The sequence that `request`, which has an id, asks for, where the largest KV pool holds
    `kv_tokens`.

    Raises RequestError, or NotFoundError for another model's name.
    """
    if request.model and request.model != model.name:
        raise NotFoundError(f"model={request.model!r}: this cluster serves {model.name!r}")
    if len(request.request_id) > MAX_REQUEST_ID:
        raise RequestError(f"request_id: must have at most {MAX_REQUEST_ID} characters")
    sampling = request.sampling
    _check_numbers(sampling)
    _check_tokens(sampling, model)
    _check_stop_strings(sampling.stop, model)
    prompt_ids = _prompt_ids(request.prompt, model)
    room = _room(len(prompt_ids), model, kv_tokens)
    max_tokens = _max_tokens(sampling, len(prompt_ids), room)
    _check_prompt_logprobs(sampling, len(prompt_ids))
    for token_id in (min(prompt_ids), max(prompt_ids)):
        _require_token("token_ids", token_id, model)
    return Sequence(
        request_id=request.request_id,
        prompt_ids=prompt_ids,
        max_tokens=max_tokens,
        temperature=_or(sampling.temperature, 1.0),
        top_p=_or(sampling.top_p, 1.0),
        # A client's number may be wider than the engine's; all of the vocabulary is all there is.
        top_k=min(sampling.top_k or 0, model.config.vocab_size),
        min_p=_or(sampling.min_p, 0.0),
        seed=secrets.randbits(64) if sampling.seed is None else sampling.seed,
        stop_token_ids=_stop_token_ids(sampling, model),
        min_tokens=_min_tokens(sampling.min_tokens, max_tokens),
        stop=sampling.stop,
        priority=request.priority,
        repetition_penalty=_or(sampling.repetition_penalty, 1.0),
        presence_penalty=_or(sampling.presence_penalty, 0.0),
        frequency_penalty=_or(sampling.frequency_penalty, 0.0),
        logit_bias=sampling.logit_bias,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        owner=request.caller.tag,
    )


def check_sizes(
    model: ServedModel,
    *,
    prompt_tokens: int,
    stop: int,
    stop_token_ids: int,
    logit_bias: int,
    resume_from: int = 0,
) -> None:
    """The counts in a client's message, before any of it is copied: a message of 64 MiB may hold
    tens of millions. `admit` has the same limits. Raises RequestError."""
    if prompt_tokens >= model.max_model_len:
        raise _no_room(prompt_tokens, _model_limit(model))
    _require_at_most("stop", stop, MAX_STOP_STRINGS, "strings")
    _require_at_most("stop_token_ids", stop_token_ids, MAX_STOP_TOKEN_IDS, "ids")
    _require_at_most("logit_bias", logit_bias, MAX_LOGIT_BIAS, "tokens")
    _require_at_most("resume_from", resume_from, MAX_CHOICES, "counts")


def check_choices(n: int | None) -> None:
    """For whoever makes something for each choice before the request is admitted. Raises
    RequestError."""
    _require_number("n", n, 1, MAX_CHOICES)


def _model_limit(model: ServedModel) -> str:
    return f"max_position_embeddings={model.max_model_len}"


def _no_room(prompt_tokens: int, limit: str) -> RequestError:
    return RequestError(f"prompt: {prompt_tokens} tokens leave no room for output in {limit}")


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _check_numbers(sampling: Sampling) -> None:
    _require_number("temperature", sampling.temperature, 0.0, MOST_FLOAT32)
    _require_number("min_p", sampling.min_p, 0.0, 1.0)
    _require_number("top_p", sampling.top_p, 0.0, 1.0)
    _require_number("repetition_penalty", sampling.repetition_penalty, 0.0, MOST_FLOAT32)
    _require_number("presence_penalty", sampling.presence_penalty, -2.0, 2.0)
    _require_number("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)
    _require_number("logprobs", sampling.logprobs, 0, MAX_TOP_LOGPROBS)
    _require_number("prompt_logprobs", sampling.prompt_logprobs, 0, MAX_TOP_LOGPROBS)
    check_choices(sampling.n)
    _require_not_zero(
        "top_p", sampling.top_p, "must be above 0 and at most 1; for greedy set temperature=0"
    )
    _require_not_zero(
        "repetition_penalty", sampling.repetition_penalty, "must be above 0; 1 switches it off"
    )
    if sampling.top_k is not None and sampling.top_k < 0:
        raise RequestError(f"top_k={sampling.top_k}: must be at least 0, which switches it off")
    if sampling.seed is not None and not 0 <= sampling.seed <= MAX_SEED:
        raise RequestError(f"seed={sampling.seed}: must be from 0 to {MAX_SEED}")


def _check_tokens(sampling: Sampling, model: ServedModel) -> None:
    _require_at_most("stop_token_ids", len(sampling.stop_token_ids), MAX_STOP_TOKEN_IDS, "ids")
    for token_id in sampling.stop_token_ids:
        _require_token("stop_token_ids", token_id, model)
    _require_at_most("logit_bias", len(sampling.logit_bias), MAX_LOGIT_BIAS, "tokens")
    for token_id, bias in sampling.logit_bias.items():
        _require_token("logit_bias", token_id, model)
        _require_number(f"logit_bias[{token_id}]", bias, -100.0, 100.0)


def _check_stop_strings(strings: tuple[str, ...], model: ServedModel) -> None:
    if strings and model.tokenizer is None:
        raise RequestError("stop: this model has no tokenizer; use stop_token_ids")
    _require_at_most("stop", len(strings), MAX_STOP_STRINGS, "strings")
    for string in strings:
        if not string:
            raise RequestError("stop: an empty string would stop everything")
        _require_at_most("stop", len(string), MAX_STOP_LENGTH, "characters in a string")


def _require_at_most(field: str, count: int, most: int, what: str) -> None:
    if count > most:
        raise RequestError(f"{field}: at most {most} {what}, not {count}")


def _require_number(field: str, value: float | None, least: float, most: float) -> None:
    if value is None:
        return
    if not least <= value <= most:
        shown = f"{value:g}" if isinstance(value, float) else value
        rule = f"must be a number of at least {least:g} and at most {most:g}"
        raise RequestError(f"{field}={shown}: {rule}")


def _require_not_zero(field: str, value: float | None, rule: str) -> None:
    if value is not None and value < LEAST_FLOAT32:
        raise RequestError(f"{field}={value:g}: {rule}")


def _require_token(field: str, token_id: int, model: ServedModel) -> None:
    if not 0 <= token_id < model.config.vocab_size:
        most = model.config.vocab_size - 1
        raise RequestError(f"{field}: token id {token_id} must be from 0 to {most}")


def _prompt_ids(prompt: str | tuple[int, ...] | None, model: ServedModel) -> tuple[int, ...]:
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise RequestError("text: this model has no tokenizer.json; send token_ids")
        require_short_text("text", prompt, model.max_model_len, model.tokenizer.longest_token)
        prompt = model.tokenizer.encode(prompt)
    if not prompt:
        raise RequestError("prompt: must have at least one token; send text or token_ids")
    return prompt


def require_short_text(field: str, text: str, max_model_len: int, longest_token: int) -> None:
    """Before the text is cut into tokens, which costs far more than to count its characters."""
    most = max_model_len * longest_token
    if len(text) > most:
        raise RequestError(
            f"{field}: has {len(text)} characters; the model takes at most {max_model_len} tokens "
            f"(max_position_embeddings), and as none has more than {longest_token} characters, no "
            f"text of more than {most} can fit"
        )


def _room(prompt_tokens: int, model: ServedModel, kv_tokens: int) -> tuple[int, str]:
    """How many tokens may follow the prompt, and the limit that says so. The last of them needs
    no place in the KV pool. A prompt too long for both is told of the model's limit, which no
    setting moves."""
    limits = (
        (model.max_model_len - prompt_tokens, _model_limit(model)),
        (kv_tokens + 1 - prompt_tokens, f"the largest KV pool, of {kv_tokens} tokens"),
    )
    for left, limit in limits:
        if left < 1:
            raise _no_room(prompt_tokens, limit)
    return min(limits)


def _max_tokens(sampling: Sampling, prompt_tokens: int, room: tuple[int, str]) -> int:
    asked, (left, limit) = sampling.max_tokens, room
    if asked is None:
        return left
    if asked == 0 and sampling.prompt_logprobs is None:
        raise RequestError("max_tokens=0: must be at least 1, unless prompt_logprobs are asked for")
    if asked > left:
        raise RequestError(
            f"max_tokens={asked}: with {prompt_tokens} prompt tokens it exceeds {limit}; "
            f"at most {left} fit"
        )
    return asked


def _check_prompt_logprobs(sampling: Sampling, prompt_tokens: int) -> None:
    """Before they are computed: they are held until the prompt is through."""
    if sampling.prompt_logprobs is None:
        return
    numbers = (sampling.n or 1) * prompt_tokens * (1 + sampling.prompt_logprobs)
    if numbers > MAX_PROMPT_LOGPROBS:
        raise RequestError(
            f"prompt_logprobs={sampling.prompt_logprobs}: for {prompt_tokens} prompt tokens and "
            f"n={sampling.n or 1} makes {numbers} numbers; at most {MAX_PROMPT_LOGPROBS} are told"
        )


def _min_tokens(asked: int | None, max_tokens: int) -> int:
    if asked is not None and asked > max_tokens:
        raise RequestError(f"min_tokens={asked}: must be at most max_tokens={max_tokens}")
    return asked or 0


def _stop_token_ids(sampling: Sampling, model: ServedModel) -> tuple[int, ...]:
    eos = () if sampling.ignore_eos else model.config.eos_token_ids
    return tuple(sorted({*sampling.stop_token_ids, *eos}))
