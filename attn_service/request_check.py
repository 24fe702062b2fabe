"""What an engine takes from a gateway, checked before it costs anything.

The gateway has told the client already what is wrong with a request (gateway/admission.py); this
is about one that another gateway let through, which must not reach the sampler, where it would
end every sequence of the step. Knows one request and the vocabulary's size; whether the sequence
fits is the scheduler's to say.
"""

import math
from collections.abc import Iterable

from attn_service.sequence import Sampling, SequenceRequest
from moe_core.errors import RequestError

MAX_TOP_LOGPROBS = 20


def check_request(request: SequenceRequest, vocab_size: int) -> None:
    """Raises RequestError naming field, value and rule."""
    sampling = request.sampling
    _check_tokens("prompt_ids", request.prompt_ids, vocab_size)
    _check_tokens("output_ids", request.output_ids, vocab_size)
    _check_tokens("stop_token_ids", sampling.stop_token_ids, vocab_size)
    _check_tokens("logit_bias", (token for token, _ in sampling.logit_bias), vocab_size)
    _check_numbers(sampling)
    if len(request.output_ids) >= sampling.max_tokens > 0:
        raise RequestError(
            f"output_ids: {len(request.output_ids)} tokens have been generated already, "
            f"and max_tokens={sampling.max_tokens} leaves none to generate"
        )
    for field in ("logprobs", "prompt_logprobs"):
        count = getattr(sampling, field)
        if count is not None and count > MAX_TOP_LOGPROBS:
            raise RequestError(f"{field}={count}: must be at most {MAX_TOP_LOGPROBS}")


def _check_tokens(field: str, token_ids: Iterable[int], vocab_size: int) -> None:
    wrong = next((token for token in token_ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise RequestError(f"{field}: token id {wrong} is outside the vocabulary of {vocab_size}")


def _check_numbers(s: Sampling) -> None:
    """NaN fails every comparison, and so is refused."""
    rules: list[tuple[str, float, bool, str]] = [
        ("temperature", s.temperature, s.temperature >= 0, " of at least 0"),
        ("top_p", s.top_p, 0 < s.top_p <= 1, " above 0 and at most 1"),
        ("top_k", s.top_k, s.top_k >= 0, " of at least 0"),
        ("min_p", s.min_p, 0 <= s.min_p <= 1, " from 0 to 1"),
        ("repetition_penalty", s.repetition_penalty, s.repetition_penalty > 0, " above 0"),
        ("presence_penalty", s.presence_penalty, True, ""),
        ("frequency_penalty", s.frequency_penalty, True, ""),
        *(("logit_bias", bias, True, "") for _, bias in s.logit_bias),
    ]
    for field, value, holds, rule in rules:
        if not holds or not math.isfinite(value):
            raise RequestError(f"{field}={value:g}: must be a finite number{rule}")
