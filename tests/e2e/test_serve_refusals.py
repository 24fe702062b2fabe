"""What `epserve serve` refuses before it starts a process."""

import socket
from pathlib import Path

import pytest
import torch

from support.processes import TINY_MODEL, epserve


def refused(*arguments: str) -> str:
    done = epserve("serve", *arguments)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        error = refused("--model", str(TINY_MODEL), "--grpc-port", port)
    assert f"grpc_port={port}: cannot listen on 127.0.0.1:{port}: Address already in use" in error


def test_a_missing_model_directory(tmp_path: Path):
    assert "must be an existing directory" in refused("--model", str(tmp_path / "nowhere"))


def test_a_directory_without_a_checkpoint(tmp_path: Path):
    assert "must hold a config.json" in refused("--model", str(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there():
    error = refused("--model", str(TINY_MODEL), "--device", "cuda", "--grpc-port", "0")
    assert "device='cuda'" in error
    assert "nearest valid: cpu" in error


def test_a_layout_that_cannot_be():
    error = refused(
        *("--model", str(TINY_MODEL), "--expert-devices", "4", "--ep-size", "2"),
        *("--expert-parallel-degree", "2"),
    )
    assert "expert_parallel_degree=2" in error
    assert "ep_size=2" in error
