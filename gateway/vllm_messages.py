"""Between vllm.grpc.engine's messages and the gateway's own values.

Knows vllm_engine.proto and gateway/requests.py. A field that would change the output and that
nothing here can honour is refused by its name. Those that only say how tokens become text
(skip_special_tokens, spaces_between_special_tokens, include_stop_str_in_output) change nothing,
since tokens are what is answered; stop strings are looked for in text without special tokens.

proto3 cannot tell a number that was left out from 0 unless a field is `optional`: top_p,
repetition_penalty and n, of which 0 is no valid value, are then taken as left out, as vLLM does.
"""

from collections.abc import Sequence

from gateway.requests import Chunk, GenerationRequest, Sampling, TokenLogprobs, Usage
from moe_core.errors import RequestError
from moe_core.pb.smg import vllm_engine_pb2 as pb

STRUCTURED = "structured outputs are not supported; leave it out"
MULTIMODAL = "this cluster serves text models; send token ids only"
KV_TRANSFER = "KV is not handed over between servers here; send the request whole"
OF_TEXT = "are told of token ids, so the prompt must be sent as tokenized"
REFUSED_FIELDS = {
    "kv_transfer_params": KV_TRANSFER,
    "kv_transfer_params_json": KV_TRANSFER,
    "mm_inputs": MULTIMODAL,
    "media_refs": MULTIMODAL,
    "data_parallel_rank": "the gateway balances its DP groups itself; leave it out",
}
REFUSED_SAMPLING = {
    "truncate_prompt_tokens": "prompts are never cut; send the tokens that are meant",
}


def request_from_pb(message: pb.GenerateRequest) -> GenerationRequest:
    """Raises RequestError naming the first field that cannot be honoured."""
    for field, reason in REFUSED_FIELDS.items():
        if message.HasField(field):
            raise RequestError(f"{field}: {reason}")
    if message.extra_mm_inputs:
        raise RequestError(f"extra_mm_inputs: {MULTIMODAL}")
    if message.WhichOneof("input") == "text" and message.sampling_params.HasField(
        "prompt_logprobs"
    ):
        raise RequestError(f"sampling_params.prompt_logprobs: {OF_TEXT}")
    prompts: dict[str | None, str | tuple[int, ...] | None] = {
        None: None,
        "text": message.text,
        "tokenized": tuple(message.tokenized.input_ids),
    }
    return GenerationRequest(
        request_id=message.request_id,
        model="",
        prompt=prompts[message.WhichOneof("input")],
        sampling=sampling_from_pb(message.sampling_params),
    )


def sampling_from_pb(message: pb.SamplingParams) -> Sampling:
    """Raises RequestError naming the first field that cannot be honoured."""
    constraint = message.WhichOneof("constraint")
    if constraint is not None:
        raise RequestError(f"sampling_params.{constraint}: {STRUCTURED}")
    for field, reason in REFUSED_SAMPLING.items():
        if message.HasField(field):
            raise RequestError(f"sampling_params.{field}: {reason}")
    return Sampling(
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        temperature=message.temperature if message.HasField("temperature") else None,
        top_p=message.top_p or None,
        top_k=message.top_k,
        min_p=message.min_p,
        seed=message.seed if message.HasField("seed") else None,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        repetition_penalty=message.repetition_penalty or None,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        logit_bias=dict(message.logit_bias),
        min_tokens=message.min_tokens,
        n=message.n or None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


class ChoiceAnswer:
    """One choice's answer as it grows: chunks hold what is new, the last message everything. What
    is told of the prompt is in the first chunk and in the last message."""

    def __init__(self, asked: GenerationRequest) -> None:
        self._prompt_ids = asked.prompt if isinstance(asked.prompt, tuple) else ()
        self._num_prompt_top = asked.sampling.prompt_logprobs
        self._stop_token_ids = frozenset(asked.sampling.stop_token_ids)
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._of_prompt: pb.InputLogProbs | None = None
        self._num_chunks = 0

    def add(self, chunk: Chunk) -> None:
        self._num_chunks += 1
        if self._num_chunks == 1 and self._num_prompt_top is not None:
            told, top = chunk.prompt_logprobs, self._num_prompt_top > 0
            self._of_prompt = _prompt_logprobs(self._prompt_ids, told, top=top)
        self._token_ids.extend(chunk.token_ids)
        self._logprobs.extend(chunk.logprobs)

    def newest(self, chunk: Chunk) -> pb.GenerateResponse:
        """What was added last. completion_tokens counts these alone, as vLLM's does; cached_tokens
        stands in the message that ends the choice."""
        return pb.GenerateResponse(
            chunk=pb.GenerateStreamChunk(
                token_ids=chunk.token_ids,
                prompt_tokens=len(self._prompt_ids),
                completion_tokens=len(chunk.token_ids),
                output_logprobs=_logprobs(chunk.logprobs),
                input_logprobs=self._of_prompt if self._num_chunks == 1 else None,
                index=chunk.index,
            )
        )

    def complete(self, finish_reason: str, usage: Usage, index: int) -> pb.GenerateResponse:
        """The message that ends the choice."""
        complete = pb.GenerateComplete(
            output_ids=self._token_ids,
            finish_reason=finish_reason,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            output_logprobs=_logprobs(self._logprobs),
            input_logprobs=self._of_prompt,
            index=index,
        )
        last = self._token_ids[-1] if self._token_ids else None
        if finish_reason == "stop" and last in self._stop_token_ids:
            complete.matched_token_id = last
        return pb.GenerateResponse(complete=complete)


def _prompt_logprobs(
    prompt_ids: Sequence[int], told: Sequence[TokenLogprobs], *, top: bool
) -> pb.InputLogProbs:
    """One entry for each token of the prompt; the first has no logprob, and no likelier tokens."""
    return pb.InputLogProbs(
        token_logprobs=[
            pb.InputTokenLogProb(),
            *(pb.InputTokenLogProb(value=token.logprob) for token in told),
        ],
        token_ids=prompt_ids,
        top_logprobs=[pb.TopLogProbs(), *map(_top_logprobs, told)] if top else (),
    )


def _logprobs(tokens: Sequence[TokenLogprobs]) -> pb.OutputLogProbs | None:
    """None where none were asked for."""
    if not tokens:
        return None
    return pb.OutputLogProbs(
        token_logprobs=[token.logprob for token in tokens],
        token_ids=[token.token_id for token in tokens],
        top_logprobs=(_top_logprobs(token) for token in tokens if token.top_token_ids),
    )


def _top_logprobs(token: TokenLogprobs) -> pb.TopLogProbs:
    return pb.TopLogProbs(values=token.top_logprobs, token_ids=token.top_token_ids)
