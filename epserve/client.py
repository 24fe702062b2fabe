"""A small asynchronous client of the Gateway service.

Knows the public gRPC messages and turns them into plain dataclasses; everything else in this
package sees only those. Knows nothing of how a request is served.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc.aio
from google.protobuf.message import Message

from moe_core.cluster import ClusterState
from moe_core.errors import ConfigError, PeerTimeoutError, RequestError
from moe_core.pb.epserve.v1 import gateway_pb2, gateway_pb2_grpc, logprobs_pb2
from moe_core.service.access import AUTHORIZATION
from moe_core.service.certificates import Certificates, ServerCheck
from moe_core.service.cluster_codec import cluster_from_pb
from moe_core.service.grpc_channel import error_from_rpc, open_channel
from moe_core.service.peer_roles import PeerRole
from moe_core.service.tls_files import TlsFiles


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. What is None takes the gateway's default."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int | None = None
    n: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one choice. cached_tokens: of the prompt's, those that were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token's logarithmic probability by the model alone, its rank (1: none is likelier), and
    the likeliest tokens with theirs, likeliest first."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Output:
    """What one choice gained since its last output. `finish_reason` is empty while it runs, and
    `usage` is there on its last output only. `logprobs` has one entry per token where they were
    asked for, else none; `prompt_logprobs`, on the first output and where asked for, one for each
    token of the prompt but the first."""

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    usage: Usage | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Model:
    id: str
    model_type: str
    max_model_len: int
    vocab_size: int
    has_tokenizer: bool


@dataclass(frozen=True, slots=True)
class Target:
    """A gateway: its HOST:PORT, how to know it (`tls` None: in the clear), and the key to show."""

    address: str
    tls: TlsFiles | None = None
    api_key: str | None = field(default=None, repr=False)

    @classmethod
    def of_options(
        cls,
        address: str,
        tls_ca: Path | None,
        tls_cert: Path | None,
        tls_key: Path | None,
        api_key: str | None,
    ) -> Self:
        """What the options of every command that asks a gateway say. Raises ConfigError."""
        return cls(address, TlsFiles.of_client(tls_ca, tls_cert, tls_key), api_key)


class GatewayConnection:
    """A channel to a gateway and what is shown on it. Async context manager."""

    def __init__(self, target: str | Target) -> None:
        """Raises ConfigError for TLS files or a key that cannot be used."""
        if isinstance(target, str):
            target = Target(target)
        self.target = target.address
        self._metadata = _metadata(target.api_key)
        self._channel = open_channel(target.address, _server_check(target.tls))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close(None)


class EpserveClient(GatewayConnection):
    """All calls raise EpserveError subclasses, never gRPC's own."""

    def __init__(self, target: str | Target) -> None:
        super().__init__(target)
        self._stub: Any = gateway_pb2_grpc.GatewayStub(self._channel)  # type: ignore[no-untyped-call]  # generated

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        *,
        model: str = "",
        request_id: str = "",
        resume_from: Sequence[int] = (),
        idle_timeout_s: float = 120.0,
    ) -> AsyncGenerator[Output, None]:
        """The outputs of all choices as they come. Closing the iterator cancels the request.

        `resume_from`, with the request_id of a request whose gateway was lost: how many tokens of
        each choice came before; the outputs go on after them (see epserve.resuming). Raises
        PeerTimeoutError when nothing arrives for `idle_timeout_s` seconds.
        """
        request = gateway_pb2.GenerateRequest(
            request_id=request_id,
            model=model,
            sampling=_sampling_message(sampling or Sampling()),
            resume_from=resume_from,
        )
        if isinstance(prompt, str):
            request.text = _utf8(prompt)
        else:
            request.token_ids.CopyFrom(_token_ids(prompt))
        call = self._stub.Generate(request, metadata=self._metadata)
        answers = aiter(call)
        try:
            while True:
                async with asyncio.timeout(idle_timeout_s):
                    response = await anext(answers, None)
                if response is None:
                    return
                yield _output(response)
        except TimeoutError:
            raise PeerTimeoutError(
                f"gateway {self.target} sent nothing for {idle_timeout_s} s"
            ) from None
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, f"generate at {self.target}") from error
        finally:
            call.cancel()

    async def list_models(self, timeout_s: float = 5.0) -> tuple[Model, ...]:
        try:
            answer = await self._stub.ListModels(
                gateway_pb2.ListModelsRequest(), timeout=timeout_s, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, f"list models at {self.target}") from error
        return tuple(
            Model(m.id, m.model_type, m.max_model_len, m.vocab_size, m.has_tokenizer)
            for m in answer.models
        )

    async def cluster(self, timeout_s: float = 5.0, *, expert_load: bool = False) -> ClusterState:
        """With `expert_load` also which experts the tokens went to, where that is known."""
        request = gateway_pb2.GetClusterRequest(expert_load=expert_load)
        try:
            answer = await self._stub.GetCluster(
                request, timeout=timeout_s, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, f"get cluster at {self.target}") from error
        return cluster_from_pb(answer)

    async def watch_cluster(self) -> AsyncGenerator[ClusterState, None]:
        """The state now and whenever it has changed, until the gateway ends this in order."""
        call = self._stub.WatchCluster(gateway_pb2.WatchClusterRequest(), metadata=self._metadata)
        try:
            async for answer in call:
                yield cluster_from_pb(answer)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, f"watch cluster at {self.target}") from error
        finally:
            call.cancel()


def _metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    if not api_key:
        return ()
    if not api_key.isascii() or not api_key.isprintable():
        raise ConfigError("api_key", "…", "must be printable ASCII")  # a key is never shown
    return ((AUTHORIZATION, f"Bearer {api_key}"),)


def _server_check(tls: TlsFiles | None) -> ServerCheck | None:
    return None if tls is None else ServerCheck(Certificates(tls), PeerRole.GATEWAY)


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"text: is not valid Unicode: {error}") from None
    return text


def _token_ids(prompt: Sequence[int]) -> gateway_pb2.TokenIds:
    try:
        return gateway_pb2.TokenIds(ids=prompt)
    except ValueError as error:
        rule = _range_words(gateway_pb2.TokenIds(), "ids")
        raise RequestError(f"token_ids: {rule} ({error})") from None


def _sampling_message(sampling: Sampling) -> gateway_pb2.SamplingParams:
    """The fields have the same names; one that is None is left out. Raises RequestError for a
    number that the wire cannot carry; what is sensible is the gateway's to say."""
    message = gateway_pb2.SamplingParams()
    for name, value in asdict(sampling).items():
        try:
            message.MergeFrom(gateway_pb2.SamplingParams(**{name: value}))
        except UnicodeEncodeError as error:
            raise RequestError(f"{name}: is not valid Unicode: {error}") from None
        except ValueError:
            rule = _range_words(message, name)
            raise RequestError(f"{name}={value}: {rule}") from None
    return message


def _range_words(message: Message, name: str) -> str:
    """What the wire can carry in a field of whole numbers, or in the keys of a map of them."""
    field = message.DESCRIPTOR.fields_by_name[name]
    if field.message_type is not None:
        field = field.message_type.fields_by_name["key"]
    bits = 64 if field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64) else 32
    signed = field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return f"must be from {low} to {high}"


def _output(response: gateway_pb2.GenerateResponse) -> Output:
    usage = None
    if response.HasField("usage"):
        told = response.usage
        usage = Usage(told.prompt_tokens, told.completion_tokens, told.cached_tokens)
    return Output(
        response.request_id,
        response.index,
        tuple(response.token_ids),
        response.text,
        response.finish_reason,
        usage,
        tuple(map(_logprobs, response.logprobs)),
        tuple(map(_logprobs, response.prompt_logprobs)),
    )


def _logprobs(told: logprobs_pb2.TokenLogprobs) -> TokenLogprobs:
    top = tuple(zip(told.top_token_ids, told.top_logprobs, strict=True))
    return TokenLogprobs(told.token_id, told.logprob, told.rank, top)
