"""The delta file: a safetensors file that checks itself."""

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from toy_blocks import block, head, payload

import lightning_scar.storage.delta as delta_module
from lightning_scar.core.staging import payload as tensor_payload
from lightning_scar.storage.delta import (
    FORMAT_VERSION,
    BlockData,
    DamagedError,
    Delta,
    NewerFormatError,
    Payload,
    encode,
    read_delta,
    read_entries,
)
from lightning_scar.storage.directory import Directory
from lightning_scar.storage.head import Head, Mark, Version

NAMED = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
]
UNNAMED = [torch.complex128, torch.float8_e5m2]
VERSION = Version(1, 2, 30)
NAME = "delta.safetensors"


def tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    data = torch.tensor(list(random.Random(size).randbytes(size)), dtype=torch.uint8)
    return (data % 2 if dtype == torch.bool else data).view(dtype).view(shape)


def as_bytes(value: Tensor) -> Tensor:
    return value.contiguous().view(-1).view(torch.uint8)


def stored(value: Tensor) -> Payload:
    return tensor_payload(as_bytes(value), value.dtype, tuple(value.shape))


def write(folder: Directory, blocks: list[BlockData], head: Head = head(VERSION)) -> Delta:  # noqa: B008
    folder.create()
    folder.write(NAME, encode(head, blocks))
    return read_delta(folder, NAME)


def a_delta() -> bytes:
    return b"".join(encode(head(VERSION), [block("layer.weight[0:4]", VERSION), block("bias[0:1]", VERSION, 3)]))


A_DELTA = a_delta()
DATA_STARTS = 8 + int.from_bytes(A_DELTA[:8], "little")


def parse(data: bytes) -> Delta:
    folder = Directory("memory://delta-parse")
    folder.write(NAME, [data])
    return read_delta(folder, NAME)


def flipped(data: bytes, position: int, mask: int) -> bytes:
    return data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :]


@pytest.mark.parametrize("dtype", NAMED + UNNAMED, ids=str)
def test_safe_open_reads_every_dtype_and_those_it_does_not_know_as_bytes(file_url: str, dtype: torch.dtype) -> None:
    value = tensor(dtype, (3, 5))
    write(Directory(file_url), [BlockData("w[0:3]", VERSION, {"param": stored(value)})])
    with safe_open(Path(file_url) / NAME, framework="pt") as file:
        assert list(file.keys()) == ["w[0:3]/param@1.2"]
        found = file.get_tensor("w[0:3]/param@1.2")
    assert found.dtype == (dtype if dtype in NAMED else torch.uint8)
    assert found.shape == (value.shape if dtype in NAMED else (value.nbytes,))
    assert torch.equal(as_bytes(found), as_bytes(value))


@given(
    kinds=st.lists(
        st.tuples(st.sampled_from(NAMED + UNNAMED), st.lists(st.integers(0, 4), min_size=1, max_size=3)), max_size=12
    )
)
def test_every_entry_is_aligned_and_reads_back(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[torch.dtype, list[int]]]
) -> None:
    values = [tensor(dtype, tuple(shape)) for dtype, shape in kinds]
    folder = Directory(tmp_path_factory.mktemp("delta"))
    delta = write(folder, [BlockData(f"b{i}", VERSION, {"param": stored(v)}) for i, v in enumerate(values)])
    with folder.source(NAME) as source:
        for found, value in zip(delta.blocks, values, strict=True):
            entry = found.slots["param"]
            into = bytearray(entry.stop - entry.start)
            read_entries(source, [(entry, memoryview(into))])
            assert bytes(into) == as_bytes(value).numpy().tobytes()
            itemsize = value.dtype.itemsize if value.dtype in NAMED else 1
            assert entry.start % itemsize == 0 or value.numel() == 0
    with safe_open(folder.file(NAME), framework="pt") as file:
        assert len(list(file.keys())) == len(values)


def test_a_delta_says_what_was_put_into_it(url: str) -> None:
    said = head(
        VERSION,
        lineage=(0, 1),
        rank=3,
        world_size=4,
        kind="full",
        whole=True,
        consistent=(Mark(0, 20), Mark(1, 30)),
        state_bytes=123,
        info={"finished": True, "note": '\u00e9\u2028"\\'},
    )
    blocks = [
        BlockData("a", VERSION, {"param": payload(b"12"), "exp_avg": payload(b"345")}),
        BlockData("\u0394.weight", Version(1, 1, 20), {"param": payload(b"")}),
    ]
    delta = write(Directory(url), blocks, said)
    assert delta.head == said
    assert [(found.key, found.version, found.version.step) for found in delta.blocks] == [
        ("a", VERSION, 30),
        ("\u0394.weight", Version(1, 1, 20), 20),
    ]
    assert {slot: tuple(entry.shape) for slot, entry in delta.blocks[0].slots.items()} == {
        "param": (2,),
        "exp_avg": (3,),
    }
    assert [found.nbytes for found in delta.blocks] == [5, 0]


def test_one_delta_may_hold_two_versions_of_a_block(url: str) -> None:
    older = Version(1, 1, 20)
    folder = Directory(url)
    delta = write(folder, [block("a", VERSION), block("a", older)])
    for found, version in zip(delta.blocks, (VERSION, older), strict=True):
        into = memoryview(bytearray(found.nbytes))
        with folder.source(NAME) as source:
            read_entries(source, [(found.slots["param"], into)])
        assert into == block("a", version).slots["param"].data()


def test_every_flipped_bit_of_the_header_is_noticed() -> None:
    for position in range(DATA_STARTS):
        for bit in range(8):
            # One of the bits makes a newer format of the present one: refused all the same.
            with pytest.raises((DamagedError, NewerFormatError)):
                parse(flipped(A_DELTA, position, 1 << bit))


@pytest.mark.parametrize("byte", range(8))
def test_a_damaged_length_of_the_header_costs_no_memory(url: str, byte: int) -> None:
    folder = Directory(url)
    folder.create()
    folder.write(NAME, [flipped(A_DELTA, byte, 255)])
    with pytest.raises(DamagedError):
        read_delta(folder, NAME)


@given(position=st.integers(0, DATA_STARTS - 1), mask=st.integers(1, 255))
def test_every_changed_byte_of_the_header_is_noticed(position: int, mask: int) -> None:
    with pytest.raises(
        (DamagedError, NewerFormatError), match=r"delta-parse/delta\.safetensors (is damaged|has format)"
    ):
        parse(flipped(A_DELTA, position, mask))


def test_a_file_cut_short_anywhere_is_noticed() -> None:
    for length in range(len(A_DELTA)):
        with pytest.raises(DamagedError):
            parse(A_DELTA[:length])
    parse(A_DELTA)


@given(
    garbage=st.binary(max_size=300)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("__metadata__") | st.text(), inner),
        max_leaves=5,
    ).map(lambda value: (text := json.dumps(value).encode()) and len(text).to_bytes(8, "little") + text)
)
def test_what_is_no_delta_is_damaged_whatever_it_is(garbage: bytes) -> None:
    with pytest.raises(DamagedError):
        parse(garbage)


@given(position=st.integers(DATA_STARTS, len(A_DELTA) - 1), mask=st.integers(1, 255))
def test_every_changed_byte_of_the_data_is_noticed_when_it_is_read(position: int, mask: int) -> None:
    delta = parse(flipped(A_DELTA, position, mask))
    (entry,) = (e for b in delta.blocks for e in b.slots.values() if e.start <= position < e.stop)
    with (
        Directory("memory://delta-parse").source(NAME) as source,
        pytest.raises(DamagedError, match="checksum"),
    ):
        read_entries(source, [(entry, memoryview(bytearray(entry.stop - entry.start)))])


def test_a_file_that_shrinks_after_its_header_was_read_is_noticed(url: str) -> None:
    folder = Directory(url)
    delta = write(folder, [block("a", VERSION)])
    folder.write(NAME, [folder.read(NAME)[:-1]])
    entry = delta.blocks[0].slots["param"]
    with folder.source(NAME) as source, pytest.raises(DamagedError, match="too early"):
        read_entries(source, [(entry, memoryview(bytearray(entry.stop - entry.start)))])


def test_a_newer_format_is_refused_by_name_with_a_remedy(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Directory(url)
    monkeypatch.setattr(delta_module, "FORMAT_VERSION", FORMAT_VERSION + 1)
    write(folder, [block("a", VERSION)])
    monkeypatch.undo()
    with pytest.raises(NewerFormatError, match=rf"{NAME} has format {FORMAT_VERSION + 1}.*up to 1: upgrade lightning"):
        read_delta(folder, NAME)


@given(st.lists(st.builds(Version, st.integers(0, 5), st.integers(0, 5), st.integers(0, 5))))
def test_versions_are_ordered_by_incarnation_and_sequence_and_never_by_step(versions: list[Version]) -> None:
    found = [(version.incarnation, version.sequence) for version in sorted(versions)]
    assert found == sorted((version.incarnation, version.sequence) for version in versions)
