"""Servicers' methods as the outside may meet them: what is malformed or fails gets a clean status.

Knows gRPC's method handlers; knows no service. Left alone, gRPC answers a message that does not
parse with UNKNOWN and the name of a Python class, and an error likewise. Here a malformed message
is INVALID_ARGUMENT and names its type, an EpserveError is its own status, anything else is
INTERNAL and is logged with its traceback.

One request is parsed inside the wrapped method, because gRPC's own parsing happens where nobody
can answer. Of a stream of requests each is parsed where the method reads it, and the RequestError
reaches the wrapper through the method.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from inspect import isasyncgenfunction
from typing import Any, TypeAlias

import grpc
import grpc.aio
import structlog
from google.protobuf import descriptor_pool
from google.protobuf.message import DecodeError

from moe_core.errors import EpserveError, RequestError
from moe_core.service.grpc_channel import status_code, trailing_metadata

log = structlog.get_logger(__name__)

Parse = Callable[[bytes], Any]
Behavior = Callable[[Any, Any], Any]
Check = Callable[[str, Any], None]
"""Of a method's path and its call's context: raises an EpserveError to refuse the call."""
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


def strict_handlers(
    service: str, handlers: Mapping[str, Handler], check: Check
) -> dict[str, Handler]:
    """`handlers` of one service (method name to handler), made strict; `check` is asked before
    anything of a call is looked at."""
    return {name: _strict(service, name, handler, check) for name, handler in handlers.items()}


def _strict(service: str, method: str, handler: Handler, check: Check) -> Handler:
    path = f"/{service}/{method}"
    assert handler.request_deserializer is not None
    parse = _strict_parse(handler.request_deserializer, _input_type(service, method))
    behaviors = (
        handler.unary_unary,
        handler.unary_stream,
        handler.stream_unary,
        handler.stream_stream,
    )
    behavior: Behavior = next(found for found in behaviors if found is not None)
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    parse_one = None if handler.request_streaming else parse
    if isasyncgenfunction(behavior):
        wrapped = _guard(path, _write_all(behavior, parse_one), check)
    else:
        wrapped = _guard(path, _call(behavior, parse_one), check)
    return make(
        wrapped,
        request_deserializer=parse if handler.request_streaming else None,
        response_serializer=handler.response_serializer,
    )


def _input_type(service: str, method: str) -> str:
    found = descriptor_pool.Default().FindServiceByName(service)
    return str(found.methods_by_name[method].input_type.full_name)


def _strict_parse(parse: Parse, message_type: str) -> Parse:
    def strict_parse(data: bytes) -> Any:  # noqa: ANN401 - any protobuf message
        try:
            return parse(data)
        except (DecodeError, ValueError):
            raise RequestError(
                f"these {len(data)} bytes are no {message_type}: they do not parse as protobuf"
            ) from None

    return strict_parse


def _call(behavior: Behavior, parse: Parse | None) -> Behavior:
    async def call(request: Any, context: Any) -> Any:  # noqa: ANN401
        answer: Awaitable[Any] = behavior(request if parse is None else parse(request), context)
        return await answer

    return call


def _write_all(behavior: Behavior, parse: Parse | None) -> Behavior:
    async def write_all(request: Any, context: Any) -> None:  # noqa: ANN401
        answers: AsyncIterator[Any] = behavior(
            request if parse is None else parse(request), context
        )
        # Closed here and now, so that a cancelled call runs the method's own clean-up at once.
        async with aclosing(answers):  # type: ignore[type-var]  # an async generator by isasyncgen
            async for answer in answers:
                await context.write(answer)

    return write_all


def _guard(path: str, behavior: Behavior, check: Check) -> Behavior:
    async def guarded(request: Any, context: Any) -> Any:  # noqa: ANN401
        try:
            check(path, context)
            return await behavior(request, context)
        except EpserveError as error:
            await context.abort(status_code(error), str(error), trailing_metadata(error))
        except grpc.aio.BaseError:
            raise  # an abort on its way out, or a call that is already over
        except Exception:
            if context.code() is grpc.StatusCode.UNIMPLEMENTED:  # as generated bases set it
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{path} is not served here")
            log.exception("a method failed", method=path, peer=context.peer())
            await context.abort(
                grpc.StatusCode.INTERNAL, f"{path} failed; the log of this process says why"
            )

    return guarded
