"""The six parallel settings and what follows from them.

Knows the rules of DESIGN section 2, rank arithmetic, and how many experts a process of the
expert tier holds. Knows no process, device or address, and a model only by its config.

A rule is a generator that yields what it breaks. Refusing names the first broken rule, and the
nearest values that would do are found by trying: each suggested value has passed every rule.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Self, TypeVar

from moe_core.config.model import ModelConfig
from moe_core.errors import ConfigError

SHARED_EXPERTS_ON = ("attention", "expert")
FP8_BLOCK = 128  # rows and columns that share one scale in "fp8_block_128" checkpoints
_POWERS_OF_TWO = tuple(1 << exponent for exponent in range(17))
_NUM_SUGGESTIONS = 2
Config = TypeVar("Config", bound="ParallelConfig")


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """How the two tiers are cut. Raises ConfigError when built from values that cannot work.

    `enable_mla` None follows the model and `expert_parallel_degree` None follows ep_size;
    `with_model` returns a copy in which both are settled. `live`: of a cluster that runs, whose
    scaling may have left any number of whole groups; dp_size and ep_size need be no powers of two.
    """

    attn_devices: int = 1
    expert_devices: int = 1
    dp_size: int = 1
    ep_size: int = 1
    enable_mla: bool | None = None  # None: follows the model
    expert_parallel_degree: int | None = None  # None: 0 if ep_size == 1, else 1
    num_redundant_experts: int = 0
    shared_experts: str = "attention"  # or "expert"
    colocated: bool = False
    live: bool = field(default=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        _refuse_broken(self, _broken)

    def with_model(self, model: ModelConfig) -> Self:
        """This configuration settled for one model; settling it again changes nothing.

        Raises ConfigError where the model's heads, experts or widths cannot be cut this way.
        """
        _refuse_broken(self, lambda config: _broken_for_model(config, model))
        mla = model.mla is not None if self.enable_mla is None else self.enable_mla
        return replace(self, enable_mla=mla, expert_parallel_degree=self.degree)

    def resized(
        self,
        model: ModelConfig,
        *,
        attn_devices: int | None = None,
        expert_devices: int | None = None,
    ) -> Self:
        """The same groups, more or fewer of them, for a cluster of `model` that runs. Degree 0
        becomes 1 where experts are spread.

        Raises ConfigError where a tier would not be whole groups, or the model cannot be cut so.
        """
        variant = self
        for tier, devices, group in (
            ("attn_devices", attn_devices, self.tp_size),
            ("expert_devices", expert_devices, self.etp_size),
        ):
            if devices is None:
                continue
            _refuse_part_groups(tier, devices, group)
            variant = _with_devices(variant, tier, devices)
        # Both are set first: a colocated layout wants them alike.
        broken = next(_broken_for_model(variant, model), None)
        if broken is not None:
            asked = "attn_devices" if expert_devices is None else "expert_devices"
            raise _does_not_fit(variant, broken, asked, model)
        return variant

    def covering(self, attn_devices: int, expert_devices: int) -> Self:
        """The same groups, and no fewer processes than these; not checked against the model."""
        variant = self
        for tier, devices in (("attn_devices", attn_devices), ("expert_devices", expert_devices)):
            if devices > getattr(variant, tier):
                variant = _with_devices(variant, tier, devices)
        return variant

    @property
    def tp_size(self) -> int:
        """Attention tensor parallelism inside one DP group."""
        return self.attn_devices // self.dp_size

    @property
    def etp_size(self) -> int:
        """Expert tensor parallelism inside one EP group."""
        return self.expert_devices // self.ep_size

    @property
    def degree(self) -> int:
        """Level of expert parallelism: 0 off, 1 broadcast-all, 2 targeted."""
        if self.expert_parallel_degree is None:
            return 0 if self.ep_size == 1 else 1
        return self.expert_parallel_degree

    @property
    def shared_on_experts(self) -> bool:
        return self.shared_experts == "expert"

    def attention_ranks(self, rank: int) -> tuple[int, int]:
        """(dp_rank, tp_rank) of one process of the attention tier."""
        _require_rank("attention rank", rank, self.attn_devices)
        return divmod(rank, self.tp_size)

    def expert_ranks(self, rank: int) -> tuple[int, int]:
        """(ep_rank, etp_rank) of one process of the expert tier."""
        _require_rank("expert rank", rank, self.expert_devices)
        return divmod(rank, self.etp_size)


@dataclass(frozen=True, slots=True)
class _Broken:
    """`otherwise` is the setting to name where no value of `setting` would do."""

    setting: str
    rule: str
    candidates: Iterable[object] = ()
    otherwise: str | None = None


_Rules = Callable[[ParallelConfig], Iterator[_Broken]]


def _refuse_broken(config: ParallelConfig, rules: _Rules) -> None:
    broken = next(rules(config), None)
    if broken is None:
        return
    setting = broken.setting
    nearest = _nearest(config, rules, broken, setting)
    if not nearest and broken.otherwise is not None:
        setting = broken.otherwise
        nearest = _nearest(config, rules, broken, setting)
    raise ConfigError(setting, getattr(config, setting), broken.rule, nearest)


def _nearest(config: ParallelConfig, rules: _Rules, broken: _Broken, setting: str) -> list[object]:
    """The closest candidates with which nothing is broken; where another setting is wrong too,
    those with which the first broken rule is that other setting's."""
    value = getattr(config, setting)
    number = value if isinstance(value, int | float) else 0
    clean, rest = [], []
    for candidate in sorted(broken.candidates, key=lambda c: _distance(c, number)):
        remaining = next(rules(_variant(config, setting, candidate)), None)
        if remaining is None:
            clean.append(candidate)
        elif remaining.setting not in (broken.setting, setting):
            rest.append(candidate)
    return sorted((clean or rest)[:_NUM_SUGGESTIONS], key=lambda c: _distance(c, 0))


def _refuse_part_groups(tier: str, devices: int, group: int) -> None:
    most = _POWERS_OF_TWO[-1] // group * group
    if not group <= devices <= most or devices % group:
        below = devices // group * group
        rule = f"must be whole groups of {group} processes, {group} to {most} in all"
        nearest = {max(group, min(size, most)) for size in (below, below + group)}
        raise ConfigError(tier, devices, rule, sorted(nearest))


def _with_devices(config: Config, tier: str, devices: int) -> Config:
    """The same groups with another number of them, live and unchecked."""
    size, group = {
        "attn_devices": ("dp_size", config.tp_size),
        "expert_devices": ("ep_size", config.etp_size),
    }[tier]
    variant = _variant(config, tier, devices)
    object.__setattr__(variant, size, devices // group)
    degree = max(config.degree, 1) if variant.ep_size > 1 else config.degree
    object.__setattr__(variant, "expert_parallel_degree", degree)
    object.__setattr__(variant, "live", True)
    return variant


def _does_not_fit(
    config: ParallelConfig, broken: "_Broken", tier: str, model: ModelConfig
) -> ConfigError:
    """Why a running tier cannot have so many processes, and how many it can."""
    devices: int = getattr(config, tier)
    group = config.tp_size if tier == "attn_devices" else config.etp_size
    num_slots = model.moe.num_experts + config.num_redundant_experts
    sizes = range(group, group * num_slots + 1, group)
    fitting = (
        size
        for size in sorted(sizes, key=lambda size: abs(size - devices))
        if next(_broken_for_model(_with_devices(config, tier, size), model), None) is None
    )
    value = getattr(config, broken.setting)
    rule = f"{broken.setting}={value!r} {broken.rule}"
    return ConfigError(tier, devices, rule, sorted(islice(fitting, _NUM_SUGGESTIONS)))


def _distance(candidate: object, number: float) -> float:
    """Values that are no numbers are all equally far, and so keep their order."""
    return abs(candidate - number) if isinstance(candidate, int) else 0


def _variant(config: Config, setting: str, value: object) -> Config:
    """A copy with one value changed, unchecked: checking it would search for its nearest."""
    variant = copy.copy(config)
    object.__setattr__(variant, setting, value)
    return variant


def _broken(config: ParallelConfig) -> Iterator[_Broken]:
    """The rules that need no model. Later ones rely on earlier ones, so only the first counts."""
    yield from _broken_types(config)
    for size, devices in (("dp_size", "attn_devices"), ("ep_size", "expert_devices")):
        value = getattr(config, size)
        if not _is_count(value) or (value.bit_count() != 1 and not config.live):
            yield _Broken(size, "must be a power of two", _POWERS_OF_TWO)
        if getattr(config, devices) % getattr(config, size):
            rule = f"must divide {devices}={getattr(config, devices)}"
            yield _Broken(size, rule, _POWERS_OF_TWO)
    yield from _broken_degree(config)
    if config.num_redundant_experts and config.ep_size == 1:
        rule = "copies of one expert must be on different EP groups, and ep_size=1 has only one"
        yield _Broken("num_redundant_experts", rule, (0,))
    if config.colocated and config.attn_devices != config.expert_devices:
        rule = (
            f"wants as many attention as expert devices, not attn_devices={config.attn_devices} "
            f"and expert_devices={config.expert_devices}"
        )
        yield _Broken("colocated", rule, (False,))


def _broken_types(config: ParallelConfig) -> Iterator[_Broken]:
    for setting in ("attn_devices", "expert_devices"):
        if not _is_count(getattr(config, setting)):
            yield _Broken(setting, "must be an integer of at least 1", _POWERS_OF_TWO)
    if not (config.enable_mla is None or isinstance(config.enable_mla, bool)):
        yield _Broken("enable_mla", "must be true, false or unset", (True, False))
    redundant = config.num_redundant_experts
    if not (_is_count(redundant) or (redundant == 0 and not isinstance(redundant, bool))):
        yield _Broken("num_redundant_experts", "must be an integer of at least 0", (0, 1))
    if config.shared_experts not in SHARED_EXPERTS_ON:
        rule = f"must be one of {', '.join(SHARED_EXPERTS_ON)}"
        yield _Broken("shared_experts", rule, SHARED_EXPERTS_ON)
    if not isinstance(config.colocated, bool):
        yield _Broken("colocated", "must be true or false", (True, False))


def _broken_degree(config: ParallelConfig) -> Iterator[_Broken]:
    setting, degrees = "expert_parallel_degree", (0, 1, 2)
    degree = config.expert_parallel_degree
    if degree is None:
        return
    if isinstance(degree, bool) or degree not in degrees:
        yield _Broken(setting, "must be 0 (off), 1 (broadcast) or 2 (targeted)", degrees)
    if degree == 0 and config.ep_size > 1:
        rule = f"switches expert parallelism off, which ep_size={config.ep_size} contradicts"
        yield _Broken(setting, rule, degrees)
    if degree == 2 and config.ep_size != config.expert_devices:
        rule = (
            f"needs ep_size equal to expert_devices, not ep_size={config.ep_size} "
            f"and expert_devices={config.expert_devices}"
        )
        yield _Broken(setting, rule, degrees)


def _broken_for_model(config: ParallelConfig, model: ModelConfig) -> Iterator[_Broken]:
    yield from _broken(config)
    if config.enable_mla and model.mla is None:
        rule = f"{model.model_type} has no multi-head latent attention"
        yield _Broken("enable_mla", rule, (False,))
    if config.shared_on_experts and not model.moe.n_shared_experts:
        rule = f"{model.model_type} has no shared expert that the expert tier could run"
        yield _Broken("shared_experts", rule, ("attention",))
    for problem in _attention_cut_problems(model, config.tp_size, config.shared_on_experts):
        rule = f"makes tp_size = attn_devices / dp_size = {config.tp_size}, {problem}"
        yield _Broken("dp_size", rule, _POWERS_OF_TWO, otherwise="attn_devices")
    for problem in _expert_cut_problems(model, config.etp_size):
        rule = f"makes etp_size = expert_devices / ep_size = {config.etp_size}, {problem}"
        yield _Broken("ep_size", rule, _POWERS_OF_TWO, otherwise="expert_devices")
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


def _broken_expert_counts(config: ParallelConfig, num_experts: int) -> Iterator[_Broken]:
    most = num_experts * (config.ep_size - 1)
    if config.num_redundant_experts > most:
        rule = (
            f"must be at most num_experts * (ep_size - 1) = {most}, since copies of one expert "
            "must be on different EP groups"
        )
        yield _Broken("num_redundant_experts", rule, (most,))
    num_slots = num_experts + config.num_redundant_experts
    if config.ep_size > num_slots:
        rule = f"must be at most the {num_slots} experts, so that each EP group holds one"
        yield _Broken("ep_size", rule, _POWERS_OF_TWO)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _require_rank(what: str, rank: int, size: int) -> None:
    if not 0 <= rank < size:
        nearest = max(0, min(rank, size - 1))
        raise ConfigError(what, rank, f"must be from 0 to {size - 1}", (nearest,))
