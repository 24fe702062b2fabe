"""How every process logs: to stderr, for people on a terminal and as key=value lines elsewhere.

Knows structlog and the standard library's logging, whose records (of grpc and asyncio, say) take
the same way. The root logger's level is the one place that says whether this is a debug run.
"""

import logging
import sys

import structlog
from structlog.typing import Processor


def configure_logging(*, debug: bool = False) -> None:
    """Send all log records to stderr. Calling it again replaces what was set before."""
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
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(sys.stderr.isatty()),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    logging.getLogger("asyncio").setLevel(logging.INFO)


def is_debug() -> bool:
    return logging.getLogger().isEnabledFor(logging.DEBUG)


def _renderers(terminal: bool) -> list[Processor]:
    if terminal:
        plain = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(exception_formatter=plain)]
    order = ["timestamp", "level", "event"]
    return [
        structlog.processors.format_exc_info,
        structlog.processors.KeyValueRenderer(key_order=order, drop_missing=True),
    ]
