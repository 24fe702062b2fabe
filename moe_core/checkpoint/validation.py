"""Whether the tensors of a checkpoint are the ones that its config.json asks for.

Judges names, shapes and types from headers alone; values are checked where they are read.
"""

import logging
import re
from collections.abc import Mapping

from moe_core.checkpoint.expected import TensorSpec
from moe_core.checkpoint.headers import TensorEntry
from moe_core.checkpoint.names import SCALE_SUFFIX
from moe_core.config.model import ModelConfig
from moe_core.config.parallel_rules import FP8_BLOCK
from moe_core.errors import CheckpointError

FP8_DTYPE = "F8_E4M3"
_SCALE_DTYPES = ("F32", "BF16")  # as DeepSeek and as Qwen publish them
_SHOWN_NAMES = 3
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_RECOMPUTED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# A 16-bit type that is not the model's own is more likely a wrong label than a choice.
_ALLOWED_DTYPES: Mapping[str, frozenset[str]] = {
    "bfloat16": frozenset({"BF16", "F32"}),
    "float16": frozenset({"F16", "F32"}),
    "float32": frozenset({"F32", "BF16", "F16"}),
    "float64": frozenset({"F64", "F32", "BF16", "F16"}),
}


def check_tensors(
    config: ModelConfig, expected: Mapping[str, TensorSpec], table: Mapping[str, TensorEntry]
) -> None:
    """Raises CheckpointError naming the first tensors that are missing, extra or unusable."""
    for name, spec in expected.items():
        if name in table:
            _check_tensor(config, table[name], spec, table)
    missing = [n for n, spec in expected.items() if n not in table and not spec.optional]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {_listed(missing)}")
    _check_extra(config, expected, table)


def _check_tensor(
    config: ModelConfig, entry: TensorEntry, spec: TensorSpec, table: Mapping[str, TensorEntry]
) -> None:
    if entry.shape != spec.shape:
        raise CheckpointError(
            f"{entry}: has shape {list(entry.shape)}; config.json asks for {list(spec.shape)}"
        )
    if entry.dtype == FP8_DTYPE and spec.linear and config.quantization is not None:
        _check_scale(entry, table)
        return
    allowed = _ALLOWED_DTYPES[config.dtype]
    if entry.dtype not in allowed:
        raise CheckpointError(
            f"{entry}: is {entry.dtype}; a model of dtype {config.dtype} and quantization "
            f"{config.quantization} may hold {', '.join(sorted(allowed))} here"
        )


def _check_scale(entry: TensorEntry, table: Mapping[str, TensorEntry]) -> None:
    scale = table.get(entry.name + SCALE_SUFFIX)
    if scale is None:
        raise CheckpointError(
            f"{entry}: is {entry.dtype}, but there is no {entry.name}{SCALE_SUFFIX}"
        )
    blocks = tuple(-(-size // FP8_BLOCK) for size in entry.shape)
    if scale.shape != blocks or scale.dtype not in _SCALE_DTYPES:
        raise CheckpointError(
            f"{scale}: is {scale.dtype} {list(scale.shape)}; must be F32 or BF16 {list(blocks)}, "
            f"one scale for each {FP8_BLOCK}×{FP8_BLOCK} block of {list(entry.shape)}"
        )


def _check_extra(
    config: ModelConfig, expected: Mapping[str, TensorSpec], table: Mapping[str, TensorEntry]
) -> None:
    # A tensor without elements says nothing: transformers writes them for 0 shared experts.
    named = (name for name, entry in table.items() if name not in expected and entry.nbytes)
    extra = [name for name in named if not _is_scale(name, expected, table)]
    ignored = [n for n in extra if _is_prediction_layer(n, config)]
    unknown = [n for n in extra if not _is_prediction_layer(n, config) and not _is_recomputed(n)]
    if unknown:
        message = (
            f"the checkpoint holds {_listed(unknown)}, which {config.model_type} does not have"
        )
        if any(_layer_number(n) >= config.num_hidden_layers for n in unknown):
            message += (
                f"; config.json has {config.num_hidden_layers} layers and "
                f"num_nextn_predict_layers={config.num_ignored_mtp_layers}"
            )
        raise CheckpointError(message)
    if ignored:
        message = "ignoring %d tensors of multi-token-prediction layers from %d on"
        logging.getLogger(__name__).info(message, len(ignored), config.num_hidden_layers)


def _is_scale(
    name: str, expected: Mapping[str, TensorSpec], table: Mapping[str, TensorEntry]
) -> bool:
    weight = name.removesuffix(SCALE_SUFFIX)
    if weight == name or weight not in expected or weight not in table:
        return False
    return table[weight].dtype == FP8_DTYPE


def _layer_number(name: str) -> int:
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


def _is_prediction_layer(name: str, config: ModelConfig) -> bool:
    first = config.num_hidden_layers
    return first <= _layer_number(name) < first + config.num_ignored_mtp_layers


def _is_recomputed(name: str) -> bool:
    return _RECOMPUTED.fullmatch(name) is not None


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN_NAMES])
    more = len(names) - _SHOWN_NAMES
    return f"{shown} and {more} more" if more > 0 else shown
