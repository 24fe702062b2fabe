"""llama.cpp decoding what its parent asks for; see child.py.

Started by peers.py with a Python that has llama-cpp-python, on a file of make_gguf.py's. Knows
llama.cpp's C interface, since the Python class above it decodes one sequence at a time. Imports
neither torch nor epserve: a second OpenMP in the process would not be llama.cpp's speed.
"""

import ctypes
import os
import sys
import time
from typing import Any

import llama_cpp as llama

from child import asked, say
from decode_rate import random_prompts

CONTEXT = 8192


class Decoder:
    def __init__(self, path: str) -> None:
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(
            path.encode(), llama.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))

    def decode(self, batch: int, prompt_tokens: int, num_tokens: int) -> float:
        """Decode tokens/s of `batch` greedy sequences, from the first token of all to the last."""
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = CONTEXT
        parameters.n_batch = parameters.n_ubatch = 512
        parameters.n_seq_max = batch
        parameters.n_threads = parameters.n_threads_batch = len(os.sched_getaffinity(0))
        parameters.kv_unified = True
        context = llama.llama_init_from_model(self._model, parameters)
        if not context:
            raise RuntimeError("llama.cpp cannot make a context")
        try:
            return self._decode(context, batch, prompt_tokens, num_tokens)
        finally:
            llama.llama_free(context)

    def _decode(
        self,
        context: Any,  # noqa: ANN401
        batch: int,
        prompt_tokens: int,
        num_tokens: int,
    ) -> float:
        tokens = []
        for row, prompt in enumerate(random_prompts(batch, prompt_tokens, self._vocab_size)):
            entries = [(token, at, row, at == len(prompt) - 1) for at, token in enumerate(prompt)]
            self._run(context, entries)
            tokens.append(self._likeliest(context, len(entries) - 1))
        started = time.perf_counter()
        for step in range(num_tokens - 1):
            at = prompt_tokens + step
            self._run(context, [(token, at, row, True) for row, token in enumerate(tokens)])
            tokens = [self._likeliest(context, row) for row in range(batch)]
        return batch * (num_tokens - 1) / (time.perf_counter() - started)

    def _run(
        self,
        context: Any,  # noqa: ANN401
        entries: list[tuple[int, int, int, bool]],
    ) -> None:
        """Entries are (token, position, sequence, whether its logits are wanted)."""
        batch = llama.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for index, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wanted
        status = llama.llama_decode(context, batch)
        llama.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode answered {status}")

    def _likeliest(self, context: Any, index: int) -> int:  # noqa: ANN401
        logits = llama.llama_get_logits_ith(context, index)
        values = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self._vocab_size)).contents
        return int(_argmax(values))


def _argmax(values: Any) -> int:  # noqa: ANN401
    import numpy  # comes with llama-cpp-python

    return int(numpy.frombuffer(values, dtype=numpy.float32).argmax())


def main(path: str) -> None:
    decoder = Decoder(path)
    say(ready=True)
    for work in asked():
        say(tokens_per_s=decoder.decode(**work))


if __name__ == "__main__":
    main(sys.argv[1])
