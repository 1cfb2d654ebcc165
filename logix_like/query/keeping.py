"""Indexes kept in files from one process to the next: found again, extended, or built anew.

An index lies in the user's cache folder of its store, in a folder that is named after everything it depends on but the
rows. What rows it holds is told by their fingerprint, so an index of other rows is never asked: rows that came behind
those it holds are added, and anything else makes it be built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from logix_like.query.index import DIRECTIONS, Reduction, RowIndex, Vectors, load_faiss
from logix_like.query.scan import Candidates

VERSION = 3
ABOUT, INDEX, REDUCTION = "about.json", "index.faiss", "reduction.npz"
LARGEST_GROWTH = 2.0
"""An index that would grow by more than this is built again: its directions were found on too few rows."""


@dataclass(frozen=True)
class IndexKey:
    """What an index depends on, beside the rows."""

    factory: str
    reduce: str
    mode: str
    fit: str
    """Preconditioner and damping."""
    fitted_to: str = ""
    """Identifies the rows that the preconditioner was fitted to, where the mode scales rows by their lengths; not in
    the name, so that an index of other rows is replaced by the next one."""

    @property
    def name(self) -> str:
        """A folder's name."""
        parts = [VERSION, DIRECTIONS, self.factory, self.reduce, self.mode, self.fit]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()


def index_for(vectors: Vectors, key: IndexKey, cache: Path | None) -> RowIndex:
    """The index of ``vectors``, from ``cache`` if it is there; kept there if it was built or extended."""
    folder = None if cache is None else cache / key.name
    found = None if folder is None else _read(folder, vectors, key)
    if found is None:
        found = RowIndex.build(vectors, key.factory)
    elif found.index.ntotal == vectors.candidates.count:
        return found
    else:
        found.add(_behind(vectors, found.index.ntotal).stream())
    if folder is not None:
        _write(folder, found, vectors, key)
    return found


def _behind(vectors: Vectors, count: int) -> Vectors:
    """The vectors without the first ``count``."""
    wanted = vectors.candidates.wanted.clone()
    wanted[vectors.candidates.positions()[:count]] = False
    return replace(vectors, candidates=vectors.candidates.restrict(wanted, "the index"))


def _read(folder: Path, vectors: Vectors, key: IndexKey) -> RowIndex | None:
    """The index in ``folder``, unless it is missing, damaged, or holds other rows than the first of ``vectors``."""
    try:
        about = json.loads((folder / ABOUT).read_text())
        files = {name: (folder / name).read_bytes() for name in (INDEX, REDUCTION)}
        if about["crc"] != {name: zlib.crc32(content) for name, content in files.items()}:
            return None
        rows = int(about["rows"])
        count = vectors.candidates.count
        if not 0 < rows <= count <= LARGEST_GROWTH * rows or (rows < count and key.fitted_to):
            return None
        if about["fitted_to"] != key.fitted_to or about["fingerprint"] != _first(vectors, rows).fingerprint:
            return None
        with np.load(folder / REDUCTION, allow_pickle=False) as arrays:
            reduction = Reduction(torch.from_numpy(arrays["of_rows"]), torch.from_numpy(arrays["of_queries"]))
        index = load_faiss().deserialize_index(np.frombuffer(files[INDEX], np.uint8))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None
    if index.ntotal != rows or index.d != reduction.directions:
        return None
    return RowIndex(index, reduction, vectors.mode, vectors.candidates.positions(), key.factory)


def _first(vectors: Vectors, count: int) -> Vectors:
    candidates: Candidates = vectors.candidates
    if count == candidates.count:
        return vectors
    wanted = torch.zeros_like(candidates.wanted)
    wanted[candidates.positions()[:count]] = True
    return replace(vectors, candidates=candidates.restrict(wanted, "the index"))


def _write(folder: Path, found: RowIndex, vectors: Vectors, key: IndexKey) -> None:
    """Write a folder beside and move it to its place; a reader sees all or nothing of it.

    An index that cannot be kept was built all the same: a full disk costs time alone.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".index-", dir=folder.parent))
    except OSError:
        return
    try:
        (unfinished / INDEX).write_bytes(load_faiss().serialize_index(found.index).tobytes())
        maps = {"of_rows": found.reduction.of_rows.numpy(), "of_queries": found.reduction.of_queries.numpy()}
        np.savez(unfinished / REDUCTION, allow_pickle=False, **maps)
        crc = {name: zlib.crc32((unfinished / name).read_bytes()) for name in (INDEX, REDUCTION)}
        about = {"rows": vectors.candidates.count, "fitted_to": key.fitted_to, "crc": crc}
        about |= {"fingerprint": vectors.fingerprint}
        (unfinished / ABOUT).write_text(json.dumps(about))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
