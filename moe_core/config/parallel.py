"""The six parallel settings and what follows from them.

Knows rank arithmetic, and how a running cluster's sizes may change; what the settings must keep is
config.parallel_rules'. Knows no process, device or address, and a model only by its config.

Refusing names the first broken rule, and the nearest values that would do are found by trying: each
suggested value has passed every rule.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Self, TypeVar

from moe_core.config.model import ModelConfig
from moe_core.config.parallel_rules import POWERS_OF_TWO, Broken, broken_for_model, broken_rules
from moe_core.errors import ConfigError

_NUM_SUGGESTIONS = 2
_NUM_CHOICES = 3  # a setting of so few values is told all that would do
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
        _refuse_broken(self, broken_rules)

    def with_model(self, model: ModelConfig) -> Self:
        """This configuration settled for one model; settling it again changes nothing.

        Raises ConfigError where the model's heads, experts or widths cannot be cut this way.
        """
        _refuse_broken(self, lambda config: broken_for_model(config, model))
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
        broken = next(broken_for_model(variant, model), None)
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


_Rules = Callable[[ParallelConfig], Iterator[Broken]]


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


def _nearest(config: ParallelConfig, rules: _Rules, broken: Broken, setting: str) -> list[object]:
    """The closest candidates with which nothing is broken; where another setting is wrong too,
    those with which the first broken rule is that other setting's."""
    value = getattr(config, setting)
    number = value if isinstance(value, int | float) else 0
    clean, rest = [], []
    ordered = sorted(broken.candidates, key=lambda c: _distance(c, number))
    for candidate in ordered:
        remaining = next(rules(_variant(config, setting, candidate)), None)
        if remaining is None:
            clean.append(candidate)
        elif remaining.setting not in (broken.setting, setting):
            rest.append(candidate)
    most = _NUM_SUGGESTIONS if len(ordered) > _NUM_CHOICES else _NUM_CHOICES
    return sorted((clean or rest)[:most], key=lambda c: _distance(c, 0))


def _refuse_part_groups(tier: str, devices: int, group: int) -> None:
    most = POWERS_OF_TWO[-1] // group * group
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
    config: ParallelConfig, broken: Broken, tier: str, model: ModelConfig
) -> ConfigError:
    """Why a running tier cannot have so many processes, and how many it can."""
    devices: int = getattr(config, tier)
    group = config.tp_size if tier == "attn_devices" else config.etp_size
    num_slots = model.moe.num_experts + config.num_redundant_experts
    sizes = range(group, group * num_slots + 1, group)
    fitting = (
        size
        for size in sorted(sizes, key=lambda size: abs(size - devices))
        if next(broken_for_model(_with_devices(config, tier, size), model), None) is None
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


def _require_rank(what: str, rank: int, size: int) -> None:
    if not 0 <= rank < size:
        nearest = max(0, min(rank, size - 1))
        raise ConfigError(what, rank, f"must be from 0 to {size - 1}", (nearest,))
