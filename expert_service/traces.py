"""One span for every run of a layer's experts.

Knows the dispatches that a run has joined and the steps they belong to. Knows no collector.
"""

from collections.abc import Sequence

from moe_core.service.tracing import Spans
from moe_core.trace_context import step_context
from moe_core.transport.base import Dispatch, Reply


class BatchTraces:
    """A BatchObserver."""

    def __init__(self, spans: Spans) -> None:
        self._spans = spans

    def ran(
        self,
        layer_id: int,
        joined: Sequence[tuple[Dispatch, Reply]],
        began_s: float,
        ended_s: float,
    ) -> None:
        """See `BatchObserver.ran`: a child of the oldest dispatch's step, linked to the others'."""
        steps = dict.fromkeys(
            step_context(reply.source_epoch, dispatch.key.step) for dispatch, reply in joined
        )
        parent, *others = steps
        self._spans.add(
            "experts",
            parent.child(),
            began_s,
            ended_s,
            parent=parent,
            attributes={
                "epserve.layer_id": layer_id,
                "epserve.dispatches": len(joined),
                "epserve.tokens": sum(dispatch.num_tokens for dispatch, _ in joined),
                "epserve.placement_epoch": joined[0][0].key.placement_epoch,
            },
            links=others,
        )
