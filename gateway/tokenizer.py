"""Text to token ids and back, from a model directory's tokenizer.json.

Knows the `tokenizers` library; nothing else in the gateway does. Special tokens are added to a
prompt as the tokenizer says, and left out of output text.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders

from moe_core.errors import ConfigError

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # what byte-fallback decoders read
MAX_HELD = 64


def _byte_of_letter() -> dict[str, int]:
    """How byte-level tokenizers write bytes as letters, as GPT-2's encoder.py defines it: visible
    ones of Latin-1 as they are, the others in turn from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {chr(byte): byte for byte in visible}
    return letters | {chr(256 + index): byte for index, byte in enumerate(hidden)}


_BYTE_OF_LETTER: Mapping[str, int] = _byte_of_letter()


class TextTokenizer:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.longest_token = max(map(len, tokenizer.get_vocab()))  # characters
        # At most one for each token that there is.
        self._token_texts: dict[int, str] = {}
        self._alone: dict[int, str] = {}
        self._joins_bytes = isinstance(tokenizer.decoder, decoders.ByteLevel)

    @classmethod
    def from_directory(cls, directory: Path) -> "TextTokenizer | None":
        """None where there is no tokenizer.json. Raises ConfigError for one that cannot be read."""
        path = directory / "tokenizer.json"
        if not path.exists():
            return None
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises nothing more precise
            raise ConfigError("model", str(path), f"is no readable tokenizer: {error}") from error

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(token_ids)
        return text

    def decode_one(self, token_id: int) -> str:
        """As `decode` of this token alone."""
        text = self._alone.get(token_id)
        if text is None:
            text = self._alone[token_id] = self.decode((token_id,))
        return text

    def whole_text(self, token_id: int) -> str | None:
        """The token's text after any text that ends in a whole character; None where that depends
        on the tokens around it. Only a decoder that does nothing but join bytes lets it be known
        from the token alone."""
        if not self._joins_bytes:
            return None
        text = self.decode_one(token_id)
        return None if INCOMPLETE in text else text

    def token_text(self, token_id: int) -> str:
        """One token's text as it is within a text, special tokens' included. It is the second of
        two, since some decoders drop the space before the first."""
        text = self._token_texts.get(token_id)
        if text is None:
            once, twice = (
                self._tokenizer.decode([token_id] * count, skip_special_tokens=False)
                for count in (1, 2)
            )
            text = str(twice[len(once) :] if twice.startswith(once) else once)
            self._token_texts[token_id] = text
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the UTF-8 of a text: of one that is a part of a character, that
        part, where `token_text` has a replacement character."""
        text = self.token_text(token_id)
        if INCOMPLETE not in text:
            return text.encode()
        name = self._tokenizer.id_to_token(token_id) or ""
        if self._joins_bytes and _BYTE_OF_LETTER.keys() >= set(name):
            return bytes(_BYTE_OF_LETTER[letter] for letter in name)
        found = BYTE_TOKEN.fullmatch(name)
        return text.encode() if found is None else bytes([int(found[1], 16)])


class Detokenizer:
    """Text of a growing list of tokens, piece by piece.

    Invariant: the pieces joined are what decoding all tokens at once gives. A token's text may
    depend on the tokens around it (a leading space, a character cut into bytes), so each piece
    is the difference of two decodings that share a beginning: the first `_num_done` tokens of
    `_window` were given out with the piece before; text that ends in an incomplete character
    waits for the rest of it. A token that waits for nothing and has a text of its own, as most have
    where tokens are bytes (`whole_text`), needs neither and leaves the window as it is.

    Two exceptions, both where the tokens are no text. Byte-fallback decoders turn a whole run of
    bytes into replacement characters when one byte of it is wrong: what was given out before
    stays. And tokens wait for a character's end, or for text at all, only MAX_HELD long, so that
    a token costs the same however many have come.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_done = 0

    def push(self, token_id: int) -> str:
        """The text that can be given out now that `token_id` has come; often none."""
        if self._num_done == len(self._window):
            text = self._tokenizer.whole_text(token_id)
            if text is not None:
                return text
        self._window.append(token_id)
        text = self._new_text()
        if text.endswith(INCOMPLETE) and len(self._window) - self._num_done < MAX_HELD:
            return ""
        return self._take(text)

    def flush(self) -> str:
        """What is left at the end, incomplete characters included."""
        return self._take(self._new_text())

    def _new_text(self) -> str:
        if self._num_done == 0:
            return self._tokenizer.decode(self._window)
        if self._num_done == 1:  # nearly always: one token, one piece
            before = self._tokenizer.decode_one(self._window[0])
        else:
            before = self._tokenizer.decode(self._window[: self._num_done])
        text = self._tokenizer.decode(self._window)
        if text.startswith(before):
            return text[len(before) :]
        self._forget_done()
        return self._tokenizer.decode(self._window)

    def _take(self, text: str) -> str:
        if text:
            self._forget_done()
            self._num_done = len(self._window)
        elif len(self._window) - self._num_done >= MAX_HELD:
            del self._window[self._num_done :]  # special tokens, say, which have no text
        return text

    def _forget_done(self) -> None:
        del self._window[: self._num_done]
        self._num_done = 0
