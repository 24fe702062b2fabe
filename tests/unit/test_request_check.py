"""What an engine refuses by itself, whatever gateway sent it."""

from dataclasses import replace

import pytest

from attn_service.request_check import check_request
from attn_service.sequence import Sampling, SequenceRequest
from moe_core.errors import RequestError

VOCAB = 32
GOOD = SequenceRequest("s", (1, 31), Sampling(max_tokens=4), output_ids=(2, 3, 4))
NAN, INF = float("nan"), float("inf")


def test_what_is_right_passes() -> None:
    check_request(GOOD, VOCAB)
    sampling = Sampling(
        max_tokens=4,
        temperature=2.0,
        top_p=0.5,
        stop_token_ids=frozenset({31}),
        repetition_penalty=1.5,
        logit_bias=((0, -100.0),),
        logprobs=20,
    )
    check_request(replace(GOOD, sampling=sampling), VOCAB)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": (1, 32)}, "prompt_ids: token id 32 is outside the vocabulary of 32"),
        ({"output_ids": (32,)}, "output_ids: token id 32"),
        ({"output_ids": (1, 2, 3, 4)}, "output_ids: 4 tokens .* max_tokens=4 leaves none"),
    ],
)
def test_a_wrong_token_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_request(replace(GOOD, **changes), VOCAB)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop_token_ids": frozenset({40})}, "stop_token_ids: token id 40"),
        ({"logit_bias": ((40, 1.0),)}, "logit_bias: token id 40"),
        ({"logit_bias": ((4, NAN),)}, "logit_bias=nan"),
        ({"temperature": NAN}, "temperature=nan"),
        ({"temperature": INF}, "temperature=inf"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"top_p": NAN}, "top_p=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0"),
        ({"repetition_penalty": NAN}, "repetition_penalty=nan"),
        ({"presence_penalty": NAN}, "presence_penalty=nan"),
        ({"frequency_penalty": -INF}, "frequency_penalty=-inf"),
        ({"logprobs": 21}, "logprobs=21: must be at most 20"),
        ({"prompt_logprobs": 21}, "prompt_logprobs=21: must be at most 20"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_request(replace(GOOD, sampling=replace(GOOD.sampling, **changes)), VOCAB)
