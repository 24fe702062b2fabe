"""The bundled tiny model: what it claims to be, and that its text can be collected again."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tokenizers import Tokenizer

from tools import tiny_corpus
from tools.tiny_corpus import Corpus, Document

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "epserve" / "tiny_model"
LARGEST_WEIGHTS = 8_000_000
SHARDS = 4


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((MODEL / "config.json").read_text())
    return fields


@pytest.fixture(scope="module")
def header() -> dict[str, Any]:
    """Names, types and shapes of the tensors, as safetensors files begin."""
    with (MODEL / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        tensors: dict[str, Any] = json.loads(file.read(length))
    tensors.pop("__metadata__", None)
    return tensors


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def card() -> str:
    return (MODEL / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return tiny_corpus.collect()


SOURCE = '''"""A module that is documented."""
def f():
    """Return a list of
       things."""
'''
FILES = {
    "pydoc_data/topics.py": "topics = {'for': 'The for statement\\n…'}",
    "test/case.py": '"""A docstring among the tests."""',
    "package/broken.py": '"""A docstring before a mistake.""" (',
    "package/one.py": SOURCE,
    "package/two.py": SOURCE + 'def g():\n    """Too short."""',
    "side_effect.py": "raise SystemExit('imported')",
}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A standard library of our own: one topic, modules that repeat each other, a test."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_weights_are_small_enough_to_bundle() -> None:
    assert (MODEL / "model.safetensors").stat().st_size < LARGEST_WEIGHTS


def test_config_is_a_grouped_mixture_of_experts_with_latent_attention(
    config: dict[str, Any],
) -> None:
    assert config["model_type"] == "deepseek_v3"
    assert config["first_k_dense_replace"] == 1
    assert config["num_hidden_layers"] - config["first_k_dense_replace"] >= 2
    assert (config["n_routed_experts"], config["num_experts_per_tok"]) == (16, 4)
    assert (config["n_group"], config["topk_group"]) == (4, 2)
    assert config["n_shared_experts"] == 1
    assert config["norm_topk_prob"] is True
    assert config["q_lora_rank"] > 0
    assert config["kv_lora_rank"] > 0
    assert config["eos_token_id"] == 0


@pytest.mark.parametrize(
    "field",
    [
        "num_attention_heads",
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "n_routed_experts",
        "vocab_size",
    ],
)
def test_everything_sharded_divides_by_four(config: dict[str, Any], field: str) -> None:
    assert config[field] % SHARDS == 0


def test_a_shard_of_an_expert_keeps_rows_of_sixteen_bytes(config: dict[str, Any]) -> None:
    assert config["moe_intermediate_size"] // SHARDS * 2 % 16 == 0


def test_experts_are_saved_one_by_one(config: dict[str, Any], header: dict[str, Any]) -> None:
    shape = [config["moe_intermediate_size"], config["hidden_size"]]
    for layer in range(config["first_k_dense_replace"], config["num_hidden_layers"]):
        for expert in range(config["n_routed_experts"]):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            assert header[f"{prefix}.gate_proj.weight"]["shape"] == shape
            assert header[f"{prefix}.up_proj.weight"]["shape"] == shape
            assert header[f"{prefix}.down_proj.weight"]["shape"] == shape[::-1]


def test_only_the_selection_biases_are_float32(header: dict[str, Any]) -> None:
    types = {name: entry["dtype"] for name, entry in header.items()}
    wide = {name for name, dtype in types.items() if dtype == "F32"}
    assert wide == {name for name in types if name.endswith("e_score_correction_bias")}
    assert set(types.values()) == {"BF16", "F32"}


def test_selection_biases_were_learned(config: dict[str, Any]) -> None:
    weights = load_file(MODEL / "model.safetensors")
    for layer in range(config["first_k_dense_replace"], config["num_hidden_layers"]):
        bias = weights[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
        assert bias.unique().numel() > 1


@pytest.mark.parametrize(
    "text",
    [
        "The for statement",
        "  two  spaces\n\n\ttabs\r\nand a trailing one ",
        "naïve café, Straße, Ελληνικά, 日本語, 한국어, 🐍🧪 👩‍👩‍👧",
        "e\u0301 is not \u00e9; \ufeff \u200b \x00 \x7f",
        "",
    ],
)
def test_tokenizer_gives_back_every_byte(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_matches_the_config(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id("<|endoftext|>") == config["eos_token_id"]
    assert tokenizer.encode("one<|endoftext|>two").ids.count(config["eos_token_id"]) == 1


def test_card_states_licence_data_and_loss(card: str) -> None:
    assert "license: psf-2.0" in card
    assert "Python Software Foundation License Version 2" in card
    assert "pydoc_data.topics" in card
    found = re.search(r"\| bfloat16 \| (\d+\.\d+) \| (\d+\.\d+) \|", card)
    assert found is not None
    nats_per_token, bits_per_byte = map(float, found.groups())
    assert 0 < nats_per_token < 4
    assert 0 < bits_per_byte < 2.5
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (MODEL / "LICENSE.txt").read_text()


def test_corpus_reads_topics_and_docstrings_once(library: Path) -> None:
    small = tiny_corpus.collect(library)
    documents = sorted((*small.train, *small.held_out), key=lambda document: document.name)
    assert [(document.name, document.texts) for document in documents] == [
        ("module package/one.py", ("A module that is documented.", "Return a list of\nthings.")),
        ("topic for", ("The for statement\n…",)),
    ]


def test_corpus_of_this_interpreter_is_deterministic(corpus: Corpus) -> None:
    assert tiny_corpus.fingerprint(tiny_corpus.collect()) == tiny_corpus.fingerprint(corpus)


def test_fingerprint_tells_texts_and_split_apart() -> None:
    one = Document("one", ("text",))
    two = Document("two", ("text",))
    corpora = [
        Corpus((one, two), ()),
        Corpus((one,), (two,)),
        Corpus((one,), ()),
        Corpus((Document("one", ("text", "more")),), (two,)),
    ]
    assert len({tiny_corpus.fingerprint(corpus) for corpus in corpora}) == len(corpora)


def test_held_out_part_shares_nothing_with_training(corpus: Corpus) -> None:
    trained = {text for document in corpus.train for text in document.texts}
    trained |= {part for text in trained for part in text.split("\n\n") if len(part) >= 60}
    held_out = [text for document in corpus.held_out for text in document.texts]
    assert held_out
    for text in held_out:
        assert trained.isdisjoint({text, *text.split("\n\n")})
