"""`epserve generate`: one completion from a running cluster, as text or as JSON.

Knows the client and the terminal. Stopping it cancels the request.
"""

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from epserve.client import EpserveClient, Output, Sampling, Usage
from epserve.stop_signals import run_until_signalled


@dataclass(slots=True)
class Choice:
    """One completion, put together from its outputs."""

    request_id: str
    index: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    usage: Usage | None = None

    def add(self, output: Output) -> None:
        self.token_ids += output.token_ids
        self.text += output.text
        self.finish_reason = output.finish_reason
        self.usage = output.usage

    def as_json(self) -> str:
        usage = self.usage or Usage(0, 0)
        return json.dumps(
            {
                "request_id": self.request_id,
                "index": self.index,
                "token_ids": self.token_ids,
                "text": self.text,
                "finish_reason": self.finish_reason,
                "usage": {
                    "prompt_tokens": usage.prompt_tokens,
                    "completion_tokens": usage.completion_tokens,
                },
            }
        )


def generate(
    target: str, prompt: str | Sequence[int], sampling: Sampling, *, as_json: bool
) -> bool:
    """Print the completion; False when a signal cut it short. Raises EpserveError."""

    async def work() -> None:
        async with EpserveClient(target) as client:
            if as_json:
                await _print_json(client, prompt, sampling)
            else:
                await _print_text(client, prompt, sampling)

    return not asyncio.run(run_until_signalled(work()))


async def _print_json(
    client: EpserveClient, prompt: str | Sequence[int], sampling: Sampling
) -> None:
    choices: dict[int, Choice] = {}
    async for output in client.generate(prompt, sampling):
        choice = choices.setdefault(output.index, Choice(output.request_id, output.index))
        choice.add(output)
        if choice.finish_reason:
            print(choice.as_json(), flush=True)


async def _print_text(
    client: EpserveClient, prompt: str | Sequence[int], sampling: Sampling
) -> None:
    """Text where the model has a tokenizer, else token ids."""
    has_text = (await client.list_models())[0].has_tokenizer
    try:
        async for output in client.generate(prompt, sampling):
            ids = "".join(f"{token} " for token in output.token_ids)
            sys.stdout.write(output.text if has_text else ids)
            sys.stdout.flush()
    finally:
        print(flush=True)
