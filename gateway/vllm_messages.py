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
REFUSED_FIELDS = {
    "kv_transfer_params": KV_TRANSFER,
    "kv_transfer_params_json": KV_TRANSFER,
    "mm_inputs": MULTIMODAL,
    "media_refs": MULTIMODAL,
    "data_parallel_rank": "the gateway balances its DP groups itself; leave it out",
}
REFUSED_SAMPLING = {
    "prompt_logprobs": "only epserve's own service and /v1/completions tell them; leave it out",
    "truncate_prompt_tokens": "prompts are never cut; send the tokens that are meant",
}


def request_from_pb(message: pb.GenerateRequest) -> GenerationRequest:
    """Raises RequestError naming the first field that cannot be honoured."""
    for field, reason in REFUSED_FIELDS.items():
        if message.HasField(field):
            raise RequestError(f"{field}: {reason}")
    if message.extra_mm_inputs:
        raise RequestError(f"extra_mm_inputs: {MULTIMODAL}")
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
    )


class ChoiceAnswer:
    """One choice's answer as it grows: chunks hold what is new, the last message everything."""

    def __init__(self, stop_token_ids: Sequence[int]) -> None:
        self._stop_token_ids = frozenset(stop_token_ids)
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []

    def add(self, chunk: Chunk) -> None:
        self._token_ids.extend(chunk.token_ids)
        self._logprobs.extend(chunk.logprobs)

    def complete(self, finish_reason: str, usage: Usage, index: int) -> pb.GenerateResponse:
        """The message that ends the choice."""
        complete = pb.GenerateComplete(
            output_ids=self._token_ids,
            finish_reason=finish_reason,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            output_logprobs=_logprobs(self._logprobs),
            index=index,
        )
        last = self._token_ids[-1] if self._token_ids else None
        if finish_reason == "stop" and last in self._stop_token_ids:
            complete.matched_token_id = last
        return pb.GenerateResponse(complete=complete)


def chunk_to_pb(chunk: Chunk, prompt_tokens: int) -> pb.GenerateResponse:
    """The new tokens of one choice. completion_tokens counts these alone, as vLLM's does;
    cached_tokens stands in the message that ends the choice."""
    return pb.GenerateResponse(
        chunk=pb.GenerateStreamChunk(
            token_ids=chunk.token_ids,
            prompt_tokens=prompt_tokens,
            completion_tokens=len(chunk.token_ids),
            output_logprobs=_logprobs(chunk.logprobs),
            index=chunk.index,
        )
    )


def _logprobs(tokens: Sequence[TokenLogprobs]) -> pb.OutputLogProbs | None:
    """None where none were asked for."""
    if not tokens:
        return None
    top = (
        pb.TopLogProbs(values=token.top_logprobs, token_ids=token.top_token_ids)
        for token in tokens
        if token.top_token_ids
    )
    return pb.OutputLogProbs(
        token_logprobs=[token.logprob for token in tokens],
        token_ids=[token.token_id for token in tokens],
        top_logprobs=top,
    )
