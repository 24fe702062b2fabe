"""The worker processes of the layout suite, and how a case is laid out over them.

Knows which rank runs in which worker and what a case's ranks are told. Knows neither torch nor
how a rank works (rank_worker.py does).
"""

import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moe_core.config.parallel import ParallelConfig

SUPPORT = Path(__file__).parent
ANSWER_TIMEOUT_S = 150.0
# Of tests that run on CPUs, of which there are few: more threads would only wait for each other.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "UCX_MM_ERROR_HANDLING": "y"}

Batch = Sequence[Sequence[int]]


class Worker:
    """One rank_worker process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SUPPORT / "rank_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(SUPPORT.parent)},
        )

    def tell(self, **command: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self) -> object:
        """Raises RuntimeError with the worker's own error."""
        stdout = self._process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], ANSWER_TIMEOUT_S)[0]:
            raise TimeoutError(f"rank worker {self._process.pid} did not answer")
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"rank worker ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["ok"]

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@dataclass
class RankPool:
    """Workers by role, started when they are first needed, reused by every case after that."""

    device: str = "cpu"
    _experts: list[Worker] = field(default_factory=list)
    _attention: list[Worker] = field(default_factory=list)
    _instance_epoch: int = 0

    def run(
        self,
        directory: Path,
        parallel: ParallelConfig,
        transport: str,
        batches: Sequence[Sequence[Batch]],
        num_tokens: int,
        dtype: str = "float32",
        num_microbatches: int = 1,
        dies: tuple[int, int, int] | None = None,
    ) -> list[dict]:
        """`batches[dp_rank]` are decoded one after the other by that DP group, all groups at
        once. dies: see rank_worker.Command. Returns each attention rank's answer: {"batches": …,
        "links": …, "lost": …, "lost_steps": …}."""
        self._instance_epoch += 1
        common = {
            "directory": str(directory),
            "parallel": _settings(parallel),
            "transport": transport,
            "dtype": dtype,
            "device": self.device,
            "instance_epoch": self._instance_epoch,
        }
        num_experts = 0 if transport == "local" else parallel.expert_devices
        experts = _first(self._experts, num_experts)
        try:
            ports = _ask(
                experts, [{**common, "op": "expert", "rank": r} for r in range(len(experts))]
            )
            common["experts"] = [f"127.0.0.1:{port}" for port in ports]
            common["num_microbatches"] = num_microbatches
            common["dies"] = dies
            return self._run_attention(common, parallel, batches, num_tokens)
        except (TimeoutError, RuntimeError):
            self.close()  # what state the workers are in is anybody's guess
            raise
        finally:
            if self._experts:
                _ask(experts, [{"op": "stop"}] * len(experts))

    def _run_attention(
        self,
        common: dict[str, object],
        parallel: ParallelConfig,
        batches: Sequence[Sequence[Batch]],
        num_tokens: int,
    ) -> list[dict]:
        workers = _first(self._attention, parallel.attn_devices)
        commands = []
        for rank, worker in enumerate(workers):
            dp_rank, tp_rank = parallel.attention_ranks(rank)
            if parallel.tp_size > 1 and tp_rank == 0:
                worker.tell(**common, op="store")
                common["store_port"] = worker.answer()
            work = {"batches": batches[dp_rank], "num_tokens": num_tokens}
            commands.append({**common, **work, "op": "attn", "rank": rank})
        return _ask(workers, commands)

    def close(self) -> None:
        for worker in (*self._attention, *self._experts):
            worker.close()
        self._attention.clear()
        self._experts.clear()


def _settings(parallel: ParallelConfig) -> dict[str, object]:
    return {name: getattr(parallel, name) for name in ParallelConfig.__dataclass_fields__}


def _first(workers: list[Worker], count: int) -> list[Worker]:
    while len(workers) < count:
        workers.append(Worker())
    return workers[:count]


def _ask(workers: Sequence[Worker], commands: Sequence[dict[str, object]]) -> list:
    """All are told before any is waited for."""
    for worker, command in zip(workers, commands, strict=True):
        worker.tell(**command)
    return [worker.answer() for worker in workers]
