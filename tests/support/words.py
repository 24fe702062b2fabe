"""A tokenizer of 64 made-up words, one token each. Knows the `tokenizers` library."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gateway.tokenizer import TextTokenizer

WORDS = ("<bos>", "<eos>", *(f"w{chr(97 + i // 26)}{chr(97 + i % 26)}x" for i in range(62)))


def word_tokenizer() -> TextTokenizer:
    vocabulary = {f"▁{word}": index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="▁<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return TextTokenizer(tokenizer)
