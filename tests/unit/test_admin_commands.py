"""What `epserve rebalance` prints."""

from epserve.admin_client import Rebalanced
from epserve.admin_commands import MAX_LAYERS, rebalanced_lines
from moe_core.cluster import LayerLoad


def test_each_layer_that_changes_has_its_load_before_and_after() -> None:
    done = Rebalanced(2, 7, 1.5, 1.1, 0, "", (LayerLoad(3, 4, 2.0, 1.1), LayerLoad(1, 3, 1.2, 1.0)))
    first, *layers = rebalanced_lines(done, dry_run=True)
    assert first.startswith(
        "would change 2 layers, 7 experts moved; the most loaded EP group has 1"
    )
    assert layers == ["  layer 3: 2.00 to 1.10, 4 experts", "  layer 1: 1.20 to 1.00, 3 experts"]


def test_of_many_layers_those_that_gain_most_are_shown() -> None:
    layers = tuple(LayerLoad(layer, 1, 2.0, 1.0) for layer in range(58))
    lines = list(rebalanced_lines(Rebalanced(58, 58, 2.0, 1.0, 0, "", layers), dry_run=False))
    assert len(lines) == 1 + MAX_LAYERS + 1
    assert lines[-1] == f"  and {58 - MAX_LAYERS} more layers, which gain less"


def test_nothing_to_do_says_why() -> None:
    lines = rebalanced_lines(Rebalanced(0, 0, 1.0, 1.0, 0, "no layer gains"), dry_run=True)
    assert list(lines) == ["nothing to do: no layer gains"]
