"""The requests of a chaos run: drawn from a seed, of all kinds that the invariant speaks of.

Knows what the gateway accepts. Sends nothing.
"""

import random
from dataclasses import dataclass

from epserve.client import Model
from epserve.generate_messages import Sampling
from moe_core.errors import ConfigError

LONGEST_PROMPT = 128


@dataclass(frozen=True, slots=True)
class ChaosRequest:
    """`key` is its place in the set; what it is answered with depends on nothing but the rest."""

    key: int
    prompt: tuple[int, ...]
    sampling: Sampling

    @property
    def num_choices(self) -> int:
        return self.sampling.n or 1


def draw_requests(model: Model, count: int, max_tokens: int, seed: int) -> tuple[ChaosRequest, ...]:
    """Greedy and seeded, one choice and two, with and without penalties, of mixed lengths. Raises
    ConfigError where the model's context has no room for max_tokens."""
    if max_tokens >= model.max_model_len:
        rule = f"leaves no room for a prompt in the model's {model.max_model_len} tokens"
        raise ConfigError("max_tokens", max_tokens, rule, [model.max_model_len // 2])
    drawn = random.Random(seed)
    return tuple(_draw(drawn, key, model, max_tokens) for key in range(count))


def _draw(drawn: random.Random, key: int, model: Model, max_tokens: int) -> ChaosRequest:
    longest = min(LONGEST_PROMPT, model.max_model_len - max_tokens)
    length = drawn.randint(1, longest)
    prompt = tuple(drawn.randrange(model.vocab_size) for _ in range(length))
    most = drawn.randint(max(1, max_tokens // 2), max_tokens)
    n = 2 if key % 4 == 3 else 1
    if key % 2 == 0:
        return ChaosRequest(key, prompt, Sampling(max_tokens=most, temperature=0.0, n=n))
    sampling = Sampling(
        max_tokens=most,
        temperature=drawn.choice((0.7, 1.0, 1.3)),
        top_p=drawn.choice((None, 0.9)),
        seed=drawn.randrange(2**32),
        presence_penalty=drawn.choice((None, 0.5)),
        min_tokens=drawn.choice((None, most // 2)),
        ignore_eos=drawn.random() < 0.5,
        n=n,
    )
    return ChaosRequest(key, prompt, sampling)
