"""A training run that is stopped and taken up again ends as one that was not."""

from pathlib import Path

import pytest
import torch

from tools.tiny_training import ModelShape, Trainer, TrainingPlan

SHAPE = ModelShape(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
)


def run(steps: int, saved: Path | None = None) -> Trainer:
    plan = TrainingPlan(
        shape=SHAPE, steps=6, tokens_per_step=64, sequence_lengths=(16,), warmup_steps=2
    )
    stream = torch.randint(64, (500,), generator=torch.Generator().manual_seed(1))
    trainer = Trainer(plan, stream, saved)
    while trainer.step < steps:
        trainer.take_step()
    return trainer


def test_a_run_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    saved = tmp_path / "saved.safetensors"
    stopped = run(3)
    stopped.seconds = 1.25
    stopped._save(saved)
    resumed, whole = run(6, saved), run(6)
    assert resumed.seconds == pytest.approx(1.25)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert list(tmp_path.iterdir()) == [saved]
