"""A writer's statistics on disk: for each field one float64 array, all modules one after another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logix_like.errors import StoreDamagedError
from logix_like.layout import Layout, ModuleBlock
from logix_like.statistics import Statistics
from logix_like.store.format.arrays import ArraySpec, chunk_file, read_chunk, unreadable, write_array, write_group
from logix_like.store.format.commits import StatisticsRecord, read_commits
from logix_like.store.format.documents import unsealed
from logix_like.store.format.schema import DOCUMENT, STATISTICS_FOLDER
from logix_like.store.places.files import Place, as_bytes, read_bytes

FIELDS = (*Statistics.ADDITIVE, *Statistics.CORRECTED)


@dataclass(frozen=True)
class Coverage:
    """Which rows of a store statistics cover that stand for several of its parts."""

    rows: Mapping[str, int]
    """By part: its first so many rows. The parts' own statistics are in these."""
    superseded: int
    """How many of the rows had been taken back before, and so are in no sum over rows."""


@dataclass(frozen=True)
class StoredStatistics:
    """Statistics as they lie in a part."""

    statistics: Statistics
    """The sums."""
    coverage: Coverage | None = None
    """None: they cover rows of their own part alone."""


def save_statistics(
    folder: Place, statistics: Statistics, coverage: Coverage | None = None, *, sync: bool = False
) -> None:
    """Write all sums below ``folder``.

    A file for each module and field would be thousands; so each field's array has an attribute
    ``modules``, a list of ``[name, shape]`` in the order in which their numbers follow.
    """
    fields = {field for sums in statistics.sums.values() for field in sums}
    for name in sorted(fields):
        tensors = {module: sums[name] for module, sums in statistics.sums.items() if name in sums}
        shapes = [[module, list(tensor.shape)] for module, tensor in tensors.items()]
        spec = ArraySpec("float64", "NaN", attributes={"modules": shapes})
        buffers = (as_bytes(tensor.double()) for tensor in tensors.values())
        numbers = sum(tensor.numel() for tensor in tensors.values())
        write_array(folder / name, spec, numbers, buffers, sync=sync)
    told: dict[str, Any] = {"rows": statistics.rows, "fields": sorted(fields)}
    if statistics.superseded:
        told |= {"superseded": statistics.superseded, "stale": statistics.stale}
    if coverage is not None:
        told["coverage"] = {"rows": dict(coverage.rows), "superseded": coverage.superseded}
    write_group(folder, told, sync=sync)


def load_latest_statistics(part: Place, record: StatisticsRecord, layout: Layout) -> StoredStatistics:
    """The statistics of a part by its latest record, or by a newer one: a live writer removes what it has replaced."""
    while True:
        try:
            return load_statistics(part / STATISTICS_FOLDER / str(record.generation), layout, record.watermark)
        except StoreDamagedError:
            latest = read_commits(part).statistics
            if latest is None or latest == record:
                raise
            record = latest


def load_statistics(folder: Place, layout: Layout, rows: int | None) -> StoredStatistics:
    """Read what :func:`save_statistics` wrote; ``rows`` is the watermark of the commit record.

    None stands for that which the statistics themselves name.
    """
    sums: dict[str, dict[str, Tensor]] = {name: {} for name in layout.names}
    attributes = _attributes(folder)
    if rows is None:
        rows = _count(attributes.get("rows"), folder)
    if attributes.get("rows") != rows:
        raise _damaged(folder, f"covers {attributes.get('rows')!r} rows, the commit record says {rows}")
    fields = attributes.get("fields")
    if not isinstance(fields, list):
        raise _damaged(folder, f"names its sums by {fields!r}, expected a list")
    for name in fields:
        if name not in FIELDS:
            raise _damaged(folder, f"names a sum {name!r} that does not exist")
        for module, tensor in _load_field(folder / name, layout).items():
            sums[module][name] = tensor
    superseded = _count(attributes.get("superseded", 0), folder)
    stale = _count(attributes.get("stale", superseded), folder)
    return StoredStatistics(Statistics(layout, sums, rows, superseded, stale), _coverage(attributes, folder))


def _coverage(attributes: Mapping[str, Any], folder: Place) -> Coverage | None:
    told = attributes.get("coverage")
    if told is None:
        return None
    if not isinstance(told, dict) or not isinstance(told.get("rows"), dict):
        raise _damaged(folder, f"covers the rows {told!r}, expected a number for each part")
    rows = {part: _count(count, folder) for part, count in told["rows"].items()}
    return Coverage(rows, _count(told.get("superseded"), folder))


def _load_field(folder: Place, layout: Layout) -> dict[str, Tensor]:
    shapes = _shapes(folder)
    for name, shape in shapes:
        _require_shape(folder, layout, name, shape)
    size = 8 * sum(math.prod(shape) for _, shape in shapes)
    content = read_chunk(chunk_file(folder, 0, 1), f"the sums {folder.name!r}", size=size)
    numbers = torch.from_numpy(content).view(torch.float64)
    parts = numbers.split([math.prod(shape) for _, shape in shapes])
    return {name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)}


def _require_shape(folder: Place, layout: Layout, module: str, shape: tuple[int, ...]) -> None:
    """Refuse a sum that is not of the size that the module's block has."""
    try:
        block: ModuleBlock = layout[module]
    except KeyError:
        raise _damaged(folder, f"names the module {module!r} that the store does not have") from None
    size, (outward, inward) = block.size, block.rank
    expected = {
        "sum": (size,),
        "square_sum": (size,),
        "outer_sum": (size, size),
        "sketch_sum": (size, shape[-1] if shape else 0),  # of as many directions as there were
        "output_outer_sum": (outward, outward),
        "input_outer_sum": (inward, inward),
        "corrected_square_sum": block.matrix,
        "input_basis": (inward, inward),
        "output_basis": (outward, outward),
    }.get(folder.name, ())
    if shape != expected:
        raise _damaged(folder, f"gives module {module!r} the shape {shape}, expected {expected}")


def _shapes(folder: Place) -> list[tuple[str, tuple[int, ...]]]:
    try:
        table = _attributes(folder)["modules"]
        shapes = [(str(name), tuple(int(n) for n in shape)) for name, shape in table]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _damaged(folder, f"has no readable table of modules ({error!r})") from error
    if any(n < 0 for _, shape in shapes for n in shape):
        raise _damaged(folder, "gives a negative shape")
    return shapes


def _count(rows: object, folder: Place) -> int:
    if type(rows) is not int or rows < 0:
        raise _damaged(folder, f"covers {rows!r} rows, expected a number")
    return rows


def _attributes(folder: Place) -> dict[str, Any]:
    file = folder / DOCUMENT
    try:
        return unsealed(read_bytes(file))
    except OSError as error:
        raise unreadable(file, "statistics", error) from error
    except ValueError as error:
        raise _damaged(folder, f"has no readable {DOCUMENT} ({error})") from error


def _damaged(folder: Place, finding: str) -> StoreDamagedError:
    return StoreDamagedError(
        f"{folder} {finding}; the statistics are not those that were committed: restore the folder from a copy"
    )
