"""Train the tiny model that epserve bundles, and publish it as a Hugging Face directory.

    python -m tools.train_tiny_model --out epserve/tiny_model

Knows what the directory holds (config, bf16 weights, tokenizer, model card, licence) and how
the result is judged: loss on held-out documents, computed from the files as saved. Text comes
from `tiny_corpus`, shape and training from `tiny_training`. Files are replaced one by one,
each atomically, and only once the whole run has succeeded.
"""

import argparse
import math
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import DeepseekV3ForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from tools import tiny_corpus
from tools.tiny_corpus import Corpus, Document
from tools.tiny_training import (
    SEPARATOR,
    SEPARATOR_ID,
    Trainer,
    TrainingPlan,
    token_stream,
    train_tokenizer,
)

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "epserve" / "tiny_model"
CARD_TEMPLATE = Path(__file__).resolve().with_name("tiny_model_card.md")
PROMPTS = ("The for statement", "Return a list of", "If the argument is", "This module provides")
SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss over the held-out documents; separators count as tokens and as no bytes."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int


def texts_of(documents: Sequence[Document]) -> list[str]:
    """The texts of all documents, in order."""
    return [text for document in documents for text in document.texts]


@torch.inference_mode()
def held_out_loss(
    model: DeepseekV3ForCausalLM, tokenizer: Tokenizer, documents: Sequence[Document]
) -> HeldOutLoss:
    """Every token but the leading separator predicted once, in windows of the full context."""
    stream = token_stream(tokenizer, texts_of(documents))
    length = model.config.max_position_embeddings
    nats = 0.0
    for start in range(0, len(stream) - 1, length):
        window = stream[start : start + length + 1]
        logits = model(input_ids=window[None, :-1], use_cache=False).logits[0].float()
        nats += functional.cross_entropy(logits, window[1:], reduction="sum").item()
    tokens = len(stream) - 1
    size = tiny_corpus.size_in_bytes(documents)
    return HeldOutLoss(nats / tokens, nats / math.log(2) / size, tokens)


@torch.inference_mode()
def sample(
    model: DeepseekV3ForCausalLM, tokenizer: Tokenizer, prompt: str, temperature: float
) -> str:
    """The prompt continued, greedily if the temperature is 0."""
    torch.manual_seed(0)
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    choice = {"do_sample": True, "temperature": temperature} if temperature else {}
    settings = GenerationConfig(
        max_new_tokens=SAMPLE_TOKENS, pad_token_id=SEPARATOR_ID, eos_token_id=SEPARATOR_ID, **choice
    )
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return tokenizer.decode(output[0].tolist())


def save_weights(model: DeepseekV3ForCausalLM, folder: Path) -> None:
    """Write config and bf16 weights; the selection biases stay float32."""
    with tempfile.TemporaryDirectory() as full_precision:
        model.save_pretrained(full_precision)
        rounded = DeepseekV3ForCausalLM.from_pretrained(full_precision, dtype=torch.bfloat16)
    rounded.save_pretrained(folder)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json and what transformers wants beside it."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SEPARATOR,
        clean_up_tokenization_spaces=False,
        model_max_length=context,
    ).save_pretrained(folder)


def samples_section(model: DeepseekV3ForCausalLM, tokenizer: Tokenizer) -> str:
    """The prompts continued, greedily and at temperature 0.7, as Markdown."""
    parts: list[str] = []
    for prompt in PROMPTS:
        for title, temperature in (("greedy", 0.0), ("temperature 0.7", 0.7)):
            text = sample(model, tokenizer, prompt, temperature)
            parts.append(f"“{prompt}”, {title}:\n\n```text\n{text}\n```")
    return "\n\n".join(parts)


def write_card(folder: Path, trainer: Trainer, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Judge the files in `folder` and fill in the model card."""
    plan = trainer.plan
    exact = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rounded = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    loss = held_out_loss(exact, tokenizer, corpus.held_out)
    card = CARD_TEMPLATE.read_text(encoding="utf-8").format(
        shape=plan.shape,
        plan=plan,
        parameters=exact.num_parameters(),
        python=platform.python_version(),
        copyright=sys.copyright.partition("\n")[0],
        fingerprint=tiny_corpus.fingerprint(corpus),
        train_documents=len(corpus.train),
        train_bytes=tiny_corpus.size_in_bytes(corpus.train),
        held_out_documents=len(corpus.held_out),
        held_out_bytes=tiny_corpus.size_in_bytes(corpus.held_out),
        trained_tokens=plan.steps * plan.tokens_per_step,
        minutes=trainer.seconds / 60,
        loss=loss,
        bf16_loss=held_out_loss(rounded, tokenizer, corpus.held_out),
        samples=samples_section(exact, tokenizer),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(card)


def publish(folder: Path, out: Path) -> None:
    """Move every file of `folder` into `out`, replacing what is there file by file."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir()):
        path.chmod(0o644)
        path.replace(out / path.name)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="directory to publish to")
    parser.add_argument("--steps", type=int, default=TrainingPlan.steps)
    parser.add_argument("--seed", type=int, default=TrainingPlan.seed)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, help="file to save to and to resume from")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    plan = TrainingPlan(steps=arguments.steps, seed=arguments.seed)
    library = tiny_corpus.standard_library()
    corpus = tiny_corpus.collect(library)
    texts = texts_of(corpus.train)
    tokenizer = train_tokenizer(texts, plan.shape.vocab_size)
    trainer = Trainer(plan, token_stream(tokenizer, texts), arguments.checkpoint)
    model = trainer.run()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.out.parent) as temporary:
        folder = Path(temporary)
        save_weights(model, folder)
        save_tokenizer(tokenizer, folder, plan.shape.max_position_embeddings)
        shutil.copyfile(library / "LICENSE.txt", folder / "LICENSE.txt")
        write_card(folder, trainer, corpus, tokenizer)
        publish(folder, arguments.out)


if __name__ == "__main__":
    main()
