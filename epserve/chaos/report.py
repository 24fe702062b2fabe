"""What a chaos run has shown: as one JSON document, and as tables.

Knows results, faults and times. Measures nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from epserve.chaos.checker import Outcome
from epserve.chaos.faults import Injected
from epserve.chaos.load import Ended, Results
from epserve.chaos.timeline import Spread, Timeline, spread

SHOWN = 10  # of errors and breaks, in the tables; the document has all that were kept
AFTER_FAULT_S = 10.0  # a stall later than that is not this fault's


@dataclass(frozen=True, slots=True)
class ChaosReport:
    """`before`: each request once, after the pass that the results are compared with. `missing`:
    who was not READY at the end. `interrupted`: ended before its time."""

    seed: int
    before: Results
    during: Results
    injected: Sequence[Injected]
    missing: Sequence[str]
    interrupted: bool

    @property
    def held(self) -> bool:
        """Whether every request that ended was exact or had one explicit error. What no request
        has tried has not held."""
        return self.during.num_broken == 0 and self.during.outcomes.total() > 0

    def document(self) -> dict[str, object]:
        """Seconds throughout; times (`at_s`) since the faults began; what there was not is null."""
        during = self.during
        return {
            "held": self.held,
            "interrupted": self.interrupted,
            "seed": self.seed,
            "requests": {outcome.value: during.outcomes[outcome] for outcome in Outcome},
            "error_codes": dict(sorted(during.error_codes.items())),
            "errors": [self._ended(end) for end in during.errors],
            "broken": [self._ended(end) | _asked(end) for end in during.breaks],
            "faults": [self._fault(index) for index in range(len(self.injected))],
            "not_ready": list(self.missing),
            "before": _phase(self.before),
            "during": _phase(during),
        }

    def print_to(self, console: Console) -> None:
        console.print(self._faults_table())
        console.print(self._phases_table())
        console.print(_ends_words(self.during), soft_wrap=True)
        self._print_examples(console, "error", self.during.errors)
        self._print_examples(console, "BROKEN", self.during.breaks)
        for words in self.missing:
            console.print(f"[yellow]not ready at the end[/]: {escape(words)}", soft_wrap=True)

    def _fault(self, index: int) -> dict[str, object]:
        injected, timeline = self.injected[index], self.during.timeline
        return {
            "fault": injected.fault.value,
            "member": injected.name,
            "pid": injected.member.pid,
            "at_s": round(injected.at - timeline.began, 3),
            "lasted_s": _since(injected.at, injected.ended_at),
            "next_token_s": _rounded(timeline.next_after(injected.at)),
            "ready_again_s": _since(injected.at, injected.ready_at),
            "longest_stall_s": _rounded(timeline.longest_gap(injected.at, self._last_of(index))),
        }

    def _last_of(self, index: int) -> float:
        """Until when a stall is put down to this fault: the next one, if it comes soon."""
        own = self.injected[index]
        until = (own.ended_at or own.at) + AFTER_FAULT_S
        later = [each.at for each in self.injected[index + 1 : index + 2]]
        return min([until, *later])

    def _ended(self, end: Ended) -> dict[str, object]:
        return {
            "request_id": end.request_id,
            "request": end.request.key,
            "at_s": round(end.at - self.during.timeline.began, 3),
            "outcome": end.verdict.outcome.value,
            "code": end.verdict.code,
            "detail": end.verdict.detail,
        }

    def _faults_table(self) -> Table:
        table = Table(title="Faults, in seconds", title_justify="left", title_style="bold")
        for name in ("fault", "member"):
            table.add_column(name)
        columns = {
            "at_s": "at",
            "lasted_s": "lasted",
            "next_token_s": "next token",
            "ready_again_s": "ready again",
            "longest_stall_s": "stall",
        }
        for name in columns.values():
            table.add_column(name, justify="right")
        for index in range(len(self.injected)):
            shown = self._fault(index)
            figures = ("" if shown[name] is None else f"{shown[name]:.2f}" for name in columns)
            table.add_row(str(shown["fault"]), str(shown["member"]), *figures)
        return table

    def _phases_table(self) -> Table:
        table = Table(title="Load", title_justify="left", title_style="bold")
        table.add_column("milliseconds")
        for name in ("requests", "tokens/s", "first p50", "p99", "gap p50", "p99", "max"):
            table.add_column(name, justify="right")
        for name, results in (("before", self.before), ("during", self.during)):
            timeline = results.timeline
            first, gap = spread(timeline.first_token_s), spread(timeline.gaps)
            table.add_row(
                name,
                str(results.outcomes.total()),
                f"{timeline.tokens_per_s:.1f}",
                *map(_milliseconds, (first.p50, first.p99, gap.p50, gap.p99, gap.most)),
            )
        return table

    def _print_examples(self, console: Console, word: str, ends: Sequence[Ended]) -> None:
        for end in ends[:SHOWN]:
            at_s = end.at - self.during.timeline.began
            kind = end.verdict.code or end.verdict.outcome.value
            detail = escape(end.verdict.detail)
            console.print(
                f"{word} at {at_s:.1f} s, request {end.request.key}: {kind}: {detail}",
                soft_wrap=True,
            )
        if len(ends) > SHOWN:
            console.print(f"and {len(ends) - SHOWN} more: --json shows them")


def _ends_words(results: Results) -> str:
    counts = ", ".join(f"{results.outcomes[outcome]} {outcome}" for outcome in Outcome)
    codes = ", ".join(f"{count} {code}" for code, count in sorted(results.error_codes.items()))
    return f"[bold]requests[/]: {counts}" + (f" ({codes})" if codes else "")


def _phase(results: Results) -> dict[str, object]:
    timeline: Timeline = results.timeline
    return {
        "requests": results.outcomes.total(),
        "seconds": round(timeline.ended - timeline.began, 3),
        "tokens": timeline.num_tokens,
        "tokens_per_s": _rounded(timeline.tokens_per_s),
        "first_token_s": _spread(spread(timeline.first_token_s)),
        "gap_s": _spread(spread(timeline.gaps)),
    }


def _asked(end: Ended) -> dict[str, object]:
    """What the same again takes."""
    asked = asdict(end.request.sampling).items()
    given = {name: value for name, value in asked if value is not None and value not in ((), {})}
    return {"prompt": list(end.request.prompt), "sampling": given}


def _spread(of: Spread) -> dict[str, float | None]:
    return {"p50": _rounded(of.p50), "p99": _rounded(of.p99), "max": _rounded(of.most)}


def _since(at: float, then: float | None) -> float | None:
    return None if then is None else round(then - at, 3)


def _rounded(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 4)


def _milliseconds(seconds: float) -> str:
    return "" if math.isnan(seconds) else f"{1000 * seconds:.1f}"
