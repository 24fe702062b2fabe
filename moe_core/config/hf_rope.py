"""The rotary settings of config.json: `rope_parameters` of transformers 5, or `rope_scaling`
with `rope_theta` and `partial_rotary_factor` beside it as older checkpoints have them.

Knows the rope types "default" and "yarn" and refuses others by name; computes nothing.
"""

from moe_core.config.config_reader import ConfigReader
from moe_core.config.model import RopeConfig

_HALF_OR_INTERLEAVED = {"deepseek_v3": (True, False), "deepseek_v2": (True,)}


def read_rope(
    reader: ConfigReader,
    model_type: str,
    *,
    max_position_embeddings: int,
    default_theta: float,
    default_partial_rotary: float,
) -> RopeConfig:
    """Raises ConfigError naming the rope key that is unknown, contradictory or unsupported."""
    nested = _rope_object(reader)
    rope_type = _read_type(nested)
    interleaved_options = _HALF_OR_INTERLEAVED.get(model_type, (False,))
    interleaved = bool(
        reader.choice("rope_interleave", interleaved_options, interleaved_options[0])
    )
    theta = _read_moved(reader, nested, "rope_theta", default_theta)
    partial = _read_moved(reader, nested, "partial_rotary_factor", default_partial_rotary)
    if partial != 1.0 and model_type != "glm4_moe":
        raise reader.refuse("partial_rotary_factor", f"must be 1 for {model_type}")
    if rope_type == "default":
        # factor 1 and the trained length are what a default rope has anyway
        nested.choice("factor", [1, 1.0], 1.0)
        nested.finish(("original_max_position_embeddings",))
        return RopeConfig(rope_type, theta, partial, interleaved=interleaved)
    rope = _read_yarn(nested, theta, partial, interleaved, max_position_embeddings)
    nested.finish(())
    return rope


def _rope_object(reader: ConfigReader) -> ConfigReader:
    new, old = reader.raw("rope_parameters"), reader.raw("rope_scaling")
    if new is not None and old is not None and new != old:
        raise reader.refuse("rope_scaling", "contradicts rope_parameters; keep one of them")
    values = new if new is not None else old if old is not None else {}
    name = "rope_parameters" if new is not None else "rope_scaling"
    if not isinstance(values, dict):
        raise reader.refuse(name, "must be an object")
    return ConfigReader(values, f"{name}.")


def _read_type(nested: ConfigReader) -> str:
    key = "rope_type" if nested.has("rope_type") else "type"
    rope_type = str(nested.choice(key, ["default", "yarn"], "default"))
    return str(nested.choice("type", [rope_type], rope_type))


def _read_moved(reader: ConfigReader, nested: ConfigReader, key: str, default: float) -> float:
    """A number that transformers 5 moved from beside the rope object into it."""
    value = nested.number(key, reader.number(key, default))
    if reader.has(key) and reader.number(key) != value:
        raise reader.refuse(key, f"contradicts the rope object's {value}")
    return value


def _read_yarn(
    nested: ConfigReader,
    theta: float,
    partial: float,
    interleaved: bool,
    max_position_embeddings: int,
) -> RopeConfig:
    original = nested.integer("original_max_position_embeddings", max_position_embeddings)
    has_factor = nested.has("attention_factor")
    return RopeConfig(
        rope_type="yarn",
        rope_theta=theta,
        partial_rotary_factor=partial,
        factor=nested.number("factor", max_position_embeddings / original),
        original_max_position_embeddings=original,
        # A zero means unset here, as transformers reads it.
        beta_fast=nested.number("beta_fast", 32.0) or 32.0,
        beta_slow=nested.number("beta_slow", 1.0) or 1.0,
        mscale=nested.number("mscale", 0.0),
        mscale_all_dim=nested.number("mscale_all_dim", 0.0),
        attention_factor=nested.number("attention_factor", 1.0) if has_factor else None,
        truncate=nested.boolean("truncate", True),
        interleaved=interleaved,
    )
