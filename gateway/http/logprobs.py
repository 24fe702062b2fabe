"""Logprobs in the two shapes of OpenAI's API.

Knows tokens' names and both shapes. A name is the token's text; where two tokens of one position
have the same text (bytes of a character, say), the later is named by its id, so that no entry
takes another's place. A logprob of minus infinity becomes -9999, since JSON has no infinity.
"""

from collections.abc import Sequence
from itertools import accumulate

from gateway.requests import TokenLogprobs
from gateway.tokenizer import Detokenizer, TextTokenizer

LEAST = -9999.0


class TokenNames:
    """`as_ids`: every token is named by its id, as it is where there is no tokenizer."""

    def __init__(self, tokenizer: TextTokenizer | None, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def text(self, token_id: int) -> str:
        if self._as_ids or self._tokenizer is None:
            return id_name(token_id)
        return self._tokenizer.token_text(token_id)

    def detokenizer(self) -> Detokenizer | None:
        return None if self._tokenizer is None else Detokenizer(self._tokenizer)

    def utf8(self, token_id: int) -> bytes:
        """Of the token's text, or of its name where there is none."""
        if self._tokenizer is None:
            return id_name(token_id).encode()
        return self._tokenizer.token_bytes(token_id)


def id_name(token_id: int) -> str:
    return f"token_id:{token_id}"


class CompletionLogprobs:
    """Of one choice of a completion; keeps where in the text the next token begins. One that goes
    on with a character begins where that does."""

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._detokenizer = names.detokenizer()
        self._offset = 0

    def shape(
        self, entries: Sequence[TokenLogprobs], prompt: Sequence[int] = ()
    ) -> dict[str, object]:
        """{tokens, token_logprobs, top_logprobs, text_offset}. `prompt`: the entries begin with its
        second token, and it with one that follows nothing, so that its logprob is null."""
        texts = [self._names.text(entry.token_id) for entry in entries]
        values: list[float | None] = [finite(entry.logprob) for entry in entries]
        tops: list[dict[str, float] | None] = list(map(self._top, texts, entries))
        token_ids = [entry.token_id for entry in entries]
        offsets: list[int] = []
        if prompt:
            token_ids.insert(0, prompt[0])
            texts.insert(0, self._names.text(prompt[0]))
            values.insert(0, None)
            tops.insert(0, None)
            offsets = self._offsets(token_ids[: len(prompt)])
            self._detokenizer = self._names.detokenizer()  # the output's text is its tokens' alone
        return {
            "text_offset": offsets + self._offsets(token_ids[len(prompt) :]),
            "token_logprobs": values,
            "tokens": texts,
            "top_logprobs": tops,
        }

    def _offsets(self, token_ids: Sequence[int]) -> list[int]:
        if self._detokenizer is None:
            return [0] * len(token_ids)
        lengths = (len(self._detokenizer.push(token_id)) for token_id in token_ids)
        *offsets, self._offset = accumulate(lengths, initial=self._offset)
        return offsets

    def _top(self, text: str, entry: TokenLogprobs) -> dict[str, float]:
        """The token itself and the likeliest."""
        found = {text: finite(entry.logprob)}
        for token_id, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=True):
            if token_id != entry.token_id:
                name = self._names.text(token_id)
                found[id_name(token_id) if name in found else name] = finite(logprob)
        return found


def chat_logprobs(names: TokenNames, entries: Sequence[TokenLogprobs]) -> dict[str, object]:
    """{content: [{token, logprob, bytes, top_logprobs}]}."""
    return {
        "content": [
            {
                **_chat_token(names, entry.token_id, entry.logprob),
                "top_logprobs": [
                    _chat_token(names, token_id, logprob)
                    for token_id, logprob in zip(
                        entry.top_token_ids, entry.top_logprobs, strict=True
                    )
                ],
            }
            for entry in entries
        ]
    }


def _chat_token(names: TokenNames, token_id: int, logprob: float) -> dict[str, object]:
    utf8 = names.utf8(token_id)
    return {"token": names.text(token_id), "logprob": finite(logprob), "bytes": list(utf8)}


def finite(logprob: float) -> float:
    return max(logprob, LEAST)
