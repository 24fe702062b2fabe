"""One choice's tokens become what its client is sent: text, stop strings, finish_reason and usage.

Knows one choice, from its first token on; so its state is right whichever group the tokens come
from. Knows no stream.
"""

from gateway.request_stream import Delta
from gateway.requests import Chunk, Sequence, Usage
from gateway.stop_strings import StopStrings
from gateway.tokenizer import Detokenizer, TextTokenizer

STOP = "stop"


class SequenceOutput:
    """`skip`: the tokens that the client has already, with their text. They count, and are not sent
    again."""

    def __init__(
        self, sequence: Sequence, tokenizer: TextTokenizer | None, *, skip: int = 0
    ) -> None:
        self._sequence = sequence
        self._skip = skip
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._stop = StopStrings(sequence.stop)
        self._num_tokens = 0
        self._cached_tokens = 0
        self._passes_on = not sequence.stop and skip == 0

    def push(self, delta: Delta) -> Chunk:
        """Tokens after the one that completed a stop string are not part of the output; a stop
        token is, but its text is not."""
        if self._passes_on and len(delta.token_ids) == 1 and not delta.finish_reason:
            return self._pass_on(delta)
        texts: list[str] = []
        self._cached_tokens = max(self._cached_tokens, delta.cached_tokens)
        textless = len(delta.token_ids) if delta.finish_reason == STOP else 0
        for count, token_id in enumerate(delta.token_ids, 1):
            self._num_tokens += 1
            found = self._take("" if count == textless else self._text(token_id), texts)
            if self._num_tokens <= self._skip:
                texts.clear()
            if found:
                return self._chunk(delta, count, texts, STOP)
        if delta.finish_reason:
            return self._last(delta, texts)
        return self._chunk(delta, len(delta.token_ids), texts, "")

    def _pass_on(self, delta: Delta) -> Chunk:
        """As `push`, of the one token that most deltas are, at less than half the cost."""
        self._num_tokens += 1
        if delta.cached_tokens:
            self._cached_tokens = max(self._cached_tokens, delta.cached_tokens)
        return Chunk(
            self._sequence.request_id,
            self._sequence.index,
            delta.token_ids,
            self._text(delta.token_ids[0]),
            logprobs=delta.logprobs,
            prompt_logprobs=delta.prompt_logprobs,
        )

    def _text(self, token_id: int) -> str:
        return "" if self._detokenizer is None else self._detokenizer.push(token_id)

    def _take(self, text: str, texts: list[str]) -> bool:
        """Whether `text` completes a stop string. Before min_tokens there is no stopping."""
        may_stop = self._num_tokens >= self._sequence.min_tokens
        shown, found = self._stop.push(text, may_stop=may_stop)
        texts.append(shown)
        return found

    def _last(self, delta: Delta, texts: list[str]) -> Chunk:
        rest = "" if self._detokenizer is None else self._detokenizer.flush()
        found = self._take(rest, texts)
        texts.append(self._stop.flush())
        if delta.token_ids and self._num_tokens <= self._skip:
            texts.clear()  # the last token came with the last text
        reason = STOP if found else delta.finish_reason
        return self._chunk(delta, len(delta.token_ids), texts, reason)

    def _chunk(self, delta: Delta, count: int, texts: list[str], finish_reason: str) -> Chunk:
        """The first `count` tokens of `delta`, without those that the client has."""
        had = min(count, max(0, self._skip - (self._num_tokens - count)))
        return Chunk(
            self._sequence.request_id,
            self._sequence.index,
            delta.token_ids[had:count],
            "".join(texts),
            finish_reason,
            self._usage() if finish_reason else None,
            delta.logprobs[had:count],
            delta.prompt_logprobs,
        )

    def _usage(self) -> Usage:
        return Usage(len(self._sequence.prompt_ids), self._num_tokens, self._cached_tokens)
