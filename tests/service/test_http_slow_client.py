"""A client that does not read its stream, over a real connection."""

import asyncio
import json
import socket

from moe_core.cluster import Role
from moe_core.pb.epserve.v1.logprobs_pb2 import TokenLogprobs
from support.fake_attention import FakeAttention
from support.http_gateway import http_side
from support.small_gateway import SmallGateway
from support.words import WORDS, word_tokenizer

LONG = [2 + index % 60 for index in range(6_000)]
SHORT = [7, 8, 9]
FIELDS = {"stream": True, "logprobs": 20}  # events of a kilobyte: more than a connection holds


def with_small_buffer(port: int) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", port))
    connection.setblocking(False)
    return connection


def words(tokens: list[int]) -> list[str]:
    first, *rest = [WORDS[token] for token in tokens]
    return [first, *(f" {word}" for word in rest)]


def is_held() -> bool:
    return any(task.get_name() == "slow client" for task in asyncio.all_tasks())


def texts(answer: bytes) -> list[str]:
    """Of all events; the last one must say that it is."""
    lines = [line for line in answer.split(b"\n") if line.startswith(b"data: ")]
    assert lines.pop() == b"data: [DONE]"
    return [json.loads(line[6:])["choices"][0]["text"] for line in lines]


async def test_a_stream_that_is_not_read_waits_holds_up_nobody_and_loses_nothing() -> None:
    fake = FakeAttention(lambda prompt: LONG if prompt[0] == 5 else SHORT)
    top = list(range(20, 40))
    fake.logprobs = TokenLogprobs(
        token_id=9, rank=1, top_token_ids=top, top_logprobs=[-1.25 * each for each in top]
    )
    async with SmallGateway(tokenizer=word_tokenizer()) as gateway, http_side(gateway) as client:
        await gateway.add_worker(Role.ATTN, fake)
        reader, writer = await asyncio.open_connection(
            sock=with_small_buffer(client.base_url.port or 0), limit=4096
        )
        body = json.dumps({"prompt": [5], **FIELDS})
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        writer.write(f"{head}connection: close\r\n\r\n{body}".encode())
        async with asyncio.timeout(30):
            while not is_held():
                await asyncio.sleep(0.01)
        other = await client.post("/v1/completions", json={"prompt": [6], **FIELDS})
        assert is_held()
        held = await reader.read()
        writer.close()
    assert texts(other.content) == words(SHORT)
    assert texts(_unchunked(held)) == words(LONG)


def _unchunked(answer: bytes) -> bytes:
    """The body of a chunked answer."""
    at, parts = answer.index(b"\r\n\r\n") + 4, []
    while size := int(answer[at : (begin := answer.index(b"\r\n", at) + 2)], 16):
        parts.append(answer[begin : begin + size])
        at = begin + size + 2
    return b"".join(parts)
