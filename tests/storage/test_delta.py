"""The delta file: a safetensors file that checks itself."""

import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save as plain_safetensors
from toy_blocks import block, column, content, head, refresh, refreshed, rows

import lightning_scar.storage.delta_file as delta_module
from lightning_scar.storage.delta import (
    WHOLE,
    Column,
    DamagedError,
    Delta,
    Encoded,
    NewerFormatError,
    Refresh,
    Section,
    Span,
    StoredBlock,
    block_key,
)
from lightning_scar.storage.delta_file import (
    FORMAT_VERSION,
    encode,
    read_blocks,
    read_delta,
    read_entries,
    read_refresh,
)
from lightning_scar.storage.directory import Directory
from lightning_scar.storage.head import Head, Mark, Version

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
VERSION = Version(1, 2, 30)
OLDER = Version(1, 1, 20)
NAME = "delta.safetensors"


def write(
    folder: Directory,
    sections: Sequence[Section],
    refreshes: Sequence[Refresh] = (),
    head: Head = head(VERSION),  # noqa: B008
) -> Delta:
    """Writes a delta; what the writer knows of it is what a reader finds."""
    folder.create()
    written = encode(head, sections, refreshes).write(folder, NAME)
    found = read_delta(folder, NAME)
    assert contents(written) == contents(found)
    return found


def contents(delta: Delta) -> object:
    blocks = [(block.group, block.span, block.key, block.version, block.slots) for block in delta.blocks]
    refreshes = [(each.group, each.spans, each.bases, each.slots) for each in delta.refreshes]
    return delta.name, delta.nbytes, delta.head, blocks, refreshes


def values(folder: Directory, delta: Delta) -> list[dict[str, bytes]]:
    """What is in every block."""
    memory = [found.new_memory() for found in delta.blocks]
    with folder.source(delta.name) as source:
        read_blocks(source, ((block, into, ()) for block, into in zip(delta.blocks, memory, strict=True)))
    return [{slot: bytes(into) for slot, into in found.items()} for found in memory]


_FILE = encode(
    head(VERSION),
    [rows("layer.weight", [(0, 4), (8, 10)], VERSION, slots="param exp_avg"), block("bias", VERSION, 3)],
    [refresh("layer.weight", {(4, 8): OLDER}, VERSION)],
)
A_DELTA = _FILE.front + b"".join(_FILE.data())
DATA_STARTS = len(_FILE.front)


def parse(data: bytes) -> Delta:
    folder = Directory("memory://delta-parse")
    folder.write(NAME, [data])
    return read_delta(folder, NAME)


def flipped(data: bytes, position: int, mask: int) -> bytes:
    return data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :]


# -- what is put in comes out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_safe_open_reads_the_rows_of_a_section(file_url: str, dtype: str) -> None:
    value = torch.arange(7 * 5).view(7, 5).to(DTYPES[dtype])
    data = value.view(torch.uint8).numpy().tobytes() if dtype != "BOOL" else value.numpy().tobytes()
    row = len(data) // 7
    stored = column(data[: 3 * row], data[3 * row :], row_shape=(5,), dtype=dtype)
    write(Directory(file_url), [Section("w", [(0, 3), (6, 10)], [VERSION, OLDER], {"param": stored})])
    with safe_open(Path(file_url) / NAME, framework="pt") as file:
        assert set(file.keys()) == {"w/param", "blocks", "checksums", "refreshed", "encoded"}
        found = file.get_tensor("w/param")
        assert file.get_tensor("blocks").tolist() == [[0, 3, *VERSION], [6, 10, *OLDER]]
    assert found.dtype == DTYPES[dtype]
    assert torch.equal(found, value)


def test_safe_open_reads_a_refresh(file_url: str) -> None:
    codes, scales = torch.arange(6, dtype=torch.uint8), torch.tensor([0.5, 2.0], dtype=torch.bfloat16)
    pieces = [memoryview(codes[:4].numpy()), memoryview(codes[4:].numpy())]
    encoded = Encoded("linear4", pieces, [memoryview(scales.view(torch.uint8).numpy())])
    given_one = Refresh("w", refreshed({(0, 4): OLDER, (4, 6): VERSION}), {"exp_avg": encoded})
    write(Directory(file_url), [], [given_one])
    with safe_open(Path(file_url) / NAME, framework="pt") as file:
        assert torch.equal(file.get_tensor("refresh/exp_avg/codes"), codes)
        assert torch.equal(file.get_tensor("refresh/exp_avg/scales"), scales)
        assert file.get_tensor("refreshed").tolist() == [[0, 4, *OLDER[:2]], [4, 6, *VERSION[:2]]]


versions = st.builds(Version, st.integers(1, 3), st.integers(0, 9), st.integers(0, 99))
cuts = st.lists(st.integers(0, 20), min_size=2, max_size=5, unique=True).map(sorted)
names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8)


@st.composite
def sections(draw: st.DrawFn) -> Section:
    spans: list[Span] = [WHOLE]
    if draw(st.booleans()):
        ends = draw(cuts)
        spans = list(pairwise(ends))
    columns: dict[str, Column] = {}
    for slot in draw(st.lists(st.sampled_from(["param", "exp_avg", "\u0394"]), unique=True, min_size=1)):
        dtype = draw(st.sampled_from(["F32", "BF16", "U8", "C64"]))
        shape = tuple(draw(st.lists(st.integers(0, 3), max_size=2)))
        size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
        counts = [last - first or draw(st.integers(0, 9)) for first, last in spans]
        columns[slot] = column(*(draw(st.binary(min_size=n * size, max_size=n * size)) for n in counts))
        columns[slot] = Column(dtype, shape, columns[slot].nbytes, columns[slot].checksums, columns[slot].data)
    return Section(draw(names), spans, [draw(versions) for _ in spans], columns)


@st.composite
def refreshes(draw: st.DrawFn) -> list[Refresh]:
    found = []
    for group in draw(st.lists(names, unique=True, max_size=3)):
        ends = draw(cuts)
        spans = list(pairwise(ends))
        pieces = st.lists(st.binary(max_size=5).map(memoryview), max_size=3)
        pairs = st.lists(st.binary(min_size=2, max_size=2).map(memoryview), max_size=3)
        slots = {
            slot: Encoded(draw(st.sampled_from(["linear4", "log8"])), draw(pieces), draw(pairs))
            for slot in draw(st.lists(st.sampled_from(["param", "exp_avg"]), unique=True))
        }
        found.append(Refresh(group, refreshed({span: draw(versions) for span in spans}), slots))
    return found


@given(put=st.lists(sections(), max_size=6), also=refreshes())
def test_whatever_is_put_in_comes_out_and_every_entry_is_aligned(
    tmp_path_factory: pytest.TempPathFactory, put: list[Section], also: list[Refresh]
) -> None:
    folder = Directory(tmp_path_factory.mktemp("delta"))
    delta = write(folder, put, also)
    assert [found.key for found in delta.blocks] == [key for section in put for key in section.keys]
    assert [found.version for found in delta.blocks] == [version for section in put for version in section.versions]
    expected = [
        {slot: list(map(bytes, each.data()))[i] for slot, each in section.columns.items()}
        for section in put
        for i in range(len(section.spans))
    ]
    assert values(folder, delta) == expected
    itemsizes = {name: dtype.itemsize for name, dtype in DTYPES.items()}
    assert all(entry.start % itemsizes[entry.dtype] == 0 for b in delta.blocks for entry in b.slots.values())
    assert [(found.group, found.spans, found.bases) for found in delta.refreshes] == [
        (each.group, each.spans, each.bases) for each in also
    ]
    with folder.source(NAME) as source:
        for stored, given_one in zip(delta.refreshes, also, strict=True):
            back = read_refresh(source, stored)
            assert back.slots.keys() == given_one.slots.keys()
            for slot, (codec, codes, scales) in back.slots.items():
                was = given_one.slots[slot]
                assert (codec, b"".join(codes), b"".join(scales)) == (codec, b"".join(was.codes), b"".join(was.scales))
                assert codec == was.codec
    with safe_open(folder.file(NAME), framework="pt") as file:
        slots = sum(len(section.columns) for section in put)
        assert len(list(file.keys())) == 4 + slots + 2 * len({slot for each in also for slot in each.slots})


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
    put = [rows("w", [(0, 2), (4, 5)], VERSION, 4, "param exp_avg"), block("\u0394.weight", OLDER, 0)]
    delta = write(Directory(url), put, [refresh("w", {(2, 4): OLDER}, VERSION, codes=5)], said)
    assert delta.head == said
    assert [(found.key, found.version) for found in delta.blocks] == [
        ("w[0:2]", VERSION),
        ("w[4:5]", VERSION),
        ("\u0394.weight", OLDER),
    ]
    assert [entry.row_shape for entry in delta.blocks[0].slots.values()] == [(4,), (4,)]
    assert [found.nbytes for found in delta.blocks] == [16, 8, 0]
    assert (delta.block_bytes, delta.refresh_bytes) == (24, 7)
    assert delta.oldest_incarnation == 1


def test_blocks_of_one_group_may_differ_in_slots_and_lie_in_one_delta_twice(url: str) -> None:
    folder, spans = Directory(url), [(0, 2), (2, 4)]
    put = [
        rows("w", spans, OLDER),
        rows("w", spans[:1], VERSION, slots="param exp_avg"),
        block("skeleton", OLDER),
        block("skeleton", VERSION),
    ]
    delta = write(folder, put)
    assert [(found.key, found.version, *found.slots) for found in delta.blocks] == [
        ("w[0:2]", OLDER, "param"),
        ("w[2:4]", OLDER, "param"),
        ("w[0:2]", VERSION, "param", "exp_avg"),
        ("skeleton", OLDER, "param"),
        ("skeleton", VERSION, "param"),
    ]
    found = values(folder, delta)
    assert found[0]["param"] == content("w[0:2]/param", OLDER, 32)
    assert found[2] == {slot: content(f"w[0:2]/{slot}", VERSION, 32) for slot in ("param", "exp_avg")}
    assert [each["param"] for each in found[3:]] == [content("skeleton", OLDER), content("skeleton", VERSION)]


def test_a_save_of_many_blocks_has_a_small_header() -> None:
    """About what GPT-2 small has: 150 tensors in 4,096 blocks of 128 KiB, of which a save writes one in 25."""
    rng = random.Random(0)
    groups = [f"model.transformer.h.{i // 12}.attn.c_attn.weight{i % 12}" for i in range(150)]
    sums = [0] * 4096
    exact, also = [], []
    for group in groups:
        spans = [(i * 768, (i + 1) * 768) for i in range(27)]
        chosen = [span for span in spans if rng.random() < 0.04]
        slots = {
            slot: Column("F32", (43,), 0, sums[: len(chosen)], list) for slot in ("param", "exp_avg", "exp_avg_sq")
        }
        if chosen:
            exact.append(Section(group, chosen, [VERSION] * len(chosen), slots))
        rest = [span for span in spans if span not in chosen]
        none = {slot: Encoded("linear4", [], []) for slot in slots}
        also.append(Refresh(group, refreshed(dict.fromkeys(rest, OLDER)), none))
    assert sum(len(each.spans) for each in (*exact, *also)) > 4_000
    assert len(encode(head(VERSION), exact, also).front) < 200_000


def test_rows_beyond_32_bits_are_stored_too(url: str) -> None:
    far = (2**40, 2**40 + 2)
    delta = write(Directory(url), [rows("w", [far], VERSION)], [refresh("w", {far: OLDER}, VERSION)])
    assert delta.blocks[0].span == delta.refreshes[0].spans[0] == far


# -- damage ------------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_of_header_and_tables_is_noticed() -> None:
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
def test_every_changed_byte_of_header_and_tables_is_noticed(position: int, mask: int) -> None:
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


def test_a_plain_safetensors_file_is_no_delta() -> None:
    with pytest.raises(DamagedError):
        parse(plain_safetensors({"w": torch.zeros(3)}))


def test_every_flipped_bit_of_the_data_is_noticed_when_it_is_read() -> None:
    assert len(A_DELTA) - DATA_STARTS == 2 * 6 * 16 + 3 + 8 + 2
    for position in range(DATA_STARTS, len(A_DELTA)):
        for bit in range(8):
            delta = parse(flipped(A_DELTA, position, 1 << bit))
            slots = [slot for refreshed in delta.refreshes for slot in refreshed.slots.values()]
            entries = [entry for found in delta.blocks for entry in found.slots.values()]
            entries += [entry for slot in slots for entry in (slot.codes, slot.scales)]
            (entry,) = (entry for entry in entries if entry.start <= position < entry.stop)
            with (
                Directory("memory://delta-parse").source(NAME) as source,
                pytest.raises(DamagedError, match="checksum"),
            ):
                read_entries(source, [(entry, memoryview(bytearray(entry.nbytes)))])


def test_a_file_that_shrinks_after_its_header_was_read_is_noticed(url: str) -> None:
    folder = Directory(url)
    delta = write(folder, [block("a", VERSION)])
    folder.write(NAME, [folder.read(NAME)[:-1]])
    entry = delta.blocks[0].slots["param"]
    with folder.source(NAME) as source, pytest.raises(DamagedError, match="too early"):
        read_entries(source, [(entry, memoryview(bytearray(entry.nbytes)))])


def test_a_newer_format_is_refused_by_name_with_a_remedy(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Directory(url)
    folder.create()
    monkeypatch.setattr(delta_module, "FORMAT_VERSION", FORMAT_VERSION + 1)
    encode(head(VERSION), [block("a", VERSION)]).write(folder, NAME)
    monkeypatch.undo()
    with pytest.raises(NewerFormatError, match=rf"{NAME} has format {FORMAT_VERSION + 1}.*up to 2: upgrade lightning"):
        read_delta(folder, NAME)


# -- names and order ---------------------------------------------------------------------------------------------------


@given(st.lists(st.builds(Version, st.integers(0, 5), st.integers(0, 5), st.integers(0, 5))))
def test_versions_are_ordered_by_incarnation_and_sequence_and_never_by_step(versions: list[Version]) -> None:
    found = [(version.incarnation, version.sequence) for version in sorted(versions)]
    assert found == sorted((version.incarnation, version.sequence) for version in versions)


def test_the_slots_of_a_block_are_looked_up_once_and_only_when_asked_for() -> None:
    asked = []
    found = StoredBlock("w", (0, 2), VERSION, lambda: asked.append(1) or {})  # type: ignore[func-returns-value]
    assert (found.key, asked) == (block_key("w", (0, 2)), [])
    assert (found.slots, found.nbytes, asked) == ({}, 0, [1])
