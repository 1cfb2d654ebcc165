"""Results and queries as files: JSON to read, npz for large ones. Nothing is pickled.

Scores keep their bits and ids their type. A file is written beside its place and then moved there, so
that a reader never sees half of one.

Both formats hold a header of plain values and some arrays by name (``scores``, ``top.ids``, ...). JSON has
each array as nested lists with its dtype. An npz has them as they are, but for ids, which are three arrays:
``<name>.text`` (UTF-8 bytes of all ids on end), ``<name>.ends`` and ``<name>.integer`` (which ids are ints).
"""

from __future__ import annotations

import json
import os
import secrets
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logix_like.errors import QueryError, StoreDamagedError
from logix_like.layout import Layout
from logix_like.query.gradients import QueryGradients
from logix_like.query.result import Ids, InfluenceResult, Ranking, SelfInfluence

FORMAT = {"format": "logix_like.influence", "version": 1}
QUERY_FORMAT = {"format": "logix_like.queries", "version": 1}
SELF_FORMAT = {"format": "logix_like.self_influence", "version": 1}
SELF_PLAIN = ("preconditioner", "damping", "reduce", "note", "rows")
PLAIN = ("samples", "mode", "preconditioner", "damping", "reduce", "engine", "note")
DTYPES = ("float32", "float64", "int64", "object")
"""Kinds of arrays in a file; objects are data ids."""

Result = TypeVar("Result")
Arrays = dict[str, NDArray[Any]]
Parts = tuple[dict[str, Any], Arrays]
"""The header and the arrays of a result."""


def write_result(result: InfluenceResult, path: Path) -> Path:
    """Write ``result`` in the format that the suffix of ``path`` names; replaces a file that is there."""
    write, _ = _format_of(path)
    return replace_file(path, lambda file: write(_take_apart(result), file))


def read_result(path: Path) -> InfluenceResult:
    """Read a result; :class:`QueryError` when the file is missing, damaged or something else."""
    return _read(path, FORMAT, _put_together)


def write_self_influence(result: SelfInfluence, path: Path) -> Path:
    """Write ``result`` as :func:`write_result` does."""
    write, _ = _format_of(path)
    header = SELF_FORMAT | {name: getattr(result, name) for name in SELF_PLAIN}
    arrays: Arrays = {"data_id": result.data_id, "scores": result.scores.numpy()}
    arrays |= {} if result.step is None else {"step": result.step}
    return replace_file(path, lambda file: write((header, arrays), file))


def read_self_influence(path: Path) -> SelfInfluence:
    """Read self-influences; :class:`QueryError` when the file is missing, damaged or something else."""
    return _read(path, SELF_FORMAT, _self_influence)


def _self_influence(header: dict[str, Any], arrays: Arrays) -> SelfInfluence:
    ids, scores, step = arrays["data_id"], arrays["scores"], arrays.get("step")
    if scores.ndim != 1 or any(other.shape != scores.shape for other in (ids, step) if other is not None):
        raise ValueError(f"ids of shape {ids.shape} do not fit scores of shape {scores.shape}")
    plain = {"rows": None} | {name: header[name] for name in SELF_PLAIN if name != "rows" or name in header}
    return SelfInfluence(ids, torch.from_numpy(np.ascontiguousarray(scores)), step=step, **plain)


def _read(path: Path, form: Mapping[str, Any], make: Callable[[dict[str, Any], Arrays], Result]) -> Result:
    _, read = _format_of(path)
    try:
        with path.open("rb") as file:
            header, arrays = read(file)
        if any(header.pop(key, None) != value for key, value in form.items()):
            raise ValueError(f"its header does not say {form}")
        return make(header, arrays)
    except FileNotFoundError as error:
        raise QueryError(f"there is no result at {path}; save one with result.save(...)") from error
    except _UNREADABLE as error:
        raise QueryError(
            f"{path} cannot be read as a saved result ({error}); it must be a whole file that "
            "result.save(...) wrote: ask again and save anew"
        ) from error


def write_queries(queries: QueryGradients, path: Path) -> Path:
    """Write ``queries`` to an npz file; replaces a file that is there."""
    _require_npz(path)
    gradients = queries.gradients.detach().cpu()
    about = {"note": queries.note, "projections": queries.projections}
    header = QUERY_FORMAT | about | {"layout": queries.layout.to_json()}
    arrays: Arrays = {
        "data_id": _object_array(list(queries.data_id)),
        "gradients": (gradients if gradients.dtype == torch.float64 else gradients.float()).numpy(),
    }
    return replace_file(path, lambda file: _write_npz((header, arrays), file))


def read_queries(path: Path, layout: Layout | None = None) -> QueryGradients:
    """Read queries; ``layout`` is that of a file which has no header of its own.

    Raises :class:`QueryError` when the file is missing, damaged, something else, or of another width.
    """
    _require_npz(path)
    try:
        with path.open("rb") as file:
            header, arrays = _read_npz(file)
        if header and any(header.get(key) != value for key, value in QUERY_FORMAT.items()):
            raise ValueError(f"its header does not say {QUERY_FORMAT}")
        ids, gradients = _plain_ids(arrays["data_id"]), _floating(arrays["gradients"])
        layout = Layout.from_json(header["layout"]) if header else layout
    except FileNotFoundError as error:
        raise QueryError(f"there are no queries at {path}; save some with query.gradients.save(...)") from error
    except (*_UNREADABLE, StoreDamagedError) as error:
        raise QueryError(
            f"{path} cannot be read as queries ({error}); it must be a file that query.gradients.save(...) wrote, or "
            "an npz with 'data_id' [queries] (text or whole numbers) and 'gradients' [queries, numbers of a row]"
        ) from error
    if layout is None:
        raise QueryError(f"{path} does not say which modules its columns belong to; give layout=store.modules")
    return QueryGradients(ids, gradients, layout, str(header.get("note", "")), str(header.get("projections", "")))


def _plain_ids(ids: NDArray[Any]) -> tuple[str | int, ...]:
    if ids.ndim != 1 or ids.dtype.kind not in "OUiu":
        raise ValueError(f"data_id is {ids.dtype} of shape {ids.shape}")
    return tuple(ids.tolist())


def _floating(gradients: NDArray[Any]) -> Tensor:
    """Numbers of any width as float32, or as float64 where they are wider."""
    if gradients.dtype.kind not in "fiu":
        raise ValueError(f"gradients are {gradients.dtype}")
    return torch.from_numpy(gradients.astype(np.promote_types(gradients.dtype, np.float32)))


def _require_npz(path: Path) -> None:
    if path.suffix != ".npz":
        raise QueryError(f"queries are kept as .npz; {path.name!r} does not end so")


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Write a file by ``write`` beside ``path``, then move it there in one step."""
    if not path.parent.is_dir():
        raise QueryError(f"{path} cannot be written: there is no folder {path.parent.absolute()}; create it first")
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with unfinished.open("xb") as file:
            write(file)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


_UNREADABLE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    OSError,
    EOFError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What reading a file that is not a result can raise."""


def _take_apart(result: InfluenceResult) -> Parts:
    arrays: Arrays = {"query_id": _object_array(list(result.query_id))}
    if result.scores is not None and result.data_id is not None:
        arrays |= _ranking_arrays("", Ranking(result.data_id, result.scores, result.step, result.parts))
    for side, ranking in (("top.", result.top), ("bottom.", result.bottom)):
        if ranking is not None:
            arrays |= _ranking_arrays(side, ranking)
    header = FORMAT | {name: getattr(result, name) for name in (*PLAIN, "source")}
    return header | ({"part_names": list(result.part_names)} if result.part_names else {}), arrays


def _ranking_arrays(prefix: str, ranking: Ranking) -> Arrays:
    arrays: Arrays = {f"{prefix}ids": ranking.ids, f"{prefix}scores": ranking.scores.numpy()}
    if ranking.parts is not None:
        arrays[f"{prefix}parts"] = ranking.parts.numpy()
    return arrays if ranking.step is None else arrays | {f"{prefix}step": ranking.step}


def _put_together(header: dict[str, Any], arrays: Arrays) -> InfluenceResult:
    queries, every = arrays["query_id"], _ranking_from("", arrays)
    top, bottom = _ranking_from("top.", arrays), _ranking_from("bottom.", arrays)
    for ranking in (every, top, bottom):
        if ranking is not None and len(ranking.scores) != len(queries):
            raise ValueError(f"{len(ranking.scores)} lines of scores for {len(queries)} queries")
    return InfluenceResult(
        query_id=tuple(queries.tolist()),
        data_id=None if every is None else every.ids,
        scores=None if every is None else every.scores,
        step=None if every is None else every.step,
        parts=None if every is None else every.parts,
        part_names=tuple(header.get("part_names", ())),
        top=top,
        bottom=bottom,
        source=str(header.get("source", "")),
        **{name: header[name] for name in PLAIN},
    )


def _ranking_from(prefix: str, arrays: Arrays) -> Ranking | None:
    if f"{prefix}scores" not in arrays:
        return None
    ids, scores, step = arrays[f"{prefix}ids"], arrays[f"{prefix}scores"], arrays.get(f"{prefix}step")
    if scores.ndim != 2 or ids.shape not in (scores.shape, scores.shape[1:]):
        raise ValueError(f"ids of shape {ids.shape} do not fit scores of shape {scores.shape}")
    parts = arrays.get(f"{prefix}parts")
    if parts is not None and parts.shape[:2] != scores.shape:
        raise ValueError(f"parts of shape {parts.shape} do not fit scores of shape {scores.shape}")
    split = None if parts is None else torch.from_numpy(np.ascontiguousarray(parts))
    return Ranking(ids, torch.from_numpy(np.ascontiguousarray(scores)), step, split)


def _write_json(parts: Parts, file: BinaryIO) -> None:
    header, arrays = parts
    listed = {name: {"dtype": str(a.dtype), "values": _plain(a).tolist()} for name, a in arrays.items()}
    file.write(json.dumps(header | {"arrays": listed}, indent=1).encode())


def _read_json(file: BinaryIO) -> Parts:
    header = json.load(file)
    listed = header.pop("arrays")
    return header, {name: _array(entry["values"], entry["dtype"]) for name, entry in listed.items()}


def _array(values: Any, dtype: str) -> NDArray[Any]:
    if dtype not in DTYPES:
        raise ValueError(f"an array of {dtype!r}; known: {', '.join(DTYPES)}")
    array = np.array(values, dtype=dtype)
    return _plain(array)


def _write_npz(parts: Parts, file: BinaryIO) -> None:
    header, arrays = parts
    packed: Arrays = {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)}
    for name, array in arrays.items():
        packed |= _pack_ids(name, array) if array.dtype == object else {name: array}
    np.savez_compressed(file, allow_pickle=False, **packed)


def _read_npz(file: BinaryIO) -> Parts:
    if not zipfile.is_zipfile(file):
        raise ValueError("it is no npz file, or only a part of one")
    file.seek(0)
    with np.load(file, allow_pickle=False) as packed:
        arrays = dict(packed)
    header = json.loads(arrays.pop("header").tobytes()) if "header" in arrays else {}
    for name in [key.removesuffix(".text") for key in arrays if key.endswith(".text")]:
        arrays[name] = _unpack_ids(*(arrays.pop(f"{name}.{part}") for part in ("text", "ends", "integer")))
    return header, arrays


def _pack_ids(name: str, ids: Ids) -> Arrays:
    flat = _plain(ids).ravel().tolist()
    encoded = [str(one).encode("utf-8", "surrogatepass") for one in flat]
    integer = np.array([isinstance(one, int) for one in flat], dtype=bool).reshape(ids.shape)
    return {
        f"{name}.text": np.frombuffer(b"".join(encoded), np.uint8),
        f"{name}.ends": np.cumsum([len(one) for one in encoded], dtype=np.int64),
        f"{name}.integer": integer,
    }


def _unpack_ids(text: NDArray[Any], ends: NDArray[Any], integer: NDArray[Any]) -> Ids:
    joined, ids, start = text.tobytes(), [], 0
    for end, is_integer in zip(ends.tolist(), integer.ravel().tolist(), strict=True):
        one = joined[start:end].decode("utf-8", "surrogatepass")
        ids.append(int(one) if is_integer else one)
        start = end
    return _object_array(ids).reshape(integer.shape)


def _object_array(values: list[Any]) -> Ids:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    """``array`` with ids as Python's own str and int, which is all that an object array may hold."""
    if array.dtype != object:
        return array
    flat = [one if isinstance(one, str) else int(one) for one in array.ravel()]
    return _object_array(flat).reshape(array.shape)


Writer = Callable[[Parts, BinaryIO], None]
Reader = Callable[[BinaryIO], Parts]
FORMATS: Mapping[str, tuple[Writer, Reader]] = MappingProxyType(
    {".json": (_write_json, _read_json), ".npz": (_write_npz, _read_npz)}
)
"""How a result is written and read, by file suffix."""


def _format_of(path: Path) -> tuple[Writer, Reader]:
    if path.suffix not in FORMATS:
        raise QueryError(f"a result is saved as {' or '.join(FORMATS)}; {path.name!r} ends in neither")
    return FORMATS[path.suffix]
