"""Whether this process traces: one option, and nothing imported where it is not given."""

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from moe_core.errors import ConfigError

if TYPE_CHECKING:
    from moe_core.service.tracing import Spans


def check_traces_endpoint(endpoint: str | None) -> None:
    """Raises ConfigError for what is no http:// or https:// URL with a host and a port."""
    if endpoint is None:
        return
    try:
        url = urlsplit(endpoint)
        good = url.scheme in ("http", "https") and bool(url.hostname) and url.port is not None
    except ValueError:  # a port that is no number
        good = False
    if not good:
        rule = "must be the URL of an OTLP gRPC collector, with its port"
        raise ConfigError("otlp_traces_endpoint", endpoint, rule, ("http://127.0.0.1:4317",))


def open_spans(endpoint: str | None, service: str, rank: int) -> "Spans | None":
    """None where `endpoint` is."""
    if endpoint is None:
        return None
    from moe_core.service.tracing import Spans

    return Spans(endpoint, service, rank)
