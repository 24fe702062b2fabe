"""Whether a request's stream is what it must be: checked token by token, as it comes.

Knows the result of the undisturbed run and what came. Knows nothing of faults, time or sockets.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from epserve.generate_messages import Output, Usage


class Outcome(StrEnum):
    """How a request ended. All but the first two break the invariant."""

    EXACT = "exact"
    ERROR = "error"  # one explicit error, after a right beginning or none
    WRONG = "wrong"
    TRUNCATED = "truncated"
    HANG = "hang"  # neither an end nor an error by its deadline


@dataclass(frozen=True, slots=True)
class Verdict:
    """`code`: of an error, the name of its gRPC status. `detail`: its message, or what is wrong."""

    outcome: Outcome
    detail: str = ""
    code: str = ""

    @property
    def breaks(self) -> bool:
        return self.outcome not in (Outcome.EXACT, Outcome.ERROR)


@dataclass(frozen=True, slots=True)
class Completion:
    """One choice, whole."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    usage: Usage | None


@dataclass(slots=True)
class _Choice:
    """One choice as far as it has come."""

    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finish_reason: str = ""
    usage: Usage | None = None

    def add(self, output: Output) -> None:
        self.token_ids += output.token_ids
        self.texts.append(output.text)
        self.finish_reason = output.finish_reason
        self.usage = output.usage

    def whole(self) -> Completion:
        return Completion(
            tuple(self.token_ids), "".join(self.texts), self.finish_reason, self.usage
        )


class Gathered:
    """The choices of a request whose result is not known yet."""

    def __init__(self, num_choices: int) -> None:
        self._choices = [_Choice() for _ in range(num_choices)]

    def push(self, output: Output) -> None:
        self._choices[output.index].add(output)

    def completions(self) -> tuple[Completion, ...] | None:
        """None where a choice has not ended."""
        if not all(choice.finish_reason for choice in self._choices):
            return None
        return tuple(choice.whole() for choice in self._choices)


class StreamChecker:
    """`push` each output; a verdict other than None is final. `end` when the stream has ended."""

    def __init__(self, request_id: str, expected: Sequence[Completion]) -> None:
        self._request_id = request_id
        self._expected = expected
        self._choices = [_Choice() for _ in expected]

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self._choices)

    def push(self, output: Output) -> Verdict | None:
        """The first thing that is not as it must be."""
        if output.request_id != self._request_id:
            return _wrong(f"an output of request {output.request_id!r} came instead")
        if not 0 <= output.index < len(self._choices):
            return _wrong(f"choice {output.index} came, of a request with {len(self._choices)}")
        choice, expected = self._choices[output.index], self._expected[output.index]
        name = f"choice {output.index}"
        if choice.finish_reason:
            return _wrong(f"{name}: an output came after its finish_reason")
        first = len(choice.token_ids)
        choice.add(output)
        difference = _first_difference(expected.token_ids, choice.token_ids, first)
        if difference:
            return _wrong(f"{name}, {difference}")
        return _end_of_choice(name, choice, expected) if choice.finish_reason else None

    def end(self) -> Verdict:
        open_choices = [i for i, choice in enumerate(self._choices) if not choice.finish_reason]
        if not open_choices:
            return Verdict(Outcome.EXACT)
        index = open_choices[0]
        came, due = len(self._choices[index].token_ids), len(self._expected[index].token_ids)
        return Verdict(
            Outcome.TRUNCATED,
            f"the stream ended without a finish_reason of choice {index}, after {came} of "
            f"{due} tokens",
        )


def _wrong(detail: str) -> Verdict:
    return Verdict(Outcome.WRONG, detail)


def _first_difference(due: Sequence[int], came: Sequence[int], first: int) -> str:
    """In words, of the tokens from `first` on; empty where there is none."""
    for index in range(first, len(came)):
        if index >= len(due):
            return f"token {index}: {came[index]} came after the last that was due"
        if came[index] != due[index]:
            return (
                f"token {index}: {came[index]} came, {due[index]} was due{_hint(due, came, index)}"
            )
    return ""


def _hint(due: Sequence[int], came: Sequence[int], index: int) -> str:
    if index and came[index] == due[index - 1]:
        return f", as if token {index - 1} had come twice"
    if index + 1 < len(due) and came[index] == due[index + 1]:
        return f", as if token {index} were missing"
    return ""


def _end_of_choice(name: str, choice: _Choice, expected: Completion) -> Verdict | None:
    """What is wrong with a choice that says it is done."""
    came, reason = choice.whole(), choice.finish_reason
    if len(came.token_ids) < len(expected.token_ids):
        return Verdict(
            Outcome.TRUNCATED,
            f"{name} ended with finish_reason {reason!r} after {len(came.token_ids)} of "
            f"{len(expected.token_ids)} tokens",
        )
    if reason != expected.finish_reason:
        return _wrong(f"{name}: finish_reason {reason!r} instead of {expected.finish_reason!r}")
    if came.text != expected.text:
        return _wrong(f"{name}: text {came.text!r} instead of {expected.text!r}")
    if _counts(came.usage) != _counts(expected.usage):
        return _wrong(f"{name}: usage {came.usage} instead of {expected.usage}")
    return None


def _counts(usage: Usage | None) -> tuple[int, int] | None:
    """Without cached_tokens, which depend on what else has run."""
    return None if usage is None else (usage.prompt_tokens, usage.completion_tokens)
