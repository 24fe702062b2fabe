"""A process that measures what its parent asks for: one JSON line in, one out.

Knows the two ends of such a pair of pipes. Knows nothing of what is measured.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Child:
    """`script`, beside this file, run by `python`; built once it has said that it is ready."""

    def __init__(self, script: str, *arguments: str, python: str = sys.executable) -> None:
        search = os.pathsep.join(str(path) for path in (HERE, HERE.parent / "tests"))
        self._script = script
        self._child = subprocess.Popen(
            [python, str(HERE / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": search},
        )
        self.pid = self._child.pid
        self.ready = self._answer()

    def ask(self, **work: object) -> dict[str, Any]:
        """Its answer. Raises RuntimeError when it has ended instead."""
        assert self._child.stdin is not None
        print(json.dumps(work), file=self._child.stdin, flush=True)
        return self._answer()

    def decode(self, batch: int, prompt_tokens: int, num_tokens: int) -> float:
        """Decode tokens/s, from a child that answers such work."""
        answer = self.ask(batch=batch, prompt_tokens=prompt_tokens, num_tokens=num_tokens)
        return float(answer["tokens_per_s"])

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait(30)

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._script} ended with status {self._child.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def say(**answer: object) -> None:
    """In the child: one answer."""
    print(json.dumps(answer), flush=True)


async def until_closed() -> None:
    """In a child that is asked for nothing: until the parent closes."""
    await asyncio.to_thread(sys.stdin.read)


def asked() -> Iterator[dict[str, Any]]:
    """In the child: what is asked for, until the parent closes."""
    for line in sys.stdin:
        yield json.loads(line)
