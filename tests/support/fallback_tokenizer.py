"""A tokenizer that writes what it has no token for in bytes."""

from functools import cache

from tokenizers import Tokenizer, decoders, models

from gateway.tokenizer import TextTokenizer

FALLBACK_WORDS = ("<unk>", "</s>", "▁", "▁a", "b", "▁the", "é", "日", "▁▁", "x▁")
FALLBACK_PIECES = (*FALLBACK_WORDS, *(f"<0x{byte:02X}>" for byte in range(256)))


@cache
def fallback_tokenizer() -> TextTokenizer:
    """As Llama's and Mixtral's: ▁ for spaces, of which the first is stripped, and bytes for
    what has no token."""
    vocabulary = {piece: index for index, piece in enumerate(FALLBACK_PIECES)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["</s>"])
    return TextTokenizer(tokenizer)
