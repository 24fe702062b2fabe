"""POST /v1/chat/completions: OpenAI's chat completion, with vLLM's further fields.

Knows the body and the answer's two shapes. The conversation becomes a prompt by the model's own
chat template; a model without one has no chat.
"""

import asyncio
import re
import time
import uuid
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from starlette.requests import Request

from gateway.admission import MAX_TOP_LOGPROBS
from gateway.http.answer import Answer, dumps
from gateway.http.body import Body, parse, read_json
from gateway.http.context import HttpContext, caller_of, context_of
from gateway.http.logprobs import TokenNames, chat_logprobs
from gateway.http.messages import read_messages
from gateway.http.prompts import Prompt, encode
from gateway.http.sampling_fields import GenerationBody, check_shared, refuse_unserved
from gateway.http.sse import HOLE, EventFrame, event_choice
from gateway.http.usage import UsageCount
from gateway.requests import Chunk, GenerationRequest
from moe_core.errors import RequestError
from moe_core.trace_context import traceparent_of


class ConversationBody(Body):
    messages: object = None
    add_generation_prompt: bool | None = True
    add_special_tokens: bool | None = False  # templates write their own
    chat_template_kwargs: dict[str, object] | None = None


class ChatBody(GenerationBody, ConversationBody):
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    echo: bool | None = False

    @property
    def num_top_logprobs(self) -> int | None:
        """None where no logprobs are asked for."""
        if not self.logprobs:
            return None
        return self.top_logprobs or 0


async def chat_completions(request: Request) -> Answer:
    context = context_of(request)
    context.generator.require_room(caller_of(request))
    values = await read_json(request, context.max_body_bytes)
    refuse_unserved(values)
    body = parse(ChatBody, values)
    context.check_model(body.model)
    _check(body)
    prompt = await asyncio.to_thread(conversation_prompt, context, body)
    answer_id = f"chatcmpl-{uuid.uuid4().hex}"
    max_tokens = body.max_completion_tokens
    generation = GenerationRequest(
        request_id=answer_id,
        model="",
        prompt=prompt.token_ids,
        sampling=body.to_sampling(
            body.max_tokens if max_tokens is None else max_tokens, body.num_top_logprobs
        ),
        priority=body.priority or 0,
        caller=caller_of(request),
        traceparent=traceparent_of(request.headers),
    )
    if max_tokens is not None:
        generation = await _checked(context, generation)
    names = TokenNames(context.model.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
    return Answer(
        context.generator,
        [generation],
        ChatFormat(answer_id, context.model.name, body, prompt, names),
        body.num_choices,
        UsageCount(len(prompt.token_ids)),
        body.streaming,
        context.writes,
    )


def conversation_prompt(context: HttpContext, body: ConversationBody) -> Prompt:
    """Slow for long conversations. Raises RequestError."""
    messages = read_messages(body.messages)
    if context.chat_template is None:
        raise RequestError(
            f"messages: model {context.model.name!r} has no chat template "
            "(chat_template.jinja or tokenizer_config.json); use /v1/completions"
        )
    text = context.chat_template.render(
        messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        variables=body.chat_template_kwargs,
    )
    special = bool(body.add_special_tokens)
    return encode("messages", text, context.model, add_special_tokens=special)


async def _checked(context: HttpContext, generation: GenerationRequest) -> GenerationRequest:
    """Admitted here, so that what is wrong is said of the name that the client has used."""
    try:
        (admitted,) = await context.generator.check([generation])
    except RequestError as error:
        raise RequestError(re.sub("^max_tokens=", "max_completion_tokens=", str(error))) from None
    return admitted


def _check(body: ChatBody) -> None:
    check_shared(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError(f"top_logprobs={body.top_logprobs}: needs logprobs=true")
    if body.echo:
        raise RequestError("echo=true: is not supported in chat; use /v1/completions")
    both = body.max_tokens, body.max_completion_tokens
    if None not in both and both[0] != both[1]:
        raise RequestError(
            f"max_tokens={both[0]}: differs from max_completion_tokens={both[1]}; send one of them"
        )


class ChatFormat:
    """See AnswerFormat."""

    def __init__(
        self, answer_id: str, model: str, body: ChatBody, prompt: Prompt, names: TokenNames
    ) -> None:
        self._body = body
        self._prompt = prompt
        self._names = names
        self._fields: dict[str, object] = {
            "id": answer_id,
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
        }
        chunk_fields = {**self._fields, "object": "chat.completion.chunk"}
        self._frame = EventFrame(chunk_fields, shows_usage=body.shows_usage)
        self._opened: set[int] = set()
        self._tells_more = bool(body.logprobs or body.return_token_ids)
        hole = b'"delta":{"content":%b}' % HOLE
        self._around_text = [
            self._frame.around_hole(event_choice(choice, hole))
            for choice in range(body.num_choices)
        ]

    def _opening(self, choice: int) -> bytes:
        """Whose turn it is."""
        self._opened.add(choice)
        ids = b""
        if self._body.return_token_ids:
            ids = b',"prompt_token_ids":%b' % dumps(self._prompt.token_ids)
        delta = b'"delta":{"role":"assistant","content":""}'
        return self._frame.event(event_choice(choice, delta, more=ids))

    def event(self, choice: int, chunk: Chunk, usage: UsageCount | None) -> bytes:
        opening = b"" if choice in self._opened else self._opening(choice)
        if not (opening or self._tells_more or chunk.finish_reason or usage):  # nearly all
            before, after = self._around_text[choice]
            return before + dumps(chunk.text) + after if chunk.text else b""
        if not (chunk.text or chunk.finish_reason or self._tells_more):
            return opening
        logprobs, more = b"null", b""
        if self._body.logprobs:
            logprobs = dumps(chat_logprobs(self._names, chunk.logprobs))
        if self._body.return_token_ids:
            more = b',"token_ids":%b' % dumps(chunk.token_ids)
        reason = dumps(chunk.finish_reason) if chunk.finish_reason else b"null"
        content = b'"content":%b' % dumps(chunk.text) if chunk.text else b""
        shown = event_choice(choice, b'"delta":{%b}' % content, logprobs, reason, more)
        return opening + self._frame.event(shown, usage)

    def usage_event(self, usage: UsageCount) -> bytes:
        return self._frame.event(b"", usage)

    def whole(self, chunks: Sequence[Sequence[Chunk]], usage: UsageCount) -> dict[str, object]:
        choices = [self._choice(choice, parts) for choice, parts in enumerate(chunks)]
        answer = {**self._fields, "choices": choices, "usage": usage.as_json()}
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = self._prompt.token_ids
        return answer

    def _choice(self, choice: int, parts: Sequence[Chunk]) -> dict[str, object]:
        text = "".join(part.text for part in parts)
        shown: dict[str, object] = {
            "index": choice,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": parts[-1].finish_reason,
        }
        if self._body.logprobs:
            entries = [entry for part in parts for entry in part.logprobs]
            shown["logprobs"] = chat_logprobs(self._names, entries)
        if self._body.return_token_ids:
            shown["token_ids"] = [token for part in parts for token in part.token_ids]
        return shown
