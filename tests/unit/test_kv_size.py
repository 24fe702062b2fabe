"""How many KV blocks a process has: the settings, what is measured, and what a group agrees on."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attn_service import kv_budget
from attn_service.kv_agreement import KvOffer, agree, settle
from attn_service.kv_budget import num_kv_blocks
from attn_service.settings import AttnSettings
from attn_service.tensor_parallel import GroupLostError, GroupRank
from moe_core import memory
from moe_core.config.kv_cache_size import check_kv_cache_size, parse_bytes
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import ConfigError
from moe_core.memory import available_memory
from moe_core.model.kv_cache import KvCache, bytes_per_token
from support.moe_configs import deepseek_v3_model

CPU = torch.device("cpu")
SETTINGS = AttnSettings(gateway="127.0.0.1:1", model=Path("model"))
MODEL = deepseek_v3_model()
PARALLEL = ParallelConfig(attn_devices=2).with_model(MODEL)
BLOCK_BYTES = 16 * bytes_per_token(MODEL, True, 2, torch.float32)
GIB = 1024**3


def blocks(**changes: object) -> int:
    return num_kv_blocks(replace(SETTINGS, **changes), MODEL, PARALLEL, torch.float32, CPU)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1048576", 1048576),
        ("2GiB", 2 * GIB),
        ("1.5 gib", 3 * GIB // 2),
        ("512MB", 512_000_000),
        ("0.1KB", 100),
        ("7B", 7),
    ],
)
def test_bytes_are_read_with_their_unit(text: str, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "2 GB 3", "1e9", "2GIBI", "nan"])
def test_what_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^kv_cache_memory=.*; nearest valid: 2GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((64, 10, None), r"^kv_cache_tokens=64: cannot be combined with kv_cache_memory=10:"),
        ((None, 10, 0.5), r"^kv_cache_memory=10: cannot .* with memory_utilization=0\.5:"),
        ((64, 10, 0.5), r"^kv_cache_tokens=64: .* kv_cache_memory=10 and memory_utilization=0\.5:"),
        ((None, 0, None), r"^kv_cache_memory=0: must be at least 1 byte"),
        ((None, None, 0.0), r"^memory_utilization=0\.0: must be above 0 and at most 1"),
        ((None, None, 1.1), r"^memory_utilization=1\.1: must be above 0 and at most 1"),
        ((None, None, float("nan")), r"^memory_utilization=nan: must be above 0"),
    ],
)
def test_sizes_that_contradict_each_other_or_the_rules_are_refused(
    given: tuple[int | None, int | None, float | None], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_kv_cache_size(*given)
    with pytest.raises(ConfigError, match=message):
        AttnSettings("127.0.0.1:1", Path("model"), **dict(zip(SIZES, given, strict=True)))


SIZES = ("kv_cache_tokens", "kv_cache_memory", "memory_utilization")


def test_a_memory_size_holds_as_many_whole_blocks_as_its_bytes() -> None:
    count = blocks(kv_cache_memory=5 * BLOCK_BYTES + BLOCK_BYTES - 1)
    assert count == 5
    cache = KvCache.allocate(MODEL, True, 2, count, 16, torch.float32, CPU)
    assert cache.nbytes == 5 * BLOCK_BYTES


def test_a_memory_size_below_one_block_is_refused_with_the_bytes() -> None:
    rule = rf"block_size=16 tokens takes {BLOCK_BYTES} bytes; nearest valid: {BLOCK_BYTES}"
    with pytest.raises(ConfigError, match=rf"^kv_cache_memory={BLOCK_BYTES - 1}: .*{rule}"):
        blocks(kv_cache_memory=BLOCK_BYTES - 1)


def test_a_utilization_takes_its_part_of_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 10 * BLOCK_BYTES)
    assert blocks(memory_utilization=0.75) == 7
    with pytest.raises(ConfigError, match=r"^memory_utilization=0\.05: leaves \d+ bytes of cpu"):
        blocks(memory_utilization=0.05)


def test_cuda_counts_the_whole_device_and_all_that_is_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GIB, 80 * GIB))
    assert memory.memory_budget(torch.device("cuda:0"), 0.75) == 50 * GIB
    assert memory.memory_budget(torch.device("cuda:0"), 0.1) == -2 * GIB


def test_memory_that_cannot_be_read_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(device: torch.device, fraction: float) -> int:
        raise FileNotFoundError("/proc/meminfo")

    monkeypatch.setattr(kv_budget, "memory_budget", unreadable)
    with pytest.raises(ConfigError, match=r"^memory_utilization=0\.5: .*set kv_cache_memory"):
        blocks(memory_utilization=0.5)


def test_this_machine_has_memory_available() -> None:
    assert 0 < available_memory() < 2**50


def machine(root: Path, cgroup: str, **groups: tuple[str, str, str]) -> Path:
    """A root with 100 GiB available; groups: directory below sys/fs/cgroup (with _ for /) to
    limit, use and reclaimable bytes."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemFree: 1 kB\nMemAvailable: {100 * GIB // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, (limit, used, reclaimable) in groups.items():
        directory = root / "sys/fs/cgroup" / name.replace("_", "/")
        directory.mkdir(parents=True, exist_ok=True)
        version_1 = "/memory" in f"/{name}".replace("_", "/")
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if version_1
            else ("memory.max", "memory.current", "inactive_file")
        )
        (directory / names[0]).write_text(f"{limit}\n")
        (directory / names[1]).write_text(f"{used}\n")
        (directory / "memory.stat").write_text(f"anon 5\n{names[2]} {reclaimable}\n")
    return root


def test_without_a_limit_the_machines_memory_counts(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/a\n", a=("max", "5", "0"))
    assert available_memory(root) == 100 * GIB


def test_the_tightest_group_on_the_way_up_counts(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        "0::/a/b\n",
        a=(str(8 * GIB), str(5 * GIB), str(1 * GIB)),
        a_b=(str(20 * GIB), str(2 * GIB), "0"),
    )
    assert available_memory(root) == 4 * GIB


def test_a_version_1_group_counts_even_where_only_its_mounts_root_is_seen(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        "4:memory:/unseen/group\n0::/\n",
        memory=(str(6 * GIB), str(2 * GIB), str(GIB)),
    )
    assert available_memory(root) == 5 * GIB


def test_ranks_that_measured_take_the_least() -> None:
    assert settle([KvOffer(90, 16, True), KvOffer(70, 16, True)]) == 70
    assert settle([KvOffer(90, 16, False), KvOffer(90, 16, False)]) == 90


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (KvOffer(70, 16, False), r"^KV blocks by tp rank=\[90, 70\]: .*kv_cache_tokens"),
        (KvOffer(70, 16, True), r"^KV blocks by tp rank=\[90, 70\]"),
        (KvOffer(90, 32, False), r"^block_size=\[16, 32\]: must be the same"),
    ],
)
def test_set_sizes_that_differ_are_refused(second: KvOffer, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settle([KvOffer(90, 16, False), second])


class FakeStore:
    """A TCPStore's methods over a dict that the ranks share."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


async def agreed(*offers: KvOffer) -> tuple[list[object], list[int]]:
    """Each rank's result or error, and what rank 0 accepted before anybody else knew."""
    store = FakeStore()
    accepted: list[int] = []

    def accept(num_blocks: int) -> None:
        assert not any("outcome" in key for key in store.values)
        accepted.append(num_blocks)

    ranks = [GroupRank(0, each, len(offers)) for each in range(len(offers))]
    calls = [
        agree(rank, store, offer, accept, 5.0) for rank, offer in zip(ranks, offers, strict=True)
    ]
    return await asyncio.gather(*calls, return_exceptions=True), accepted


async def test_all_ranks_learn_the_agreed_number_after_the_leader_accepts_it() -> None:
    assert await agreed(KvOffer(90, 16, True), KvOffer(70, 16, True)) == ([70, 70], [70])


async def test_a_refusal_is_told_to_all_ranks() -> None:
    (leader, follower), accepted = await agreed(KvOffer(9, 16, False), KvOffer(7, 16, False))
    assert isinstance(leader, ConfigError)
    assert isinstance(follower, ConfigError)
    assert str(leader) == str(follower)
    assert accepted == []


async def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(GroupLostError, match=r"no kv/offer of tp_rank 1 .*within 0\.05 s"):
        await agree(GroupRank(0, 0, 2), FakeStore(), KvOffer(9, 16, True), print, 0.05)
