"""Experts as bytes, and from whom a process takes them."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from expert_service.expert_bytes import ExpertForm
from expert_service.expert_sources import PeerSource, holders
from moe_core.checkpoint.expert_loader import ExpertShard
from moe_core.cluster import ClusterState, Member, MemberState, Role
from moe_core.config.parallel import ParallelConfig
from moe_core.errors import CheckpointError, PeerLostError, UnavailableError
from moe_core.model.matrix_forms import MatrixForm, values_of
from moe_core.model.weight_forms import expert_in_form
from moe_core.model.weights import ExpertWeights
from moe_core.placement import ExpertPlacement
from moe_core.transport.handover import UnitName
from support.expert_tier import CPU, cut_layer, whole_layer
from support.matrix_forms import ARRANGED
from support.moe_configs import moe_model
from support.placements import after

MODEL = moe_model(num_experts=8, top_k=2, num_layers=3)
PARALLEL = ParallelConfig(expert_devices=4, ep_size=2).with_model(MODEL)
PLACEMENT = after(
    ExpertPlacement.initial(MODEL, PARALLEL), {2: [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 6, 7]]}
)


def shard_of(
    dtype: torch.dtype = torch.float64, form: MatrixForm = MatrixForm.PLAIN
) -> ExpertShard:
    return ExpertShard(1, 2, dtype, CPU, form)


def weights_of(logical: int, dtype: torch.dtype = torch.float64) -> ExpertWeights:
    layer = cut_layer(whole_layer(MODEL, 2, dtype), (logical,), 1, 2, False)
    return ExpertWeights(layer.w13[0], layer.w2[0])


def stored(form: ExpertForm, weights: ExpertWeights) -> tuple[Tensor, bytes]:
    memory = torch.empty(form.num_bytes, dtype=torch.uint8)
    return memory, form.store(weights, memory)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_an_expert_survives_its_bytes(dtype: torch.dtype) -> None:
    form = ExpertForm.of(MODEL, shard_of(dtype))
    weights = weights_of(3, dtype)
    assert form.num_bytes == weights.w13.nbytes + weights.w2.nbytes
    memory, digest = stored(form, weights)
    restored = form.restore(memory, digest)
    memory.zero_()  # which the next expert's bytes overwrite
    assert torch.equal(restored.w13, weights.w13)
    assert torch.equal(restored.w2, weights.w2)


@pytest.mark.parametrize("matrix_form", ARRANGED)
def test_an_expert_in_a_form_gives_the_bytes_that_it_was_made_from(matrix_form: MatrixForm) -> None:
    form = ExpertForm.of(MODEL, shard_of(torch.bfloat16, matrix_form))
    plain = weights_of(3, torch.bfloat16)
    memory, digest = stored(form, expert_in_form(plain, matrix_form))
    assert (memory == stored(form, plain)[0]).all()
    restored = form.restore(memory, digest)
    assert not isinstance(restored.w2, Tensor)
    assert torch.equal(values_of(restored.w2).float(), values_of(plain.w2).float())


def test_bytes_that_are_not_what_was_sent_are_refused() -> None:
    form = ExpertForm.of(MODEL, shard_of())
    memory, digest = stored(form, weights_of(3))
    memory[17] ^= 1
    with pytest.raises(CheckpointError, match="bytes of an expert came damaged: their blake3 is"):
        form.restore(memory, digest)


def member(rank: int, state: MemberState = MemberState.READY) -> Member:
    return Member(Role.EXPERT, rank, 1, f"h:{rank}", "cpu", state, 100 + rank, "here")


def cluster(*states: MemberState) -> ClusterState:
    members = tuple(member(rank, state) for rank, state in enumerate(states))
    return ClusterState(1, PARALLEL, members, PLACEMENT)


READY, DRAINING = MemberState.READY, MemberState.DRAINING


def test_holders_are_ready_and_hold_the_same_shard() -> None:
    def ranks(logical: int, *states: MemberState) -> list[int]:
        return [m.rank for m in holders(cluster(*states), 2, logical, 1, 2)]

    assert ranks(0, READY, READY, READY, READY) == [1]
    assert ranks(7, READY, READY, READY, READY) == [3]
    assert ranks(2, READY, READY, READY, READY) == [1, 3]
    assert ranks(3, READY, READY, READY, READY) == [3, 1]  # another one is asked first
    assert ranks(2, READY, DRAINING, READY, READY) == [3]
    assert ranks(0, READY, DRAINING, READY, READY) == []


@dataclass
class Peer:
    """Gives every expert of layer 2; `mistake` says what goes wrong."""

    form: ExpertForm
    rank: int
    mistake: str
    transport: str = "grpc"
    closed: bool = False

    async def fetch(self, name: UnitName, what: str) -> tuple[Tensor, bytes] | None:
        _, logical = name
        if self.mistake == "lost":
            raise PeerLostError("gone")
        if self.mistake == "dropped":
            return None
        memory, digest = stored(self.form, weights_of(logical))
        return memory, b"another" if self.mistake == "damaged" else digest

    async def close(self) -> None:
        self.closed = True


@dataclass
class Disk:
    read: list[tuple[int, int]] = field(default_factory=list)

    async def expert(self, layer_id: int, logical: int, state: ClusterState) -> ExpertWeights:
        self.read.append((layer_id, logical))
        return weights_of(logical)


@dataclass
class Site:
    """A process of rank 5, which holds nothing yet."""

    mistakes: dict[int, str] = field(default_factory=dict)
    opened: list[Peer] = field(default_factory=list)
    disk: Disk = field(default_factory=Disk)

    def __post_init__(self) -> None:
        self.form = ExpertForm.of(MODEL, shard_of())
        self.source = PeerSource(self.form, 5, self._connect, self.disk)

    async def _connect(self, peer: Member) -> Peer:
        if self.mistakes.get(peer.rank) == "unreachable":
            raise UnavailableError("nobody listens")
        self.opened.append(Peer(self.form, peer.rank, self.mistakes.get(peer.rank, "")))
        return self.opened[-1]

    async def get(self, logical: int) -> None:
        state = cluster(READY, READY, READY, READY)
        found = await self.source.expert(2, logical, state)
        assert torch.equal(values_of(found.w13), values_of(weights_of(logical).w13))


async def test_experts_come_from_peers_over_one_stream_each_until_there_is_nothing_to_do() -> None:
    site = Site()
    for logical in (0, 1, 6, 2):
        await site.get(logical)
    assert [peer.rank for peer in site.opened] == [1, 3]
    assert site.disk.read == []
    assert site.source.bytes_fetched == 4 * site.form.num_bytes
    await site.source.rest()
    assert all(peer.closed for peer in site.opened)


@pytest.mark.parametrize("mistake", ["unreachable", "lost", "damaged"])
async def test_a_peer_that_fails_is_not_asked_again_and_the_disk_is_read(mistake: str) -> None:
    site = Site({1: mistake})
    await site.get(0)
    await site.get(1)
    assert site.disk.read == [(2, 0), (2, 1)]
    assert site.source.bytes_fetched == 0
    assert len(site.opened) == (mistake != "unreachable")
    assert all(peer.closed for peer in site.opened)
    await site.get(3)  # of which peer 3 has a copy
    assert site.disk.read == [(2, 0), (2, 1)]
    await site.source.rest()
    site.mistakes.clear()
    await site.get(0)
    assert len(site.disk.read) == 2


async def test_an_expert_that_the_peer_has_dropped_is_read_from_disk() -> None:
    site = Site({1: "dropped"})
    await site.get(0)
    assert site.disk.read == [(2, 0)]
    assert not site.opened[0].closed


async def test_a_process_that_closes_asks_nobody() -> None:
    site = Site()
    await site.source.close()
    await site.get(0)
    assert site.opened == []


async def test_a_process_does_not_ask_itself() -> None:
    site = Site()
    site.source = PeerSource(site.form, 1, site._connect, site.disk)
    await site.get(0)
    assert site.opened == []
