"""Sampling settings of which every field differs from its default and survives any wire."""

from epserve.generate_messages import Sampling

FULL_SAMPLING = Sampling(
    max_tokens=9,
    temperature=0.5,
    top_p=0.25,
    top_k=3,
    min_p=0.125,
    seed=7,
    stop=("END",),
    stop_token_ids=(4, 5),
    ignore_eos=True,
    repetition_penalty=1.5,
    presence_penalty=-2.0,
    frequency_penalty=2.0,
    logprobs=20,
    logit_bias={3: 1.0, 15: -2.5},
    min_tokens=2,
    n=2,
    prompt_logprobs=3,
)
