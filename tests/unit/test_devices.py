"""What the settings device, dtype and threads accept, and the link spec that follows."""

import pytest
import torch

from moe_core.config.parallel import ParallelConfig
from moe_core.devices import resolve_device, resolve_dtype, set_threads
from moe_core.errors import ConfigError
from moe_core.exchange import link_spec
from support.moe_configs import moe_model


@pytest.mark.parametrize("setting", ["", "gpu", "cpu:1", "meta"])
def test_what_is_no_device_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError):
        resolve_device(setting)


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError):
        resolve_device("cuda")


def test_cuda_is_the_first_gpu_and_auto_prefers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda:0")
    assert resolve_device("cuda:1") == torch.device("cuda:1")


def test_auto_dtype_is_the_checkpoints_own() -> None:
    assert resolve_dtype("auto", "bfloat16") is torch.bfloat16
    assert resolve_dtype("float64", "bfloat16") is torch.float64
    with pytest.raises(ConfigError, match="dtype='int8'"):
        resolve_dtype("int8", "bfloat16")


def test_no_threads_are_refused() -> None:
    set_threads(None)
    with pytest.raises(ConfigError, match="threads=0"):
        set_threads(0)


@pytest.mark.parametrize(("shared_experts", "columns"), [("attention", 2), ("expert", 3)])
def test_a_shared_expert_on_the_expert_tier_is_one_more_column(
    shared_experts: str, columns: int
) -> None:
    parallel = ParallelConfig(shared_experts=shared_experts)
    spec = link_spec(
        moe_model(top_k=2),
        parallel,
        model_fingerprint="f",
        dtype=torch.float32,
        spare_slots=2,
    )
    assert (spec.num_columns, spec.slot_count) == (columns, 5)
