"""lm-eval against a real cluster: what it makes of a local task is what transformers gives it.

Loglikelihoods come from `echo` with `logprobs`, of prompts of token ids, so they are checked number
by number; generations text by text.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gateway.tokenizer import TextTokenizer
from support.clients import run_client
from support.processes import TINY_MODEL, serving

TASKS = Path(__file__).parent / "lm_eval_tasks"
ITEMS = [json.loads(line) for line in (TASKS / "items.jsonl").read_text().splitlines()]
TOLERANCE = 1e-3  # a sum of up to eight logprobs, each within 1e-4
MAX_TOKENS = 16


@dataclass
class Oracle:
    """What transformers says."""

    model: Any
    tokenizer: TextTokenizer

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """Of what the whole text has beyond the context, and whether it is greedy's choice."""
        start = len(self.tokenizer.encode(context))
        token_ids = self.tokenizer.encode(context + continuation)
        logprobs = self.model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
        rows = logprobs[start - 1 : -1]
        own = torch.tensor(token_ids[start:])
        return rows.gather(1, own[:, None]).sum().item(), bool((rows.argmax(-1) == own).all())

    def text(self, prompt: str) -> str:
        """Greedy, up to an empty line."""
        token_ids = list(self.tokenizer.encode(prompt))
        start = len(token_ids)
        eos = self.model.config.eos_token_id
        while len(token_ids) - start < MAX_TOKENS and token_ids[-1] != eos:
            logits = self.model(torch.tensor([token_ids])).logits[0, -1]
            token_ids.append(int(logits.argmax()))
        return self.tokenizer.decode(token_ids[start:]).partition("\n\n")[0]


@pytest.fixture(scope="module")
def oracle() -> Iterator[Oracle]:
    tokenizer = TextTokenizer.from_directory(TINY_MODEL)
    assert tokenizer is not None
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32).eval()
        yield Oracle(model, tokenizer)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """By task, what lm-eval noted of every item, in the items' order."""
    work = tmp_path_factory.mktemp("lm_eval")
    shutil.copytree(TASKS, work, dirs_exist_ok=True)
    layout = ("--attn-devices", "2", "--expert-devices", "2", "--ep-size", "2")
    with serving(*layout, "--dtype", "float32") as (running, _):
        (url,) = re.findall(r"(http://127\.0\.0\.1:\d+) \(HTTP\)", "\n".join(running.out))
        settings = (
            "model=tiny_model",
            f"base_url={url}/v1/completions",
            f"tokenizer={TINY_MODEL}",
            "tokenizer_backend=huggingface",
            "num_concurrent=2",
            "max_length=512",
        )
        run_client(
            "lm_eval",
            *("--model", "local-completions", "--model_args", ",".join(settings)),
            *("--tasks", "epserve_choice,epserve_text", "--include_path", str(work)),
            *("--batch_size", "2", "--log_samples", "--output_path", str(work / "out")),
            directory=work,
        )
    return {task: _samples(work / "out", task) for task in ("epserve_choice", "epserve_text")}


def _samples(directory: Path, task: str) -> list[dict[str, Any]]:
    (path,) = directory.rglob(f"samples_{task}_*.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(found, key=lambda sample: sample["doc_id"])


def test_the_loglikelihood_of_every_choice_is_transformers(
    samples: dict[str, list[dict[str, Any]]], oracle: Oracle
) -> None:
    for item, sample in zip(ITEMS, samples["epserve_choice"], strict=True):
        told = [(float(value), greedy == "True") for value, greedy in sample["filtered_resps"]]
        expected = [oracle.loglikelihood(item["question"], f" {c}") for c in item["choices"]]
        assert [value for value, _ in told] == pytest.approx(
            [value for value, _ in expected], abs=TOLERANCE
        )
        assert [greedy for _, greedy in told] == [greedy for _, greedy in expected]
        best = max(range(len(told)), key=lambda index: expected[index][0])
        assert sample["acc"] == float(best == item["answer"])


def test_generated_text_is_transformers(
    samples: dict[str, list[dict[str, Any]]], oracle: Oracle
) -> None:
    texts = [sample["filtered_resps"][0] for sample in samples["epserve_text"]]
    assert texts == [oracle.text(item["question"]) for item in ITEMS]
    assert all(texts)
