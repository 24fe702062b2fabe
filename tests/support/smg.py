"""A real `smg` process in front of a gRPC worker. Knows its command line; waits until it serves."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 60.0


class Smg:
    """`base` is the URL of its HTTP server."""

    def __init__(self, base: str) -> None:
        self.base = base

    def post(self, path: str, body: dict[str, Any]) -> Any:  # noqa: ANN401
        """The JSON answer. Raises urllib.error.HTTPError for any status but 200."""
        with self._open(path, body) as answer:
            return json.load(answer)

    def post_stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The JSON values of an event stream, which must end with [DONE]."""
        with self._open(path, {**body, "stream": True}) as answer:
            lines = [line.decode().strip() for line in answer]
        events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]

    def serves(self, model: str) -> bool:
        try:
            with urllib.request.urlopen(f"{self.base}/v1/models", timeout=5) as answer:
                return model in [card["id"] for card in json.load(answer)["data"]]
        except (urllib.error.URLError, ConnectionError):
            return False

    def _open(self, path: str, body: dict[str, Any]) -> Any:  # noqa: ANN401
        request = urllib.request.Request(
            self.base + path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=CALL_TIMEOUT_S)


@contextmanager
def smg_in_front(worker: str, model: Path, log: Path) -> Iterator[Smg]:
    """`smg` driving the engine at `worker` (host:port), which serves `model` under its directory's
    name. What it prints goes to `log`."""
    # It takes no port 0. Two are found free at once, so that they differ.
    with ExitStack() as probes:
        port, metrics_port = (
            probes.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            for _ in range(2)
        )
    command = [
        *(sys.executable, "-m", "smg", "launch", "--backend", "vllm"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)),
        *("--worker-urls", f"grpc://{worker}", "--model-path", str(model)),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        smg = Smg(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + START_TIMEOUT_S
        while not smg.serves(model.name):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield smg
    finally:
        process.kill()
        process.wait(10)
