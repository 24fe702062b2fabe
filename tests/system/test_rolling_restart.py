"""All processes of a cluster are replaced, one after the other, under load: no request notices.

By others of the same release, and of the previous release by those of this one, so that every pair
of roles meets in both mixes.
"""

import asyncio
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.processes import OWN_PYTHON
from support.rolling import RollingCluster, roll

# The release before this one. The steps of a release in CONTRIBUTING.md move it to the tag of the
# release that is then the previous one.
PREVIOUS_RELEASE = "8bdfb7d8febfee903a251c2fa42b7b73c3c32e1b"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def previous_release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Its checkout, with its own libraries installed as it wants them. Skips where the history of
    this checkout does not go back to it."""
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", PREVIOUS_RELEASE], capture_output=True
    )
    if archive.returncode != 0:
        pytest.skip(
            f"needs the previous release, {PREVIOUS_RELEASE}, which the history of this checkout "
            f"lacks (git fetch --unshallow would do): {archive.stderr.decode().strip()}"
        )
    tree = tmp_path_factory.mktemp("previous-release")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(tree, filter="data")
    install = ["make", "-C", str(tree), "install", f"PYTHON={sys.executable}"]
    # A make around these tests says to its children how it was called itself.
    outer = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        install, env=outer, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout
    yield tree
    shutil.rmtree(tree)  # more than a gigabyte, which pytest would keep


def test_processes_of_the_previous_release_run_its_own_code_on_its_own_libraries(
    previous_release: Path,
) -> None:
    packages = ("epserve", "gateway", "attn_service", "expert_service", "moe_core")
    names = ", ".join(("sys", "torch", *packages))
    told = f"import {names}\nfor m in ({', '.join(packages)}): print(m.__path__[0])"
    told += "\nprint(sys.prefix, torch.__path__[0].startswith(sys.prefix))"
    command = [str(previous_release / OWN_PYTHON), "-P", "-c", told]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *found, libraries = done.stdout.splitlines()
    assert found == [str(previous_release / name) for name in packages]
    assert libraries == f"{previous_release / '.venv'} True"


def test_a_cluster_of_the_previous_release_is_replaced_process_by_process(
    previous_release: Path,
) -> None:
    with ExitStack() as stack:
        cluster = RollingCluster(stack, previous_release)
        # Both halves of both tiers have met both gateways by the end.
        names = ("expert 0", "attn 0", "gateway 0", "attn 1", "expert 1")
        asyncio.run(roll(cluster, names, None))


def test_a_cluster_goes_back_to_the_previous_release_half_way(previous_release: Path) -> None:
    with ExitStack() as stack:
        cluster = RollingCluster(stack, None)
        asyncio.run(roll(cluster, ("attn 1", "expert 1", "gateway 0"), previous_release))


def test_all_processes_of_one_release_are_restarted_one_after_the_other() -> None:
    with ExitStack() as stack:
        cluster = RollingCluster(stack, None)
        names = ("attn 0", "attn 1", "expert 0", "expert 1", "gateway 0")
        asyncio.run(roll(cluster, names, None))
