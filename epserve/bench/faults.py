"""`epserve bench faults`: what faults cost a cluster, beside what they may cost.

Knows the rows and how their figures are shown. How each is measured is in the modules beside this.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from epserve.bench import changes, losses, skew, slowness
from epserve.bench.row import BenchSettings, Measured, NotAvailableError, Row
from epserve.stop_signals import run_until_signalled
from moe_core.errors import ConfigError, EpserveError

ROWS = (*losses.ROWS, *slowness.ROWS, *changes.ROWS, *skew.ROWS)
PASS, FAIL, NOT_AVAILABLE = "pass", "fail", "not available"


@dataclass(frozen=True, slots=True)
class Answer:
    """`reason`: why nothing was measured; empty where something was."""

    row: Row
    measured: Measured | None
    result: str
    reason: str = ""

    @property
    def words(self) -> str:
        """What was measured."""
        if self.measured is None:
            return self.reason
        figures = self.measured.figures.items()
        return ", ".join(f"{name} {_figure(value)}" for name, value in figures)

    def document(self) -> dict[str, object]:
        return {
            "row": self.row.name,
            "fault": self.row.fault,
            "goal": self.row.goal,
            "result": self.result,
            "reason": self.reason,
            "measured": dict(self.measured.figures) if self.measured is not None else None,
        }


def rows_named(names: str | None) -> tuple[Row, ...]:
    """Those named, with commas between; all where there is no name. Raises ConfigError."""
    if names is None:
        return ROWS
    known = {row.name: row for row in ROWS}
    given = [name.strip() for name in names.split(",")]
    for name in given:
        if name not in known:
            rule = f"{name!r} is none of them; must be names with commas between"
            raise ConfigError("rows", names, rule, [",".join(known)])
    return tuple(row for row in ROWS if row.name in given)


def bench_faults(settings: BenchSettings, rows: Sequence[Row], *, as_json: bool) -> None:
    """Measure and print. Raises EpserveError where a goal was missed, or a signal ended it."""
    console = Console(highlight=False)
    answers: list[Answer] = []

    async def work() -> None:
        for row in rows:
            answers.append(await answer(row, settings))
            if as_json:
                print(json.dumps(answers[-1].document()), flush=True)
            else:
                console.print(
                    f"{row.name}: {answers[-1].result}: {escape(answers[-1].words)}",
                    soft_wrap=True,
                )

    interrupted = asyncio.run(run_until_signalled(work()))
    if not as_json:
        print(f"\n{table(answers)}")
    if interrupted:
        raise EpserveError("interrupted")
    missed = [each.row.name for each in answers if each.result == FAIL]
    if missed:
        raise EpserveError(f"missed: {', '.join(missed)}")


async def answer(row: Row, settings: BenchSettings) -> Answer:
    """A cluster that does not survive a row has missed its goal; one that refuses to start it has
    not been measured."""
    try:
        measured = await row.measure(settings)
    except NotAvailableError as error:
        return Answer(row, None, NOT_AVAILABLE, str(error))
    except EpserveError as error:
        return Answer(row, None, FAIL, str(error))
    return Answer(row, measured, PASS if measured.passed else FAIL)


def table(answers: Sequence[Answer]) -> str:
    """In Markdown, to be kept."""
    lines = [("row", "fault", "goal", "measured", "result"), ("---",) * 5]
    lines += [(a.row.name, a.row.fault, a.row.goal, a.words, a.result) for a in answers]
    return "\n".join(f"| {' | '.join(_in_cell(cell) for cell in line)} |" for line in lines)


def _in_cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _figure(value: float | int | None) -> str:
    if value is None:
        return "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
