"""An expert end in a process of its own, to be killed: `python -m support.exchange_peer TRANSPORT
PORT EPOCH [HOST]` prints its port and serves until its stdin ends. `PeerProcess` runs one."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import torch
import uvloop

from moe_core.transport.base import Identity
from support.exchange_ends import EXPERT, SPEC, serve

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


class PeerProcess:
    """Use it as a context manager: nothing of it is left afterwards."""

    def __init__(
        self,
        transport: str,
        *,
        port: int = 0,
        epoch: int = 22,
        host: str = "127.0.0.1",
        wrapper: tuple[str, ...] = (),
    ) -> None:
        command = [*wrapper, sys.executable, "-m", "support.exchange_peer"]
        command += [transport, str(port), str(epoch), host]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT / "tests",
            env=ENVIRONMENT,
        )
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        if not first.strip().isdigit():
            self.__exit__()
            raise RuntimeError(f"the expert end said {first!r} where its port was expected")
        self.port = int(first)
        self.address = f"{host}:{self.port}"

    def __enter__(self) -> "PeerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=10)


async def main(transport: str, port: int, epoch: int, host: str = "127.0.0.1") -> None:
    identity = Identity(EXPERT.rank, EXPERT.world, epoch)
    async with serve(SPEC, transport, identity=identity, port=port, host=host) as expert:
        print(expert.address.rpartition(":")[2], flush=True)
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), ended.set)
        await ended.wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]))
