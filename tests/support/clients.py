"""Other people's client programs, which live in an environment of their own.

Knows where `make test-system` puts them and that they must not ask a hub for anything.
"""

import os
import subprocess
from pathlib import Path

import pytest

ENVIRONMENT = Path(__file__).parents[2] / ".venv-clients"


def run_client(program: str, *arguments: str, directory: Path, timeout_s: float = 240.0) -> str:
    """What `program` prints, run in `directory`. Fails the test if its exit status is not 0."""
    path = ENVIRONMENT / "bin" / program
    if not path.exists():
        pytest.fail(f"{path} is missing: make test-system installs it")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(directory / "hub"), "NO_COLOR": "1"}
    done = subprocess.run(
        [str(path), *arguments],
        cwd=directory,
        env={**os.environ, **offline},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
