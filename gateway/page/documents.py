"""The page's three documents as bytes: many viewers share one, and the cluster is asked seldom.

Knows how old a document may be. Knows no request: routes.py does.
"""

import gzip
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b

from prometheus_client import CollectorRegistry

from gateway.admission import ServedModel
from gateway.cluster import Registry
from gateway.expert_totals import ExpertTotals
from gateway.page.document import cluster_document, experts_document, placement_document
from gateway.page.request_totals import request_totals

MAX_AGE_S = 0.5  # processes report twice a second
_LEVEL = 1  # of gzip; higher ones take five times as long and save little


@dataclass(frozen=True, slots=True)
class Rendered:
    """A document as it is sent, plain and packed. Equal documents have equal tags."""

    plain: bytes
    packed: bytes
    tag: str


class Documents:
    """`now` counts seconds. Belongs to one event loop."""

    def __init__(
        self,
        registry: Registry,
        model: ServedModel,
        metrics: CollectorRegistry,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._model = model
        self._metrics = metrics
        self._now = now
        self._totals = ExpertTotals()
        self._cluster: Rendered | None = None
        self._rendered_at = 0.0
        self._experts: tuple[int, Rendered] | None = None
        self._placement: tuple[int, Rendered] | None = None

    def cluster(self) -> Rendered:
        """At most MAX_AGE_S seconds old."""
        now = self._now()
        if self._cluster is None or now - self._rendered_at >= MAX_AGE_S:
            state = self._registry.state
            self._totals.update(state)
            requests = request_totals(self._metrics)
            version = self._totals.version
            self._cluster = render(cluster_document(state, self._model, version, requests))
            self._rendered_at = now
        return self._cluster

    def experts(self) -> Rendered:
        """The totals that the last cluster document named, or newer ones."""
        self._totals.update(self._registry.state)
        version = self._totals.version
        if self._experts is None or self._experts[0] != version:
            self._experts = version, render(experts_document(self._totals))
        return self._experts[1]

    def placement(self) -> Rendered:
        """Of the epoch that holds now."""
        state = self._registry.state
        epoch = state.placement.epoch
        if self._placement is None or self._placement[0] != epoch:
            self._placement = epoch, render(placement_document(state))
        return self._placement[1]


def render(document: Mapping[str, object]) -> Rendered:
    return rendered(json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode())


def rendered(plain: bytes) -> Rendered:
    packed = gzip.compress(plain, _LEVEL, mtime=0)
    return Rendered(plain, packed, f'"{blake2b(plain, digest_size=12).hexdigest()}"')
