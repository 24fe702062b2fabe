"""Encoded protobuf messages, and JSON, made wrong in ways that parsers and readers trip over.
Knows the wire format; a message's descriptor says which of its fields are messages themselves.
"""

import json
import math
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

VARINT, I64, LEN, I32 = 0, 1, 2, 5
INTEGERS = (0, 1, 2, 127, 128, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
FLOATS = (math.nan, math.inf, -math.inf, -0.0, 1e-45, 3.4e38, -1.0, 1e9)
LENGTHS = (1, 2**20, 2**31 - 1, 2**31, 2**32, 2**63)
TEXTS = ("", "\0", "\N{REPLACEMENT CHARACTER}", "🦊" * 40, "é\u0301", "\u202e", "x" * 5_000)

VALUES: tuple[object, ...] = (
    None,
    True,
    "",
    "5",
    [],
    {},
    [[]],
    -1,
    0,
    1e308,
    10**400,
    *FLOATS,
    *TEXTS,
)
DEEP = b"[" * 100_000  # no parser may recurse that far


@dataclass(frozen=True)
class Field:
    """`payload` as it stands on the wire, without a length before it."""

    number: int
    wire: int
    payload: bytes

    def encoded(self) -> bytes:
        length = varint(len(self.payload)) if self.wire == LEN else b""
        return varint(self.number << 3 | self.wire) + length + self.payload


class Mutator:
    """The same mutations every time for one `seed`."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._in_fields: tuple[Callable[[list[Field], int], bytes], ...] = (
            self._dropped,
            self._repeated,
            self._swapped,
            self._of_another_type,
            self._with_another_value,
            self._with_another_value,
            self._with_a_wrong_length,
            self._with_an_unknown_field,
        )

    def mutate(self, message: bytes, descriptor: Descriptor) -> bytes:
        """Another message, which may by chance be valid."""
        choice = self._random.random()
        if choice < 0.1:
            return message[: self._random.randrange(len(message) + 1)]
        if choice < 0.25:
            return self._with_flipped_bits(message)
        if choice < 0.3:
            return self._random.randbytes(self._random.randrange(200))
        return self._mutate_fields(message, descriptor)

    def mutate_json(self, body: bytes) -> bytes:
        """Another body for one that is valid JSON; it may by chance be valid too."""
        choice = self._random.random()
        if choice < 0.1:
            return body[: self._random.randrange(len(body) + 1)]
        if choice < 0.25:
            return self._with_flipped_bits(body)
        if choice < 0.27:
            return DEEP
        document = json.loads(body)
        holder, key = self._random.choice(list(_places(document)))
        if choice < 0.35:
            del holder[key]
        elif choice < 0.4:
            return body.rstrip().removesuffix(b"}") + b"," + body.lstrip().removeprefix(b"{")
        else:
            holder[key] = self._random.choice((*VALUES, self._integer(), {"a": [json.loads(body)]}))
        return json.dumps(document).encode()

    def _mutate_fields(self, message: bytes, descriptor: Descriptor | None) -> bytes:
        fields = parse(message)
        if not fields:
            return message + self._unknown().encoded()
        at = self._random.randrange(len(fields))
        inner = _message_type(descriptor, fields[at].number)
        if inner is not None and fields[at].wire == LEN and self._random.random() < 0.7:
            fields[at] = replace(fields[at], payload=self._mutate_fields(fields[at].payload, inner))
            return encode(fields)
        return self._random.choice(self._in_fields)(fields, at)

    def _with_flipped_bits(self, message: bytes) -> bytes:
        changed = bytearray(message)
        for _ in range(self._random.randint(1, 4) if message else 0):
            changed[self._random.randrange(len(changed))] ^= 1 << self._random.randrange(8)
        return bytes(changed)

    def _dropped(self, fields: list[Field], at: int) -> bytes:
        return encode(fields[:at] + fields[at + 1 :])

    def _repeated(self, fields: list[Field], at: int) -> bytes:
        return encode(fields + [fields[at]] * self._random.choice((1, 2, 50)))

    def _swapped(self, fields: list[Field], at: int) -> bytes:
        fields[at] = replace(fields[at], number=self._random.choice(fields).number)
        return encode(fields)

    def _of_another_type(self, fields: list[Field], at: int) -> bytes:
        """The tag says so; the bytes stay, and are read as what they are not."""
        wrong = bytes([fields[at].number << 3 & 0xFF | self._random.randrange(8)])
        return encode(fields[:at]) + wrong + fields[at].payload + encode(fields[at + 1 :])

    def _with_a_wrong_length(self, fields: list[Field], at: int) -> bytes:
        tag = varint(fields[at].number << 3 | LEN)
        length = varint(self._random.choice(LENGTHS))
        return encode(fields[:at]) + tag + length + fields[at].payload + encode(fields[at + 1 :])

    def _with_another_value(self, fields: list[Field], at: int) -> bytes:
        field = fields[at]
        if field.wire == VARINT:
            payload = varint(self._integer())
        elif field.wire == I32:
            payload = struct.pack("<f", self._random.choice(FLOATS))
        elif field.wire == I64:
            payload = struct.pack("<d", self._random.choice(FLOATS))
        else:
            payload = self._other_bytes(field.payload)
        fields[at] = replace(field, payload=payload)
        return encode(fields)

    def _integer(self) -> int:
        some = self._random.getrandbits(self._random.randint(1, 64))
        return self._random.choice((some, self._random.choice(INTEGERS)))

    def _other_bytes(self, payload: bytes) -> bytes:
        return self._random.choice(
            (
                self._random.choice(TEXTS).encode(),
                self._random.randbytes(self._random.randrange(64)),
                self._with_flipped_bits(payload),
                payload * 20,
                b"".join(varint(self._integer()) for _ in range(3)),  # repeated integers
                "".join(chr(self._random.randrange(1, 0xD800)) for _ in range(20)).encode(),
            )
        )

    def _with_an_unknown_field(self, fields: list[Field], at: int) -> bytes:
        return encode([*fields[:at], self._unknown(), *fields[at:]])

    def _unknown(self) -> Field:
        nested = Field(self._random.choice((1, 77, 2**29 - 1)), LEN, b"")
        for _ in range(self._random.choice((1, 3, 150))):
            nested = replace(nested, payload=nested.encoded())
        return nested


def _places(value: Any) -> Iterator[tuple[Any, Any]]:  # noqa: ANN401
    """Every (object or list, key) within, the outermost value's own excepted."""
    keys = value if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*encoded, value))


def encode(fields: list[Field]) -> bytes:
    return b"".join(field.encoded() for field in fields)


def parse(message: bytes) -> list[Field]:
    """The fields of one valid message, inner ones not looked into."""
    fields, at = [], 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        if tag & 7 == LEN:
            size, at = _read_varint(message, at)
            end = at + size
        else:
            end = {VARINT: _read_varint(message, at)[1], I64: at + 8, I32: at + 4}[tag & 7]
        fields.append(Field(tag >> 3, tag & 7, message[at:end]))
        at = end
    return fields


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at] if at < len(message) else 0
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _message_type(descriptor: Descriptor | None, number: int) -> Descriptor | None:
    field: FieldDescriptor | None = (
        None if descriptor is None else descriptor.fields_by_number.get(number)
    )
    found: Descriptor | None = None if field is None else field.message_type
    return found
