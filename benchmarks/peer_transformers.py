"""transformers.generate decoding what its parent asks for; see child.py.

Started by peers.py. Knows the kernels that transformers has for experts, and two dtypes: on a CPU
without bfloat16 units the same weights are faster in float32.

    {"kind": "float32 grouped_mm", "batch": 16, "prompt_tokens": 128, "num_tokens": 16}
"""

import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from child import asked, say
from decode_rate import random_prompts

KERNELS = ("eager", "batched_mm", "grouped_mm")
DTYPES = ("bfloat16", "float32")


class Times(StoppingCriteria):
    """Notes when each token of the batch was there, and stops nothing."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: object,
        **_: Any,  # noqa: ANN401
    ) -> torch.Tensor:
        self.seen.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def decode(
    model: Any,  # noqa: ANN401
    vocab_size: int,
    batch: int,
    prompt_tokens: int,
    num_tokens: int,
) -> float:
    """Decode tokens/s of `batch` greedy sequences, from the first token of all to the last."""
    prompts = torch.tensor(random_prompts(batch, prompt_tokens, vocab_size))
    times = Times()
    model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        stopping_criteria=StoppingCriteriaList([times]),
        pad_token_id=0,
    )
    return batch * (len(times.seen) - 1) / (times.seen[-1] - times.seen[0])


def main(directory: str) -> None:
    logging.disable_progress_bar()
    loaded, model = "", None
    say(kinds=[f"{dtype} {kernel}" for dtype in DTYPES for kernel in KERNELS])
    for work in asked():
        dtype, kernel = work.pop("kind").split()
        if dtype != loaded:  # one at a time: all sides share the memory
            loaded, model = dtype, None
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
            model.eval()
        model.set_experts_implementation(kernel)
        with torch.inference_mode():
            say(tokens_per_s=decode(model, model.config.vocab_size, **work))


if __name__ == "__main__":
    main(sys.argv[1])
