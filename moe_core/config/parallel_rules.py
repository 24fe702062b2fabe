"""The rules that the parallel settings keep (DESIGN section 2), each with the values to suggest.

Knows settings and a model's config. Knows not what is done about a broken rule: config.parallel
refuses it, and finds the nearest of its candidates.

A rule is a generator that yields what it breaks.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_core.config.model import ModelConfig

if TYPE_CHECKING:
    from moe_core.config.parallel import ParallelConfig

SHARED_EXPERTS_ON = ("attention", "expert")
FP8_BLOCK = 128  # rows and columns that share one scale in "fp8_block_128" checkpoints
POWERS_OF_TWO = tuple(1 << exponent for exponent in range(17))


@dataclass(frozen=True, slots=True)
class Broken:
    """`otherwise` is the setting to name where no value of `setting` would do."""

    setting: str
    rule: str
    candidates: Iterable[object] = ()
    otherwise: str | None = None


def broken_rules(config: "ParallelConfig") -> Iterator[Broken]:
    """The rules that need no model. Later ones rely on earlier ones, so only the first counts."""
    yield from _broken_types(config)
    for size, devices in (("dp_size", "attn_devices"), ("ep_size", "expert_devices")):
        value = getattr(config, size)
        if not _is_count(value) or (value.bit_count() != 1 and not config.live):
            yield Broken(size, "must be a power of two", POWERS_OF_TWO)
        if getattr(config, devices) % getattr(config, size):
            rule = f"must divide {devices}={getattr(config, devices)}"
            yield Broken(size, rule, POWERS_OF_TWO)
    yield from _broken_degree(config)
    if config.num_redundant_experts and config.ep_size == 1:
        rule = "copies of one expert must be on different EP groups, and ep_size=1 has only one"
        yield Broken("num_redundant_experts", rule, (0,))
    if config.colocated and config.attn_devices != config.expert_devices:
        rule = (
            f"wants as many attention as expert devices, not attn_devices={config.attn_devices} "
            f"and expert_devices={config.expert_devices}"
        )
        yield Broken("colocated", rule, (False,))


def _broken_types(config: "ParallelConfig") -> Iterator[Broken]:
    for setting in ("attn_devices", "expert_devices"):
        if not _is_count(getattr(config, setting)):
            yield Broken(setting, "must be an integer of at least 1", POWERS_OF_TWO)
    if not (config.enable_mla is None or isinstance(config.enable_mla, bool)):
        yield Broken("enable_mla", "must be true, false or unset", (True, False))
    redundant = config.num_redundant_experts
    if not (_is_count(redundant) or (redundant == 0 and not isinstance(redundant, bool))):
        yield Broken("num_redundant_experts", "must be an integer of at least 0", (0, 1))
    if config.shared_experts not in SHARED_EXPERTS_ON:
        rule = f"must be one of {', '.join(SHARED_EXPERTS_ON)}"
        yield Broken("shared_experts", rule, SHARED_EXPERTS_ON)
    if not isinstance(config.colocated, bool):
        yield Broken("colocated", "must be true or false", (True, False))


def _broken_degree(config: "ParallelConfig") -> Iterator[Broken]:
    setting, degrees = "expert_parallel_degree", (0, 1, 2)
    degree = config.expert_parallel_degree
    if degree is None:
        return
    if isinstance(degree, bool) or degree not in degrees:
        yield Broken(setting, "must be 0 (off), 1 (broadcast) or 2 (targeted)", degrees)
    if degree == 0 and config.ep_size > 1:
        rule = f"switches expert parallelism off, which ep_size={config.ep_size} contradicts"
        yield Broken(setting, rule, degrees)
    if degree == 2 and config.ep_size != config.expert_devices:
        rule = (
            f"needs ep_size equal to expert_devices, not ep_size={config.ep_size} "
            f"and expert_devices={config.expert_devices}"
        )
        yield Broken(setting, rule, degrees)


def broken_for_model(config: "ParallelConfig", model: ModelConfig) -> Iterator[Broken]:
    yield from broken_rules(config)
    if config.enable_mla and model.mla is None:
        rule = f"{model.model_type} has no multi-head latent attention"
        yield Broken("enable_mla", rule, (False,))
    if config.shared_on_experts and not model.moe.n_shared_experts:
        rule = f"{model.model_type} has no shared expert that the expert tier could run"
        yield Broken("shared_experts", rule, ("attention",))
    for problem in _attention_cut_problems(model, config.tp_size, config.shared_on_experts):
        rule = f"makes tp_size = attn_devices / dp_size = {config.tp_size}, {problem}"
        yield Broken("dp_size", rule, POWERS_OF_TWO, otherwise="attn_devices")
    for problem in _expert_cut_problems(model, config.etp_size):
        rule = f"makes etp_size = expert_devices / ep_size = {config.etp_size}, {problem}"
        yield Broken("ep_size", rule, POWERS_OF_TWO, otherwise="expert_devices")
    yield from _broken_expert_counts(config, model.moe.num_experts)


def _attention_cut_problems(model: ModelConfig, tp: int, shared_on_experts: bool) -> Iterator[str]:
    if model.num_attention_heads % tp:
        yield f"which must divide num_attention_heads={model.num_attention_heads}"
    kv_heads = model.num_key_value_heads
    if model.mla is None and kv_heads % tp and tp % kv_heads:
        yield f"which must divide, or be a multiple of, num_key_value_heads={kv_heads}"
    if len(model.moe_layer_ids) < model.num_hidden_layers and model.intermediate_size % tp:
        yield f"which must divide intermediate_size={model.intermediate_size}"
    shared = model.moe.n_shared_experts * model.moe.moe_intermediate_size
    if not shared_on_experts and shared % tp:
        yield f"which must divide the shared expert's width {shared}"


def _expert_cut_problems(model: ModelConfig, etp: int) -> Iterator[str]:
    width = model.moe.moe_intermediate_size
    if width % etp:
        yield f"which must divide moe_intermediate_size={width}"
    elif etp > 1 and model.quantization == "fp8_block_128" and width // etp % FP8_BLOCK:
        yield f"which must cut moe_intermediate_size={width} on {FP8_BLOCK}-wide FP8 blocks"


def _broken_expert_counts(config: "ParallelConfig", num_experts: int) -> Iterator[Broken]:
    most = num_experts * (config.ep_size - 1)
    if config.num_redundant_experts > most:
        rule = (
            f"must be at most num_experts * (ep_size - 1) = {most}, since copies of one expert "
            "must be on different EP groups"
        )
        yield Broken("num_redundant_experts", rule, (most,))
    num_slots = num_experts + config.num_redundant_experts
    if config.ep_size > num_slots:
        rule = f"must be at most the {num_slots} experts, so that each EP group holds one"
        yield Broken("ep_size", rule, POWERS_OF_TWO)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
