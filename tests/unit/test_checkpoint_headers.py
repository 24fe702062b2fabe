"""safetensors headers: what is read, and what is refused, compared with the library's own."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from moe_core.checkpoint.headers import MAX_HEADER_BYTES, read_header
from moe_core.errors import CheckpointError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64)
QUICK = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def encode(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    return size.to_bytes(8, "little") + text + data


def one_tensor(**changes: object) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


def refusal(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    tensors = {}
    for name in draw(st.lists(st.text("abc.", min_size=1, max_size=6), max_size=4, unique=True)):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        tensors[name] = torch.zeros(shape, dtype=draw(st.sampled_from(DTYPES)))
    return save(tensors)


@QUICK
@given(content=files())
def test_reads_what_the_library_writes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    header = read_header(path)
    found = {e.name: (e.dtype, list(e.shape), e.nbytes) for e in header.tensors}
    assert found == {n: (t["dtype"], t["shape"], len(t["data"])) for n, t in deserialize(content)}
    assert header.file_bytes == len(content)


@QUICK
@given(content=files(), place=st.integers(0, 400), value=st.integers(0, 255), cut=st.booleans())
def test_refuses_whatever_the_library_refuses(
    tmp_path: Path, content: bytes, place: int, value: int, cut: bool
) -> None:
    place %= len(content)
    after = b"" if cut else bytes([value]) + content[place + 1 :]
    damaged = content[:place] + after
    path = tmp_path / "x.safetensors"
    path.write_bytes(damaged)
    try:
        deserialize(damaged)
    except SafetensorError:
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            read_header(path)


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 1 << 62, 2**64 - 1])
def test_a_huge_header_length_is_refused_before_anything_is_allocated(
    tmp_path: Path, length: int
) -> None:
    assert "header" in refusal(tmp_path, encode({}, length=length))


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    assert "truncated" in refusal(tmp_path, encode({}, length=5000))


def test_a_truncated_file_is_refused_with_the_tensor_that_is_cut(tmp_path: Path) -> None:
    message = refusal(tmp_path, encode(one_tensor(), b"1234567"))
    assert "tensor a" in message
    assert "truncated" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "F33"}, "unknown dtype 'F33'"),
        ({"dtype": 3}, "unknown dtype 3"),
        ({"shape": [3]}, "does not take the 8 bytes"),
        ({"shape": [-2]}, "shape [-2]"),
        ({"shape": [2.0]}, "shape [2.0]"),
        ({"shape": [True, 2]}, "shape [True, 2]"),
        ({"shape": [1 << 40, 1 << 40]}, "does not take"),
        ({"data_offsets": [8, 0]}, "data_offsets [8, 0]"),
        ({"data_offsets": [0, 8, 8]}, "data_offsets"),
        ({"data_offsets": [4, 12]}, "follows a hole"),
    ],
)
def test_an_impossible_entry_is_refused_with_the_tensors_name(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    message = refusal(tmp_path, encode(one_tensor(**changes), bytes(12)))
    assert "tensor a" in message
    assert words in message


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    both = one_tensor() | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}
    assert "tensor b: overlaps" in refusal(tmp_path, encode(both, bytes(12)))


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    assert "after the last tensor" in refusal(tmp_path, encode(one_tensor(), bytes(9)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": {}, "a": {}}', "'a' occurs twice"),
        (b"[]", "must hold a JSON object"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": 1}', "must be an object"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"\\ud800": {}}', "not valid JSON"),
        (b'{"__metadata__": {"a": 1}}', "__metadata__"),
    ],
)
def test_a_header_that_is_no_header_is_refused(tmp_path: Path, text: bytes, words: str) -> None:
    assert words in refusal(tmp_path, encode(text))


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_too_short_for_a_header_is_refused(tmp_path: Path, size: int) -> None:
    assert "too few" in refusal(tmp_path, bytes(size))


def test_a_pipe_in_place_of_a_file_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(path)
