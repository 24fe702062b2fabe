"""`epserve generate`: completions of one prompt from a running cluster, as text or as JSON.

Knows the client and the terminal. Stopping it cancels the request.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field

from epserve.client import EpserveClient
from epserve.gateway_connection import Target
from epserve.generate_messages import Output, Sampling, TokenLogprobs, Usage
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
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def add(self, output: Output) -> None:
        self.token_ids += output.token_ids
        self.text += output.text
        self.finish_reason = output.finish_reason
        self.usage = output.usage
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs

    def as_json(self, sampling: Sampling) -> str:
        fields: dict[str, object] = {
            "request_id": self.request_id,
            "index": self.index,
            "token_ids": self.token_ids,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "usage": asdict(self.usage or Usage(0, 0)),
        }
        if sampling.logprobs is not None:
            fields["logprobs"] = [_as_fields(token) for token in self.logprobs]
        if sampling.prompt_logprobs is not None:
            fields["prompt_logprobs"] = [_as_fields(token) for token in self.prompt_logprobs]
        return json.dumps(fields)


def _as_fields(token: TokenLogprobs) -> dict[str, object]:
    return {
        "token_id": token.token_id,
        "logprob": token.logprob,
        "rank": token.rank,
        "top": [{"token_id": other, "logprob": value} for other, value in token.top],
    }


def generate(
    target: Target, prompt: str | Sequence[int], sampling: Sampling, *, as_json: bool
) -> bool:
    """Print the completions; False when a signal cut them short. Raises EpserveError."""

    async def work() -> None:
        async with EpserveClient(target) as client:
            if as_json:
                await _print_json(client, prompt, sampling)
            elif (sampling.n or 1) > 1:
                await _print_choices(client, prompt, sampling)
            else:
                await _print_text(client, prompt, sampling)

    return not asyncio.run(run_until_signalled(work()))


async def _choices(
    client: EpserveClient, prompt: str | Sequence[int], sampling: Sampling
) -> AsyncIterator[Choice]:
    """The choices, each when it has finished."""
    choices: dict[int, Choice] = {}
    async for output in client.generate(prompt, sampling):
        choice = choices.setdefault(output.index, Choice(output.request_id, output.index))
        choice.add(output)
        if choice.finish_reason:
            yield choice


async def _print_json(
    client: EpserveClient, prompt: str | Sequence[int], sampling: Sampling
) -> None:
    async for choice in _choices(client, prompt, sampling):
        print(choice.as_json(sampling), flush=True)


async def _print_choices(
    client: EpserveClient, prompt: str | Sequence[int], sampling: Sampling
) -> None:
    """Several choices as they finish, each below a line that names it: interleaved pieces could
    not be read."""
    has_text = (await client.list_models())[0].has_tokenizer
    async for choice in _choices(client, prompt, sampling):
        print(f"[{choice.index}]")
        print(choice.text if has_text else " ".join(map(str, choice.token_ids)), flush=True)


async def _print_text(
    client: EpserveClient, prompt: str | Sequence[int], sampling: Sampling
) -> None:
    """Text where the model has a tokenizer, else token ids."""
    shown = False
    has_text = (await client.list_models())[0].has_tokenizer
    try:
        async for output in client.generate(prompt, sampling):
            ids = "".join(f"{token} " for token in output.token_ids)
            sys.stdout.write(output.text if has_text else ids)
            sys.stdout.flush()
            shown = True
    finally:
        if shown:  # a refused request leaves stdout empty
            print(flush=True)
