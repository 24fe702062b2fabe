"""POST /v1/completions: OpenAI's text completion, with vLLM's further fields.

Knows the body and the answer's two shapes. Several prompts are several requests to the
generator; choice `prompt * n + index` is theirs.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import Field
from starlette.requests import Request

from gateway.http.answer import Answer, dumps
from gateway.http.body import parse, read_json
from gateway.http.context import caller_of, context_of
from gateway.http.logprobs import CompletionLogprobs, TokenNames
from gateway.http.prompts import Prompt, prompts_of
from gateway.http.sampling_fields import GenerationBody, check_shared, refuse_unserved
from gateway.http.sse import HOLE, EventFrame, event_choice
from gateway.http.usage import UsageCount
from gateway.requests import Chunk, GenerationRequest
from moe_core.errors import RequestError
from moe_core.trace_context import traceparent_of

DEFAULT_MAX_TOKENS = 16
MAX_TOTAL_CHOICES = 4_096


class CompletionBody(GenerationBody):
    prompt: object = None
    echo: bool | None = False
    best_of: int | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    add_special_tokens: bool | None = True


async def completions(request: Request) -> Answer:
    context = context_of(request)
    context.generator.require_room(caller_of(request))
    values = await read_json(request, context.max_body_bytes)
    refuse_unserved(values)
    body = parse(CompletionBody, values)
    context.check_model(body.model)
    _check(body)
    special = body.add_special_tokens is not False
    prompts = await prompts_of(
        body.prompt, context.model, add_special_tokens=special, echo=bool(body.echo)
    )
    _check_total(len(prompts), body.num_choices)
    answer_id = f"cmpl-{uuid.uuid4().hex}"
    requests = _requests(answer_id, body, prompts, request)
    if len(requests) > 1:
        requests = await context.generator.check(requests)
    names = TokenNames(context.model.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
    return Answer(
        context.generator,
        requests,
        CompletionFormat(answer_id, context.model.name, body, prompts, names),
        body.num_choices,
        UsageCount(sum(len(prompt.token_ids) for prompt in prompts)),
        body.streaming,
        context.writes,
    )


def _check(body: CompletionBody) -> None:
    check_shared(body)
    if body.best_of not in (None, body.num_choices):
        raise RequestError(f"best_of={body.best_of}: must be left out or equal to n")
    if body.max_tokens == 0 and not body.echo:
        raise RequestError("max_tokens=0: must be at least 1, unless echo is true")


def _check_total(num_prompts: int, n: int) -> None:
    if num_prompts * n > MAX_TOTAL_CHOICES:
        raise RequestError(
            f"n={n}: with {num_prompts} prompts makes {num_prompts * n} choices; at most "
            f"{MAX_TOTAL_CHOICES} are answered at once"
        )


def _requests(
    answer_id: str, body: CompletionBody, prompts: Sequence[Prompt], request: Request
) -> list[GenerationRequest]:
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    sampling = body.to_sampling(max_tokens, body.logprobs)
    if body.echo and (body.logprobs is not None or max_tokens == 0):
        sampling = replace(sampling, prompt_logprobs=body.logprobs or 0)
    return [
        GenerationRequest(
            request_id=f"{answer_id}-{number}",
            model="",
            prompt=prompt.token_ids,
            sampling=sampling,
            priority=body.priority or 0,
            caller=caller_of(request),
            traceparent=traceparent_of(request.headers),
        )
        for number, prompt in enumerate(prompts)
    ]


class CompletionFormat:
    """See AnswerFormat. Choices belong to prompts in turn, n to each."""

    def __init__(
        self,
        answer_id: str,
        model: str,
        body: CompletionBody,
        prompts: Sequence[Prompt],
        names: TokenNames,
    ) -> None:
        self._body = body
        self._prompts = prompts
        self._fields: dict[str, object] = {
            "id": answer_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._frame = EventFrame(self._fields, shows_usage=body.shows_usage)
        self._opened: set[int] = set()
        num_choices = len(prompts) * body.num_choices
        self._logprobs = [CompletionLogprobs(names) for _ in range(num_choices)]
        self._tells_more = body.logprobs is not None or bool(body.return_token_ids)
        self._around_text = [
            self._frame.around_hole(event_choice(choice, b'"text":' + HOLE))
            for choice in range(num_choices)
        ]

    def event(self, choice: int, chunk: Chunk, usage: UsageCount | None) -> bytes:
        is_first = choice not in self._opened
        if not (is_first or self._tells_more or chunk.finish_reason or usage):  # nearly all
            before, after = self._around_text[choice]
            return before + dumps(chunk.text) + after if chunk.text else b""
        text = self._before(choice) + chunk.text if is_first else chunk.text
        if is_first:
            self._opened.add(choice)
        if not (text or chunk.finish_reason or self._tells_more):
            return b""
        body = self._body
        logprobs, more = b"null", b""
        if body.logprobs is not None:
            logprobs = dumps(self._shaped(choice, [chunk], opens=is_first))
        if body.return_token_ids:
            prompt_ids = self._prompt(choice).token_ids if is_first else None
            more = b',"prompt_token_ids":%b,"token_ids":%b' % (
                dumps(prompt_ids),
                dumps(chunk.token_ids),
            )
        reason = dumps(chunk.finish_reason) if chunk.finish_reason else b"null"
        shown = event_choice(choice, b'"text":' + dumps(text), logprobs, reason, more)
        return self._frame.event(shown, usage)

    def usage_event(self, usage: UsageCount) -> bytes:
        return self._frame.event(b"", usage)

    def whole(self, chunks: Sequence[Sequence[Chunk]], usage: UsageCount) -> dict[str, object]:
        choices = [self._choice(choice, parts) for choice, parts in enumerate(chunks)]
        return {**self._fields, "choices": choices, "usage": usage.as_json()}

    def _choice(self, choice: int, parts: Sequence[Chunk]) -> dict[str, object]:
        shown: dict[str, object] = {
            "index": choice,
            "text": self._before(choice) + "".join(part.text for part in parts),
            "logprobs": None,
            "finish_reason": parts[-1].finish_reason,
        }
        if self._body.logprobs is not None:
            shown["logprobs"] = self._shaped(choice, parts, opens=True)
        if self._body.return_token_ids:
            shown["prompt_token_ids"] = self._prompt(choice).token_ids
            shown["token_ids"] = [token for part in parts for token in part.token_ids]
        return shown

    def _shaped(self, choice: int, parts: Sequence[Chunk], *, opens: bool) -> dict[str, object]:
        """The logprobs of the choice's next parts; with `echo` the prompt's `opens` it."""
        prompt = self._prompt(choice).token_ids if opens and self._body.echo else ()
        entries = [entry for part in parts for entry in (*part.prompt_logprobs, *part.logprobs)]
        return self._logprobs[choice].shape(entries, prompt=prompt)

    def _before(self, choice: int) -> str:
        return self._prompt(choice).text if self._body.echo else ""

    def _prompt(self, choice: int) -> Prompt:
        return self._prompts[choice // self._body.num_choices]
