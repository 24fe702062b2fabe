"""POST /tokenize and /detokenize, in vLLM's shapes."""

import asyncio
from typing import Annotated

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.http.body import Body, parse, read_json
from gateway.http.chat import ConversationBody, conversation_prompt
from gateway.http.context import HttpContext, context_of
from gateway.http.prompts import Prompt, encode, tokenizer_of
from moe_core.errors import RequestError

MAX_TOKENS = 1_000_000


class TokenizeBody(ConversationBody):
    """add_special_tokens: true for a prompt and false for messages, unless it is given."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = False


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Annotated[list[int], Field(max_length=MAX_TOKENS)]


async def tokenize(request: Request) -> Response:
    context = context_of(request)
    body = parse(TokenizeBody, await read_json(request, context.max_body_bytes))
    context.check_model(body.model)
    prompt = await asyncio.to_thread(_tokenize, context, body)
    tokenizer = tokenizer_of(context.model, "prompt: nothing here can be tokenized")
    names = [tokenizer.token_text(each) for each in prompt.token_ids]
    return JSONResponse(
        {
            "count": len(prompt.token_ids),
            "max_model_len": context.model.max_model_len,
            "tokens": prompt.token_ids,
            "token_strs": names if body.return_token_strs else None,
        }
    )


async def detokenize(request: Request) -> Response:
    context = context_of(request)
    body = parse(DetokenizeBody, await read_json(request, context.max_body_bytes))
    context.check_model(body.model)
    tokenizer = tokenizer_of(context.model, "tokens: nothing here can be detokenized")
    most = context.model.config.vocab_size - 1
    if body.tokens and not 0 <= min(body.tokens) <= max(body.tokens) <= most:
        raise RequestError(f"tokens: every token id must be from 0 to {most}")
    return JSONResponse({"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens)})


def _tokenize(context: HttpContext, body: TokenizeBody) -> Prompt:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("prompt: send exactly one of prompt and messages")
    if body.prompt is None:
        return conversation_prompt(context, body)
    special = body.add_special_tokens is not False
    return encode("prompt", body.prompt, context.model, add_special_tokens=special)
