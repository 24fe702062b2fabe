"""Every refusal names the field and the rule; every default is filled in. What is plainly wrong is
asked of a whole cluster, in tests/e2e/test_bad_input.py."""

from typing import Any

import pytest

from gateway import admission
from gateway.admission import ServedModel, admit, check_sizes
from gateway.requests import GenerationRequest, Sampling, Sequence
from moe_core.errors import RequestError
from support.moe_configs import moe_model
from support.words import WORDS, word_tokenizer

MODEL = ServedModel("small", moe_model(), word_tokenizer())
WITHOUT_TOKENIZER = ServedModel("small", moe_model(), None)
KV_TOKENS = 96


def admitted(
    prompt: str | tuple[int, ...] | None = (5, 6),
    model: ServedModel = MODEL,
    kv_tokens: int = KV_TOKENS,
    **sampling: object,
) -> Sequence:
    request = GenerationRequest("", "", prompt, Sampling(**sampling))
    return admit(request, model, kv_tokens)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"top_p": 0.0}, "top_p=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"prompt_logprobs": 21}, "prompt_logprobs=21"),
        ({"max_tokens": 96}, "max_tokens=96: with 2 prompt tokens.*KV pool, of 96.*at most 95"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5"),
        ({"stop": ("",)}, "stop"),
        ({"stop": ("x",) * 17}, "stop: at most 16"),
        ({"stop_token_ids": (64,)}, "stop_token_ids: token id 64 must be from 0 to 63"),
        ({"stop": ("x" * 1001,)}, "stop: at most 1000 characters in a string, not 1001"),
        ({"stop_token_ids": (5,) * 257}, "stop_token_ids: at most 256 ids, not 257"),
        ({"n": 0}, "n=0: must be a number of at least 1 and at most 64"),
        ({"n": 65}, "n=65: must be"),
        ({"n": 2**32 - 1}, "n=4294967295: must be"),
        ({"logprobs": 21}, "logprobs=21: must be a number of at least 0 and at most 20"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0: must be above 0"),
        ({"presence_penalty": 2.5}, "presence_penalty=2.5: must be .* -2 and at most 2"),
        ({"frequency_penalty": -2.5}, "frequency_penalty=-2.5"),
        ({"logit_bias": {64: 1.0}}, "logit_bias: token id 64 must be from 0 to 63"),
        ({"logit_bias": {3: 101.0}}, r"logit_bias\[3\]=101: must be .* -100 and at most 100"),
        ({"logit_bias": dict.fromkeys(range(1025), 0.0)}, "logit_bias: at most 1024 tokens"),
    ],
)
def test_bad_sampling_value_is_refused_by_name(sampling: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        admitted(**sampling)


def test_longest_prompt_leaves_one_token() -> None:
    assert admitted((5,) * 127, kv_tokens=1000).max_tokens == 1
    assert admitted((5,) * 96).max_tokens == 1


def test_logprobs_of_a_prompt_are_limited_over_all_its_choices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission, "MAX_PROMPT_LOGPROBS", 40)
    assert admitted((5,) * 10, n=2, prompt_logprobs=1, max_tokens=0).max_tokens == 0
    rule = "prompt_logprobs=1: for 10 prompt tokens and n=3 makes 60 numbers; at most 40"
    with pytest.raises(RequestError, match=rule):
        admitted((5,) * 10, n=3, prompt_logprobs=1)


@pytest.mark.parametrize("priority", [-(2**31), 0, 3])
def test_priority_is_passed_on(priority: int) -> None:
    request = GenerationRequest("", "", (5,), Sampling(), priority=priority)
    assert admit(request, MODEL, KV_TOKENS).priority == priority


def test_a_top_k_beyond_the_vocabulary_keeps_all_of_it() -> None:
    assert admitted(top_k=2**32 - 1).top_k == MODEL.config.vocab_size


def test_text_and_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(RequestError, match=r"text: .*no tokenizer\.json"):
        admitted("hello", WITHOUT_TOKENIZER)
    with pytest.raises(RequestError, match=r"stop: .*no tokenizer"):
        admitted((5,), WITHOUT_TOKENIZER, stop=("x",))


def test_text_becomes_token_ids() -> None:
    assert admitted(f"{WORDS[9]} {WORDS[4]}").prompt_ids == (9, 4)


def test_every_field_reaches_the_engines_sequence() -> None:
    given: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "seed": 3,
        "stop": ("x",),
        "repetition_penalty": 1.5,
        "presence_penalty": -2.0,
        "frequency_penalty": 2.0,
        "logit_bias": {3: -100.0, 63: 100.0},
        "logprobs": 20,
        "prompt_logprobs": 20,
        "min_tokens": 4,
        "max_tokens": 9,
    }
    sequence = admitted(n=64, **given)
    assert {name: getattr(sequence, name) for name in given} == given


def test_fields_that_are_left_out_leave_the_logits_alone() -> None:
    sequence = admitted()
    assert sequence.repetition_penalty == 1.0
    assert (sequence.presence_penalty, sequence.frequency_penalty) == (0.0, 0.0)
    assert (sequence.logit_bias, sequence.logprobs, sequence.min_tokens) == ({}, None, 0)


def test_eos_stops_unless_it_is_ignored() -> None:
    assert admitted(stop_token_ids=(9, 3)).stop_token_ids == (1, 3, 9)
    assert admitted(ignore_eos=True).stop_token_ids == ()


def test_missing_seed_is_drawn_and_a_given_one_kept() -> None:
    assert admitted().seed != admitted().seed
    assert admitted(seed=0).seed == 0


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"prompt_tokens": MODEL.max_model_len}, "prompt: .* max_position_embeddings="),
        ({"stop": 17}, "stop: at most 16 strings, not 17"),
        ({"stop_token_ids": 257}, "stop_token_ids: at most 256"),
        ({"logit_bias": 1025}, "logit_bias: at most 1024"),
    ],
)
def test_counts_are_refused_before_anything_is_copied(counts: dict[str, int], message: str) -> None:
    fine = {"prompt_tokens": 1, "stop": 16, "stop_token_ids": 256, "logit_bias": 1024}
    check_sizes(MODEL, **fine)
    with pytest.raises(RequestError, match=message):
        check_sizes(MODEL, **{**fine, **counts})
