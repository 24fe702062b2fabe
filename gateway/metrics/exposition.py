"""The whole cluster's metrics in the text forms that Prometheus reads.

Knows where metrics come from and how a scrape is answered. Knows no metric.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.metrics.cluster import cluster_families
from gateway.metrics.expert_load import expert_families
from gateway.metrics.requests import RequestMetrics
from moe_core.cluster import ClusterState

PATH = "/metrics"


@dataclass(frozen=True, slots=True)
class Scrape(Collector):
    """Everything there is to say at one moment."""

    requests: CollectorRegistry
    state: ClusterState
    model_name: str

    def collect(self) -> Iterator[Metric]:
        yield from self.requests.collect()
        yield from cluster_families(self.state, self.model_name)
        yield from expert_families(self.state, self.model_name)


def render(scrape: Scrape, accept: str = "") -> tuple[bytes, str]:
    """The text and its content type; `accept` is the scraper's Accept header."""
    encode, content_type = choose_encoder(accept)
    return encode(scrape), content_type


def metrics_routes(
    requests: RequestMetrics, state: Callable[[], ClusterState], model_name: str
) -> list[Route]:
    """`state` is asked on the event loop; the text, which is long for a large cluster, is put
    together beside it."""

    async def metrics(request: Request) -> Response:
        scrape = Scrape(requests.registry, state(), model_name)
        accept = request.headers.get("accept", "")
        body, content_type = await asyncio.to_thread(render, scrape, accept)
        return Response(body, headers={"content-type": content_type})

    return [Route(PATH, metrics, methods=["GET"])]
