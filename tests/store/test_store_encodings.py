"""Encodings of few bits against a slow float64 reference, and what they do with odd rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from logix_like.errors import StoreDamagedError
from logix_like.layout import Layout, ModuleBlock
from logix_like.store import ENCODINGS, open_store, verify
from logix_like.store.encoding.kinds import Encoding, StoredRows
from logix_like.store.encoding.packing import pack, packed_width, unpack
from tests.store.store_runs import CHUNK_ROWS, WIDTH, log, new_store, small_layout, zarr_values

FEW_BITS = [name for name, encoding in ENCODINGS.items() if encoding.coordinate_scaled]
LEVELS = {"int8": 127, "int4": 7}
FLOAT32 = 1e-5
"""Relative: some float32 operations after one another."""


def alike_layout() -> Layout:
    """Three modules of one size, which are scaled in one operation."""
    return Layout([ModuleBlock(f"m{n}", "linear", (3, 5), (3, 5), 15 * n, f"m{n}") for n in range(3)])


def mixed_layout() -> Layout:
    """Runs of two, one and two modules of one size."""
    ranks, offset, blocks = [(2, 3), (3, 2), (2, 2), (1, 6), (6, 1)], 0, []
    for number, rank in enumerate(ranks):
        blocks.append(ModuleBlock(f"m{number}", "linear", (9, 9), rank, offset, f"m{number}"))
        offset += blocks[-1].size
    return Layout(blocks)


LAYOUTS = {"of different sizes": small_layout(), "of one size": alike_layout(), "mixed": mixed_layout()}


def encode(rows: Tensor, encoding: str, layout: Layout) -> StoredRows:
    one = ENCODINGS[encoding]
    return one.encode(rows, layout, one.buffer(*rows.shape))


def both_scales(stored: StoredRows) -> tuple[Tensor, Tensor]:
    assert stored.scale is not None and stored.coordinate_scale is not None
    return stored.scale, stored.coordinate_scale


def slow_decode(rows: Tensor, encoding: str, layout: Layout) -> Tensor:
    """What finite, nonzero rows come back as: one number after another, in float64."""
    found = torch.empty(rows.shape, dtype=torch.float64)
    for block in layout:
        x = rows[:, block.columns].double()
        largest = x.abs().amax(1)
        moments = [((x[:, c] / largest) ** 2).mean() for c in range(block.size)]
        damping = 0.0 if encoding == "sign" else 0.1 * sum(moments) / block.size
        roots = [(moment + damping).sqrt() for moment in moments]
        for row in range(len(rows)):
            whitened = [x[row, c] / roots[c] for c in range(block.size)]
            if encoding == "sign":
                mean = sum(abs(w) for w in whitened) / block.size
                numbers = [mean if w >= 0 else -mean for w in whitened]
            else:
                unit = max(abs(w) for w in whitened) / LEVELS[encoding]
                numbers = [torch.round(w / unit) * unit for w in whitened]
            for c in range(block.size):
                found[row, block.offset + c] = numbers[c] * roots[c]
    return found


@pytest.mark.parametrize("encoding", FEW_BITS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("count", [1, 6])
def test_rows_come_back_as_the_reference_says(encoding: str, layout: Layout, count: int) -> None:
    rows = torch.randn(count, layout.width) * torch.randn(layout.width).exp()
    stored = encode(rows, encoding, layout)
    found, expected = ENCODINGS[encoding].decode(stored, layout).double(), slow_decode(rows, encoding, layout)
    torch.testing.assert_close(found, expected, rtol=FLOAT32, atol=FLOAT32 * float(expected.abs().max()))


@pytest.mark.parametrize("encoding", ["int8", "int4"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_no_number_is_off_by_more_than_half_a_unit(encoding: str, layout: Layout) -> None:
    rows = torch.randn(500, layout.width) * torch.randn(layout.width).mul(3).exp() * torch.randn(500, 1).mul(9).exp()
    stored = encode(rows, encoding, layout)
    scale, coordinate = both_scales(stored)
    sizes = torch.tensor([block.size for block in layout])
    unit = scale.repeat_interleave(sizes, dim=1) * coordinate
    error = (ENCODINGS[encoding].decode(stored, layout) - rows).abs()
    assert (error <= (0.5 + 127 * FLOAT32) * unit).all()
    assert ENCODINGS[encoding].codes(stored, layout).abs().amax() == LEVELS[encoding]


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_whole_multiples_come_back_exactly(encoding: str) -> None:
    """Each coordinate holds each of the numbers once, so all have one scale."""
    layout = Layout([ModuleBlock("m", "linear", (3, 5), (3, 5), 0, "m")])
    numbers = torch.arange(-7.0, 8.0) * LEVELS[encoding] // 7
    rows = torch.stack([numbers.roll(n) for n in range(15)])
    found = ENCODINGS[encoding].decode(encode(rows, encoding, layout), layout)
    torch.testing.assert_close(found, rows, rtol=FLOAT32, atol=FLOAT32)


def test_signs_keep_all_of_rows_that_differ_by_signs_and_size() -> None:
    layout = small_layout()
    profile, size = torch.rand(layout.width) + 0.1, torch.rand(40, 1) + 0.1
    rows = profile * size * torch.randn(40, layout.width).sign()
    found = ENCODINGS["sign"].decode(encode(rows, "sign", layout), layout)
    torch.testing.assert_close(found, rows, rtol=FLOAT32, atol=0)


def test_the_scale_of_signs_is_the_nearest() -> None:
    layout = small_layout()
    rows = torch.randn(30, layout.width) * torch.randn(layout.width).exp()
    stored = encode(rows, "sign", layout)
    scale, coordinate = both_scales(stored)
    codes = ENCODINGS["sign"].codes(stored, layout)
    for factor in (0.97, 1.03):
        for number, block in enumerate(layout):
            whitened, signs = rows[:, block.columns] / coordinate[block.columns], codes[:, block.columns]
            mine = (whitened - signs * scale[:, number : number + 1]).square().sum(1)
            other = (whitened - signs * factor * scale[:, number : number + 1]).square().sum(1)
            assert (mine <= other * (1 + FLOAT32)).all()


@pytest.mark.parametrize("encoding", FEW_BITS)
def test_a_coordinate_that_is_always_zero_stays_zero(encoding: str) -> None:
    rows = torch.randn(20, WIDTH)
    rows[:, [1, 13]] = 0
    found = ENCODINGS[encoding].decode(encode(rows, encoding, small_layout()), small_layout())
    assert found[:, [1, 13]].count_nonzero() == 0


@pytest.mark.parametrize("encoding", FEW_BITS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_odd_rows_leave_the_others_as_they_are(encoding: str, layout: Layout) -> None:
    rows = torch.randn(600, layout.width)
    usual = ENCODINGS[encoding].decode(encode(rows, encoding, layout), layout)
    rows[1] = 0
    rows[2] *= 1e-30
    rows[3] *= 1e30
    rows[4, 2] = 1e30
    rows[5, 2], rows[6, 2], rows[7, 2] = torch.nan, torch.inf, -torch.inf
    rows[8] = 1e-42
    found = ENCODINGS[encoding].decode(encode(rows, encoding, layout), layout)
    assert found[[1, 8]].count_nonzero() == 0
    for row, size in ((2, 1e-30), (3, 1e30)):
        assert torch.nn.functional.cosine_similarity(found[row].double() / size, usual[row].double(), dim=0) > 0.99
    size = layout[0].size
    assert found[5:8, :size].isnan().all() and found[5:8, size:].isfinite().all()
    assert found[:5].isfinite().all() and found[8:].isfinite().all()
    if encoding != "sign":
        assert found[4, 2] == pytest.approx(1e30, rel=1e-4)
    # The odd rows are 7 of 600, each with the weight of one.
    difference = (found[9:] - usual[9:]).norm(dim=1) / usual[9:].norm(dim=1)
    assert difference.amax() < {"int8": 0.02, "int4": 0.3, "sign": 0.05}[encoding]


@pytest.mark.parametrize("encoding", FEW_BITS)
def test_the_same_rows_give_the_same_bytes(encoding: str) -> None:
    rows = torch.randn(200, WIDTH)
    first = encode(rows.clone(), encoding, small_layout())
    encode(torch.randn(50, WIDTH) * 100, encoding, small_layout())
    second = encode(rows, encoding, small_layout())
    assert first.values.equal(second.values)
    assert all(a.equal(b) for a, b in zip(both_scales(first), both_scales(second), strict=True))


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("width", [*range(1, 19), 64])
def test_numbers_are_packed_in_planes(bits: int, width: int) -> None:
    numbers = torch.randint(2**bits, (3, width), dtype=torch.uint8)
    packed = torch.full((3, packed_width(width, bits)), 0xFF, dtype=torch.uint8)
    pack(numbers, bits, packed)
    step = packed.shape[1]
    expected = np.zeros((3, step), dtype=np.uint8)
    for row in range(3):
        for column in range(width):
            expected[row, column % step] |= int(numbers[row, column]) << (column // step * bits)
    assert packed.numpy().tolist() == expected.tolist()
    assert unpack(packed, bits, width).equal(numbers)


def decode_from_zarr(part: Path, encoding: Encoding, layout: Layout, chunk_rows: int) -> Tensor:
    """Rows as another Zarr reader would decode them, after the arrays' attributes."""
    values, scale, coordinate = (zarr_values(part / name) for name in ("gradients", "scale", "coordinate_scale"))
    step, codes = values.shape[1], np.empty((len(values), layout.width))
    for column in range(layout.width):
        if encoding.packed:
            bits = 8 // -(-layout.width // step)
            number = (values[:, column % step].astype(int) >> (column // step * bits)) & (2**bits - 1)
            codes[:, column] = number - 8 if bits == 4 else 2 * number - 1
        else:
            codes[:, column] = values[:, column]
    by_column = np.repeat(scale, [block.size for block in layout], axis=1)
    return torch.from_numpy(codes * by_column * np.repeat(coordinate, chunk_rows, axis=0)[: len(values)]).float()


@pytest.mark.parametrize("encoding", FEW_BITS)
def test_another_reader_decodes_from_the_arrays_alone(tmp_path: Path, encoding: str) -> None:
    store = new_store(tmp_path / "s", encoding)
    log(store, torch.randn(3 * CHUNK_ROWS, WIDTH) * torch.randn(WIDTH).exp(), encoding)
    rows = decode_from_zarr(store / "writers/0-1", ENCODINGS[encoding], small_layout(), CHUNK_ROWS)
    torch.testing.assert_close(open_store(store).gradients[:], rows, rtol=FLOAT32, atol=0)


@pytest.mark.parametrize("encoding", FEW_BITS)
def test_chunks_give_codes_and_scales(tmp_path: Path, encoding: str) -> None:
    store, layout = new_store(tmp_path / "s", encoding), small_layout()
    log(store, torch.randn(40, WIDTH), encoding)
    opened = open_store(store)
    for whole in opened.chunks():
        for chunk in (whole, whole.select(np.array([0, 3, 3, 7]), 100), whole.select(np.arange(2, 6), 100)):
            assert chunk.scale is not None and chunk.coordinate_scale is not None
            codes = chunk.codes()
            assert codes.shape == (len(chunk), WIDTH) and codes.dtype == torch.int8 and codes.is_contiguous()
            by_column = chunk.scale.repeat_interleave(torch.tensor([block.size for block in layout]), dim=1)
            assert chunk.decode().equal(codes * by_column * chunk.coordinate_scale)


@pytest.mark.parametrize("encoding", FEW_BITS)
@pytest.mark.parametrize("array", ["gradients", "scale", "coordinate_scale"])
def test_a_flipped_bit_is_found(tmp_path: Path, encoding: str, array: str) -> None:
    store = new_store(tmp_path / "s", encoding)
    log(store, torch.randn(2 * CHUNK_ROWS, WIDTH), encoding)
    file = store / "writers/0-1" / array / "c.1.0"
    content = file.read_bytes()
    for bit in range(0, 8 * len(content), 37):
        spoilt = bytearray(content)
        spoilt[bit // 8] ^= 1 << bit % 8
        file.write_bytes(spoilt)
        with pytest.raises(StoreDamagedError, match=r"c\.1\.0, which holds rows 16 to 31, does not match its checksum"):
            open_store(store).gradients[20]
        assert open_store(store).gradients[3].isfinite().all()
    (damage,) = verify(store).damages
    assert damage.file == file and damage.rows == (16, 32)
    assert len(open_store(store, on_damage="skip")) == CHUNK_ROWS


@pytest.mark.parametrize("encoding", FEW_BITS)
def test_a_row_takes_little_more_than_its_bits(tmp_path: Path, encoding: str) -> None:
    bits = {"int8": 8, "int4": 4, "sign": 1}[encoding]
    layout = Layout([ModuleBlock(f"m{n}", "linear", (32, 32), (32, 32), 1024 * n, f"m{n}") for n in range(4)])
    assert ENCODINGS[encoding].row_bytes(layout) == 4096 * bits // 8 + 4 * 4


@pytest.mark.parametrize("encoding", FEW_BITS)
def test_a_missing_chunk_is_no_number_to_a_zarr_reader(tmp_path: Path, encoding: str) -> None:
    store = new_store(tmp_path / "s", encoding)
    log(store, torch.randn(CHUNK_ROWS, WIDTH), encoding)
    for array in ("gradients", "scale", "coordinate_scale"):
        (store / "writers/0-1" / array / "c.0.0").unlink()
    assert decode_from_zarr(store / "writers/0-1", ENCODINGS[encoding], small_layout(), CHUNK_ROWS).isnan().all()
