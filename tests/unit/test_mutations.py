"""What the mutated messages of the system tests are made of."""

import json
import math

from google.protobuf.message import DecodeError

from moe_core.pb.epserve.v1 import gateway_pb2 as pb
from support.mutations import Mutator, encode, parse, varint

MESSAGE = pb.GenerateRequest(
    request_id="r",
    token_ids=pb.TokenIds(ids=[5, 300]),
    sampling=pb.SamplingParams(temperature=0.5, seed=2**40, stop=["a", "é"], logit_bias={3: 1.5}),
)
ENCODED = MESSAGE.SerializeToString()


def mutations(count: int, seed: int = 1) -> list[bytes]:
    mutator = Mutator(seed)
    return [mutator.mutate(ENCODED, MESSAGE.DESCRIPTOR) for _ in range(count)]


def parses(message: bytes) -> bool:
    try:
        pb.GenerateRequest.FromString(message)
    except DecodeError:
        return False
    return True


def test_a_message_is_its_fields() -> None:
    assert encode(parse(ENCODED)) == ENCODED
    assert [varint(value) for value in (0, 127, 128, 300)] == [b"\0", b"\x7f", b"\x80\1", b"\xac\2"]


def test_the_same_seed_gives_the_same_mutations() -> None:
    assert mutations(500) == mutations(500)
    assert mutations(500) != mutations(500, seed=2)


def test_many_mutations_parse_and_differ_and_many_do_not_parse() -> None:
    made = mutations(2_000)
    valid = [parses(message) for message in made]
    assert 500 < sum(valid) < 1_700
    assert len(set(made)) > 800


def test_every_field_is_reached_and_given_extreme_values() -> None:
    parsed = [pb.GenerateRequest.FromString(each) for each in mutations(5_000) if parses(each)]
    assert any(math.isnan(each.sampling.temperature) for each in parsed)
    assert any(2**32 - 1 in each.token_ids.ids for each in parsed)
    assert any(each.sampling.seed == 2**64 - 1 for each in parsed)
    assert any("🦊" in each.request_id for each in parsed)
    assert any(not each.HasField("sampling") for each in parsed)
    assert any(each.sampling.logit_bias != MESSAGE.sampling.logit_bias for each in parsed)


def test_json_is_changed_at_every_place() -> None:
    body = json.dumps({"prompt": "Once", "stop": ["a"], "options": {"n": 1}}).encode()
    mutator = Mutator(1)
    made = {mutator.mutate_json(body) for _ in range(1_000)}
    assert len(made) > 200
    for words in (b"NaN", b'"stop": []', b'"n": null', b"{}", b'{"prompt": "Once"', b"[[[[["):
        assert any(words in each for each in made), words
