"""All processes of a cluster are replaced, one after the other, under load: no request notices.

By others of the same release, and of the previous release by those of this one, so that every pair
of roles meets in both mixes.
"""

import asyncio
import io
import subprocess
import sys
import tarfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.processes import environment
from support.rolling import RollingCluster, roll

# The release before this one. The steps of a release in CONTRIBUTING.md move it to the tag of the
# release that is then the previous one.
PREVIOUS_RELEASE = "8bdfb7d8febfee903a251c2fa42b7b73c3c32e1b"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def previous_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its sources. Skips where the history of this checkout does not go back to it."""
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
    return tree


def test_processes_of_the_previous_release_run_its_own_code(previous_release: Path) -> None:
    packages = ("epserve", "gateway", "attn_service", "expert_service", "moe_core")
    told = f"import {', '.join(packages)}\nfor m in ({', '.join(packages)}): print(m.__path__[0])"
    command = [sys.executable, "-P", "-c", told]
    done = subprocess.run(
        command, env=environment(previous_release), capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(previous_release / name) for name in packages]


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
