"""What a row of `epserve bench faults` is: a fault, a goal, and how far from it a cluster was.

Knows how a row is asked and what it answers. Knows no fault.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moe_core.errors import ConfigError


class NotAvailableError(Exception):
    """What a row measures is not there to be measured: says what refused it."""


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """`rounds`: of each measurement; medians are over them. Raises ConfigError."""

    model: Path
    rounds: int

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError("rounds", self.rounds, "must be at least 1", [1])


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures by name, with their unit at the end of the name, and whether the goal is met."""

    passed: bool
    figures: Mapping[str, float | int | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """`measure` raises NotAvailableError, or an EpserveError where the cluster did not survive."""

    name: str
    fault: str
    goal: str
    measure: Callable[[BenchSettings], Awaitable[Measured]]
