"""100,000 messages that were made wrong, to one running cluster: each is answered, by a status that
says what is the matter, no process ends or grows, and a good request is served right afterwards.
"""

import asyncio
import collections
import itertools
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import grpc.aio
import pytest

from support.mutations import Mutator
from support.processes import TINY_MODEL, Running, serving
from support.served_cluster import connected, greedy
from support.valid_messages import Addressed, valid_messages

NUM_MESSAGES = 100_000
WARM_UP = 10_000
IN_FLIGHT = 48
CALL_DEADLINE_S = 60.0
MAX_GROWTH = 50 * 2**20
# A small pool: a message that asks for many tokens by chance cannot get more than that.
# In bfloat16, on CPUs that have it, oneDNN keeps code for each number of rows that it has met.
LAYOUT = ("--dtype", "float64", "--kv-cache-tokens", "128")
GOOD = greedy([5, 6, 7], max_tokens=40)
ACCEPTABLE = {
    "OK",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "FAILED_PRECONDITION",
    "RESOURCE_EXHAUSTED",
    "UNIMPLEMENTED",
}


# (route, valid body) of the gateway's HTTP server; each gets a cluster and NUM_BODIES mutations.
BODIES = (
    (
        "/v1/completions",
        b'{"prompt": [5, 6, 7], "max_tokens": 2, "seed": 1, "stop": ["x"]}',
    ),
    (
        "/v1/chat/completions",
        b'{"messages": [{"role": "user", "content": "The for"}], "max_tokens": 2, "seed": 1, '
        b'"logit_bias": {"7": 1.5}, "logprobs": true, "top_logprobs": 1}',
    ),
    ("/tokenize", b'{"prompt": "The for statement", "add_special_tokens": false}'),
    ("/detokenize", b'{"tokens": [5, 6, 7]}'),
)
NUM_BODIES = 3_000
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


class Sender:
    """Sends encoded messages, many in flight on one channel a process, and counts the answers."""

    def __init__(self, addresses: dict[str, str]) -> None:
        self._channels = {
            name: grpc.aio.insecure_channel(address) for name, address in addresses.items()
        }
        self.statuses: collections.Counter[tuple[str, str]] = collections.Counter()
        self.examples: dict[tuple[str, str], tuple[bytes, str]] = {}

    async def send_all(self, messages: Iterator[Addressed]) -> None:
        async def work() -> None:
            for each in messages:
                await self._send(each)

        await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    async def _send(self, each: Addressed) -> None:
        called, channel = each.called, self._channels[each.process]
        path = f"/{called.containing_service.full_name}/{called.name}"
        status, details = "OK", ""
        try:
            if called.client_streaming:
                call = channel.stream_stream(path)(iter([each.message]), timeout=CALL_DEADLINE_S)
            elif called.server_streaming:
                call = channel.unary_stream(path)(each.message, timeout=CALL_DEADLINE_S)
            else:
                await channel.unary_unary(path)(each.message, timeout=CALL_DEADLINE_S)
            if called.server_streaming:
                async for _ in call:
                    if called.name in ("WatchCluster", "FollowLeader"):  # which have no end
                        call.cancel()
                        break
        except grpc.aio.AioRpcError as error:
            status, details = error.code().name, error.details() or ""
        self.statuses[path, status] += 1
        self.examples.setdefault((path, status), (each.message, details))


def post(url: str, body: bytes) -> tuple[int, bytes]:
    """The status and what is answered, an event stream to its end."""
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=CALL_DEADLINE_S) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def memory(serve: Running) -> dict[int, int]:
    """Resident bytes by process id."""
    return {process.pid: process.memory_info().rss for process in serve.family()}


def mutated(seeds: list[Addressed], mutator: Mutator) -> Iterator[Addressed]:
    """Without end, each in its turn."""
    for each in itertools.cycle(seeds):
        message = mutator.mutate(each.message, each.called.input_type)
        yield Addressed(each.process, each.called, message)


@pytest.mark.timeout(900)
def test_mutated_messages_harm_nobody() -> None:
    with serving(*LAYOUT) as (serve, target), connected(target) as cluster:
        wanted = cluster.generate(GOOD)
        messages = mutated(valid_messages(cluster.state), Mutator(seed=1))

        async def run() -> tuple[Sender, dict[int, int]]:
            sender = Sender(cluster.addresses)
            await sender.send_all(itertools.islice(messages, WARM_UP))
            warm = memory(serve)
            await sender.send_all(itertools.islice(messages, NUM_MESSAGES - WARM_UP))
            await sender.close()
            return sender, warm

        sender, warm = asyncio.run(run())
        unexpected = {
            key: (count, sender.examples[key])
            for key, count in sender.statuses.items()
            if key[1] not in ACCEPTABLE
        }
        assert unexpected == {}
        assert sum(sender.statuses.values()) == NUM_MESSAGES
        now = memory(serve)
        assert now.keys() == warm.keys()
        assert {pid: now[pid] - warm[pid] for pid in now if now[pid] - warm[pid] > MAX_GROWTH} == {}
        assert cluster.settled().is_idle
        assert cluster.generate(GOOD) == wanted
        print(dict(sender.statuses))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a chat template."""
    model = tmp_path_factory.mktemp("models") / "chatty"
    shutil.copytree(TINY_MODEL, model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return model


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("route", "body"), BODIES)
def test_mutated_bodies_harm_nobody(chatty: Path, route: str, body: bytes) -> None:
    mutator = Mutator(seed=2)
    with serving(*LAYOUT, model=chatty) as (serve, _), ThreadPoolExecutor(IN_FLIGHT) as pool:
        (ready,) = (line for line in serve.out if "ready: serving" in line)
        (url,) = (word + route for word in ready.split() if word.startswith("http://"))
        wanted = post(url, body)

        def run(count: int) -> collections.Counter[int]:
            bodies = [mutator.mutate_json(body) for _ in range(count)]
            return collections.Counter(
                status for status, _ in pool.map(post, itertools.repeat(url), bodies)
            )

        run(NUM_BODIES // 4)
        warm = memory(serve)
        statuses = run(NUM_BODIES)
        assert all(200 <= status < 500 for status in statuses), statuses
        now = memory(serve)
        assert now.keys() == warm.keys()
        assert {pid: now[pid] - warm[pid] for pid in now if now[pid] - warm[pid] > MAX_GROWTH} == {}
        assert post(url, body)[0] == wanted[0] == 200
