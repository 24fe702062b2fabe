"""Whether this gateway may change the cluster, and where it writes a change before it happens.

Knows what those who change the cluster ask. Knows no registry: election.py does, for gateways that
share one; a gateway that is alone leads.
"""

from typing import Protocol

from moe_core.config.parallel import ParallelConfig
from moe_core.errors import UnavailableError
from moe_core.placement import ExpertPlacement


class UndecidedError(UnavailableError):
    """The shared registry did not answer: what was to be written may or may not be there."""


class Leadership(Protocol):
    """last_epoch: the largest placement epoch that a leader before this one has given out."""

    @property
    def last_epoch(self) -> int: ...

    @property
    def leads(self) -> bool: ...

    def require(self, what: str) -> None:
        """Raises UnavailableError, naming who does `what`, unless this gateway leads."""

    async def publish(
        self, placement: ExpertPlacement, parallel: ParallelConfig, last_epoch: int
    ) -> None:
        """Write down what will be in force. No other gateway leads when this returns.

        Raises UndecidedError where it may have been written all the same, else UnavailableError."""


class SoleGateway:
    """The embedded registry: nobody else could lead, and what is in force the workers know."""

    leads = True
    last_epoch = 0

    def require(self, what: str) -> None:
        pass

    async def publish(
        self, placement: ExpertPlacement, parallel: ParallelConfig, last_epoch: int
    ) -> None:
        pass
