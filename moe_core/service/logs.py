"""How every process logs: to stderr, for people on a terminal, as key=value lines elsewhere, and as
JSON where that is asked for.

Knows structlog and the standard library's logging, whose records (of grpc and asyncio, say) take
the same way. The root logger's level is the one place that says whether this is a debug run.
"""

import logging
import sys
from typing import TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger


class JsonHandler(logging.StreamHandler[TextIO]):
    """Writes every record as one JSON object, with `service` and, once known, `service_rank`."""

    def __init__(self, service: str) -> None:
        super().__init__(sys.stderr)
        self._identity: dict[str, str | int] = {"service": service}

    def bind_rank(self, rank: int) -> None:
        self._identity["service_rank"] = rank

    def identify(self, logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
        """A processor. An event may have a `rank` of its own, which is that of another process."""
        return {**event, **self._identity}


def configure_logging(*, debug: bool = False, json_of: str | None = None) -> None:
    """Send all log records to stderr, as JSON where `json_of` names the service that logs.
    Calling it again replaces what was set before."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=False),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr) if json_of is None else JsonHandler(json_of)
    renderers = _renderers(sys.stderr.isatty())
    if isinstance(handler, JsonHandler):
        renderers = _json_renderers(handler)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *renderers,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    logging.getLogger("asyncio").setLevel(logging.INFO)


def bind_rank(rank: int) -> None:
    """From now on JSON lines say that this process has `rank`."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, JsonHandler):
            handler.bind_rank(rank)


def logs_json() -> bool:
    return any(isinstance(each, JsonHandler) for each in logging.getLogger().handlers)


def is_debug() -> bool:
    return logging.getLogger().isEnabledFor(logging.DEBUG)


def _json_renderers(handler: JsonHandler) -> list[Processor]:
    return [
        handler.identify,
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(default=str),
    ]


def _renderers(terminal: bool) -> list[Processor]:
    if terminal:
        plain = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(exception_formatter=plain)]
    order = ["timestamp", "level", "event"]
    return [
        structlog.processors.format_exc_info,
        structlog.processors.KeyValueRenderer(key_order=order, drop_missing=True),
    ]
