"""Refreshes decoded into the tensors that hold their bases."""

import pytest
import torch
from core_helpers import bits, codes_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_scar.core import decoding
from lightning_scar.core.blocks import Group, Slot, rows
from lightning_scar.core.codec import Codec, decode, encode
from lightning_scar.core.decoding import decode_into
from lightning_scar.core.rows import pieces
from lightning_scar.core.save import Part
from lightning_scar.storage.delta import Encoded, Refresh

CODECS = {"param": Codec("linear", 4), "exp_avg": Codec("linear", 8), "exp_avg_sq": Codec("log", 4)}


def refreshed(group: Group, live: list[Tensor], base: Tensor, numbers: list[int]) -> Refresh:
    """The refresh of some blocks, as a reader gets it: in one piece."""
    table = torch.tensor([(*group.span(number), 1, 1) for number in numbers], dtype=torch.int64).view(-1, 4)
    part = Part(group, live, refreshed=numbers, table=table)
    for slot, tensor in zip(group.slots, live, strict=True):
        codes = part.codes[slot.name] = codes_of(CODECS[slot.name], group)
        own_bases = [piece.blocks for piece in pieces(rows(base), group)]
        for i, (piece, (own, scales)) in enumerate(
            zip(pieces(rows(tensor), group), codes.pieces.values(), strict=True)
        ):
            against = own_bases[i] if slot.name == "param" else None
            encode(codes.codec, piece.blocks, against, codes=own, scales=scales)
    found = part.refresh()
    assert found is not None
    slots = {
        name: Encoded(e.codec, [memoryview(bytearray(b"".join(e.codes)))], [memoryview(bytearray(b"".join(e.scales)))])
        for name, e in found.slots.items()
    }
    return Refresh(found.group, found.rows, slots)


def one_block(codec: Codec, values: Tensor, base: Tensor | None) -> Tensor:
    """What a block comes back as, encoded and decoded alone."""
    codes, scales = codec.empty(1, values.numel())
    encode(codec, values.unsqueeze(0), None if base is None else base.unsqueeze(0), codes=codes, scales=scales)
    return decode(codec, codes, scales, values.numel()).view_as(values)


@given(
    shape=st.sampled_from([(9, 30), (7,), (5, 3, 2, 2), (1, 400)]),
    rows_per_block=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    chosen=st.data(),
)
def test_every_wanted_block_is_its_base_and_its_codes_and_others_are_left_alone(
    shape: tuple[int, ...], rows_per_block: int, dtype: torch.dtype, chosen: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    slots = tuple(Slot(name, dtype, None, ()) for name in CODECS)
    group = Group("w", shape, slots, rows_per_block, lazy=True)
    live = [torch.randn(shape, generator=generator).to(dtype) for _ in slots]
    live[2] = live[2].abs()
    base = torch.randn(shape, generator=generator).to(dtype)
    numbers = sorted(chosen.draw(st.sets(st.integers(0, len(group) - 1), min_size=1)))
    places = sorted(chosen.draw(st.sets(st.integers(0, len(numbers) - 1), min_size=1)))
    before = [base, torch.zeros_like(base), torch.ones_like(base)]
    targets = [tensor.clone() for tensor in before]
    decode_into([(group, refreshed(group, live, base, numbers), places)], {"w": targets})
    wanted = {numbers[place] for place in places}
    for i, (slot, codec) in enumerate(CODECS.items()):
        for number in range(len(group)):
            span = slice(*group.span(number))
            expected = before[i][span]
            if number in wanted and slot == "param":
                difference = one_block(codec, live[i][span], base[span])
                expected = (base[span].to(torch.promote_types(dtype, torch.float32)) + difference).to(dtype)
            elif number in wanted:
                expected = one_block(codec, live[i][span], None).to(dtype)
            assert torch.equal(bits(targets[i][span]), bits(expected)), (slot, number)


@pytest.mark.parametrize("at_once", [1, 100, 1 << 20])
def test_blocks_are_decoded_alike_in_whatever_stretches(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    group = Group("w", (31, 9), (Slot("param", torch.float32, None, ()),), 2, lazy=True)
    live, base = torch.randn(31, 9), torch.randn(31, 9)
    refresh = refreshed(group, [live], base, list(range(16)))
    expected, found = base.clone(), base.clone()
    decode_into([(group, refresh, range(16))], {"w": [expected]})
    monkeypatch.setattr(decoding, "_AT_ONCE", at_once)
    decode_into([(group, refresh, range(16))], {"w": [found]})
    assert torch.equal(found, expected)
    assert float((found - live).norm()) < 0.2 * float((base - live).norm())


def test_a_scalar_is_refreshed_as_one_row() -> None:
    group = Group("w", (), (Slot("param", torch.float32, None, ()),), 1, lazy=True)
    target = torch.tensor(1.0)
    decode_into([(group, refreshed(group, [torch.tensor(3.0)], torch.tensor(1.0), [0]), [0])], {"w": [target]})
    assert target.item() == pytest.approx(3.0, rel=0.02)


def test_the_number_of_threads_of_torch_is_left_alone() -> None:
    before = torch.get_num_threads()
    decode_into([], {})
    assert torch.get_num_threads() == before
