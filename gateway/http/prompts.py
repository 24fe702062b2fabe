"""From what a client sends as a prompt to token ids, and the text that `echo` gives back.

Knows the tokenizer's limits and the four forms of a completion's prompt. Cutting text into tokens
takes long for long texts, so that runs beside the event loop.
"""

import asyncio
from dataclasses import dataclass
from functools import partial

from gateway.admission import QUICK_PROMPT_IDS, ServedModel, require_short_text
from gateway.tokenizer import TextTokenizer
from moe_core.errors import RequestError

MAX_PROMPTS = 1_024


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text` is empty where the model has no tokenizer, and where nobody asked for it."""

    token_ids: tuple[int, ...]
    text: str


async def prompts_of(
    value: object, model: ServedModel, *, add_special_tokens: bool = True, echo: bool = False
) -> list[Prompt]:
    """As read_prompts, beside the event loop unless it is quickly done."""
    read = partial(read_prompts, value, model, add_special_tokens=add_special_tokens, echo=echo)
    if isinstance(value, list) and len(value) <= QUICK_PROMPT_IDS and _is_tokens(value):
        return read()
    return await asyncio.to_thread(read)


def read_prompts(
    value: object, model: ServedModel, *, add_special_tokens: bool = True, echo: bool = False
) -> list[Prompt]:
    """A completion's `prompt`: text, texts, token ids, or lists of those; with `echo` token ids
    become text. Raises RequestError."""
    if _is_tokens(value) or isinstance(value, str):
        parts: list[object] = [value]
    elif isinstance(value, list) and value:
        parts = value
    else:
        raise RequestError("prompt: must be text, token ids, or a list of either that is not empty")
    if len(parts) > MAX_PROMPTS:
        raise RequestError(f"prompt: {len(parts)} prompts; at most {MAX_PROMPTS} in one request")
    return [_read_one(part, model, add_special_tokens, echo) for part in parts]


def tokenizer_of(model: ServedModel, instead: str) -> TextTokenizer:
    """Raises RequestError, which says what to do instead."""
    if model.tokenizer is None:
        raise RequestError(f"{instead}; model {model.name!r} has no tokenizer.json")
    return model.tokenizer


def encode(field: str, text: str, model: ServedModel, *, add_special_tokens: bool) -> Prompt:
    """Raises RequestError for a text that cannot fit into the context."""
    tokenizer = tokenizer_of(model, f"{field}: send token ids")
    require_short_text(field, text, model.max_model_len, tokenizer.longest_token)
    return Prompt(tokenizer.encode(text, add_special_tokens=add_special_tokens), text)


def _read_one(part: object, model: ServedModel, add_special_tokens: bool, echo: bool) -> Prompt:
    if isinstance(part, str):
        prompt = encode("prompt", part, model, add_special_tokens=add_special_tokens)
        if not prompt.token_ids:
            raise RequestError("prompt: must have at least one token, and an empty text has none")
        return prompt
    if not isinstance(part, list) or not _is_tokens(part):
        raise RequestError("prompt: must be text or token ids, whole numbers from 0 on")
    if len(part) > model.max_model_len:
        raise RequestError(
            f"prompt: {len(part)} token ids; max_position_embeddings={model.max_model_len}"
        )
    most = model.config.vocab_size - 1
    if not 0 <= min(part) <= max(part) <= most:
        raise RequestError(f"prompt: every token id must be from 0 to {most}")
    ids = tuple(part)
    return Prompt(ids, model.tokenizer.decode(ids) if echo and model.tokenizer else "")


def _is_tokens(value: object) -> bool:
    return isinstance(value, list) and set(map(type, value)) == {int}
