"""What the demo says after its runs: tables, and the formulas that they are compared with.

Knows counters, token counts and the model's shape as plain numbers. Runs nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from moe_core.cluster import LinkStats
from moe_core.config.model import ModelConfig
from moe_core.config.parallel import ParallelConfig

BYTES_PER_VALUE = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True)
class LevelResult:
    """One layout's run. `num_tokens` are those that passed through the layers: the prompt's and
    all generated ones but the last. `links` counts that one completion only."""

    parallel: ParallelConfig
    token_ids: tuple[int, ...]
    num_tokens: int
    tokens_per_s: float
    batch_size: int
    batch_tokens_per_s: float
    links: tuple[LinkStats, ...]

    @property
    def dispatch_bytes(self) -> int:
        return sum(link.dispatch_bytes for link in self.links)

    @property
    def combine_bytes(self) -> int:
        return sum(link.combine_bytes for link in self.links)

    @property
    def transports(self) -> str:
        return ", ".join(sorted({link.transport for link in self.links}))


def dispatch_bytes_per_layer(num_tokens: int, processes: float, model: ModelConfig) -> float:
    """tokens × expert processes that each token goes to × hidden_size × bytes per value."""
    return num_tokens * processes * model.hidden_size * BYTES_PER_VALUE[model.dtype]


def processes_per_token(result: LevelResult, model: ModelConfig) -> float:
    """How many expert processes a token went to, from the bytes that were counted."""
    one_process = dispatch_bytes_per_layer(result.num_tokens, 1, model)
    return result.dispatch_bytes / len(model.moe_layer_ids) / one_process


def kv_bytes_per_token(model: ModelConfig, enable_mla: bool) -> int:
    """Cache bytes of one token over all layers, without attention TP.

    MLA: the latent and the shared rotary key. Otherwise a key and a value for every KV head.
    """
    if enable_mla:
        assert model.mla is not None
        values = model.mla.kv_lora_rank + model.mla.qk_rope_head_dim
    else:
        values = model.num_key_value_heads * (model.head_dim + model.v_head_dim)
    return values * model.num_hidden_layers * BYTES_PER_VALUE[model.dtype]


def links_between(before: Sequence[LinkStats], after: Sequence[LinkStats]) -> tuple[LinkStats, ...]:
    """What each link carried between two readings."""
    old = {(link.source, link.target): link for link in before}
    grown = []
    for link in after:
        base = old.get((link.source, link.target))
        counts = {
            name: getattr(link, name) - (getattr(base, name) if base else 0) for name in _COUNTS
        }
        grown.append(LinkStats(link.source, link.target, link.transport, **counts))
    return tuple(grown)


_COUNTS = (
    "dispatches",
    "dispatch_bytes",
    "combine_bytes",
    "routing_bytes",
    "stream_tensor_bytes",
    "doorbells",
    "wait_s",
)


def comparison_table(results: Sequence[LevelResult], model: ModelConfig) -> Table:
    """One column per layout: where tokens went, counted bytes, the formula, and speed."""
    layers = len(model.moe_layer_ids)
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("")
    for result in results:
        table.add_column(f"Level {result.parallel.degree}", justify="right")
    row = table.add_row
    row("a token goes to", *(_reach(result, model) for result in results))
    row(
        "bytes dispatched per layer, counted",
        *(f"{result.dispatch_bytes / layers:,.0f}" for result in results),
    )
    row("… by the formula", *(_predicted(result, model) for result in results))
    row(
        "bytes combined per layer, counted",
        *(f"{result.combine_bytes / layers:,.0f}" for result in results),
    )
    table.add_section()
    row("transport that carried them", *(result.transports for result in results))
    row("tokens/s, one sequence", *(f"{result.tokens_per_s:,.0f}" for result in results))
    row(
        f"tokens/s, {results[0].batch_size} sequences at once",
        *(f"{result.batch_tokens_per_s:,.0f}" for result in results),
    )
    return table


def _reach(result: LevelResult, model: ModelConfig) -> str:
    reached = processes_per_token(result, model)
    return f"{reached:.3g} of {result.parallel.expert_devices} processes"


def _predicted(result: LevelResult, model: ModelConfig) -> str:
    """Level 1 reaches everybody. Level 2 reaches as many as the router's choice is spread over,
    and never more than a token has experts."""
    everybody = result.parallel.expert_devices
    if result.parallel.degree < 2:
        return f"{dispatch_bytes_per_layer(result.num_tokens, everybody, model):,.0f}"
    most = min(everybody, model.moe.num_experts_per_tok, _groups_reached(model, everybody))
    return f"at most {dispatch_bytes_per_layer(result.num_tokens, most, model):,.0f}"


def _groups_reached(model: ModelConfig, processes: int) -> int:
    """The most processes that the router's kept groups lie on, with contiguous experts."""
    if model.moe.num_experts % processes or model.moe.n_group % processes:
        return processes
    return min(processes, model.moe.topk_group)
