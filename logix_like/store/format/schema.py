"""Format 1 of the store: its names, paths, flags and its manifest.

This is the only place that spells a path or the format's version::

    <store>/                                 Zarr v3 group; its attributes are the StoreManifest
      projections/<module>/{input,output}    float32 [rank, d]; a side that is the identity has no array
      writers/<rank>.lock                    empty; locked by the process that writes as this rank
      writers/<rank>-<attempt>/              one part for each writing process and restart
        gradients, scale, columns, data_id, metadata/<name>     arrays of whole chunks of rows
        coordinate_scale                     one row for each chunk of the others
        tails/<n>/...                        the same arrays, one short chunk each
        statistics/<generation>/<field>      float64 sums of all modules, one after another
        commits                              the record: rows that it does not name do not exist (in object
                                             stores commits/<number>, one line each)
      writers/merged-<attempt>/              the same, in the place of the parts that its record names
      views/mean/<key>/                      a part with one mean row for each sample
      checkpoints/<n>.safetensors, <n>.json
      curvature/<name>.safetensors          curvatures at full size, and half-finished sums of their fits (folders only)
      retractions/<digest>.json              rows taken back after their commit
      path/<attempt>[-<rank>].jsonl          a recorded training: one checksummed line for each optimizer step
      quarantine/<n>/                        what repair and compact took out, by its old path
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

from logix_like.errors import StoreDamagedError, StoreError, StoreNotFoundError, StoreVersionError
from logix_like.layout import Layout
from logix_like.store.format.documents import SEAL, sealed
from logix_like.store.places.files import Place, names_in, read_bytes, write_file

FORMAT = "logix_like"
VERSION = 1

DOCUMENT = "zarr.json"
PROJECTIONS = "projections"
WRITERS = "writers"
TAILS = "tails"
STATISTICS_FOLDER = "statistics"
COMMITS = "commits"
VIEWS = "views"
MEAN_VIEWS = "views/mean"
CHECKPOINTS = "checkpoints"
CURVATURE = "curvature"
RETRACTIONS = "retractions"
JOURNAL = "path"
QUARANTINE = "quarantine"

GRADIENTS = "gradients"
SCALE = "scale"
COORDINATE_SCALE = "coordinate_scale"
COLUMNS = "columns"
DATA_ID = "data_id"
METADATA = "metadata"

WRITER_COLUMNS = ("step", "epoch", "loss", "norm", "lr", "flags")
"""Columns of the float64 array ``columns`` of a writer's part (whole numbers below 2^53 are exact)."""
VIEW_COLUMNS = (*WRITER_COLUMNS, "visits")
"""The same for a view's part."""

ROOT_MODULE = "@root"
"""Path segment of the module whose name is empty; no quoted name can be equal to it."""


class Flag(enum.IntFlag):
    """Bits of the ``flags`` column."""

    NONFINITE = 1
    """The row holds a number that is not finite in the stored precision."""
    SUPERSEDED = 2
    """The row was taken back: it stays on disk and is not read. Not stored: told by the store's retractions."""
    INTEGER_ID = 4
    """The sample's id is an int, written in decimal."""
    OVERFLOW = 8
    """A gradient scaler skipped the step: the sample did not train the model then."""


INVALID = Flag.NONFINITE | Flag.SUPERSEDED | Flag.OVERFLOW
"""Rows with one of these take part in no statistic, view or ranking."""


def segment(name: str) -> str:
    """The path segment of a module or of a metadata column; never leads out of its folder.

    Raises :class:`StoreDamagedError` for ``.`` and ``..``, which no module can be called.
    """
    if name in (".", ".."):
        raise StoreDamagedError(
            f"{name!r} stands where a module's name is expected; no module can be called so: "
            "the store's manifest was altered, restore it from a copy"
        )
    return quote(name, safe="") if name else ROOT_MODULE


@dataclass(frozen=True)
class StoreManifest:
    """What a store says of itself; the attributes of its root group."""

    created: str
    """When the store was created, ISO 8601, UTC."""
    library: str
    """Version of the library that created it."""
    config: Mapping[str, Any]
    """The run's configuration, plain data."""
    layout: Layout | None = None
    """The module table; None until the first batch was logged."""
    encoding: str | None = None
    """Name of the rows' encoding; None until the first batch was logged."""
    projection: Mapping[str, Any] = field(default_factory=dict)
    """How the projections were made, plain data."""
    projection_shapes: Mapping[str, Mapping[str, tuple[int, int] | None]] = field(default_factory=dict)
    """By side (``input``, ``output``) and module: shape of the stored matrix, None for the identity."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of the model, by name."""
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    """``name`` (its class) and ``groups`` (each group's settings at the first batch); empty if none was told."""

    def described(self, **changes: Any) -> StoreManifest:
        """A copy with some fields set."""
        return replace(self, **changes)

    def to_attributes(self) -> dict[str, Any]:
        """The group's attributes, with a digest by which a flipped bit is found."""
        attributes: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "created": self.created,
            "library": self.library,
            "config": dict(self.config),
        }
        if self.layout is not None:
            attributes |= {
                "layout": self.layout.to_json(),
                "encoding": self.encoding,
                "projection": dict(self.projection),
                "projection_shapes": {side: dict(s) for side, s in self.projection_shapes.items()},
                "fingerprints": dict(self.fingerprints),
            }
            if self.optimizer:  # a later addition to the format
                attributes["optimizer"] = dict(self.optimizer)
        attributes = json.loads(json.dumps(attributes))  # as a reader will see it: keys are text
        return attributes | {"digest": _digest(attributes)}


def _digest(attributes: Mapping[str, Any]) -> str:
    content = {key: value for key, value in attributes.items() if key not in ("digest", SEAL)}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def group_document(attributes: Mapping[str, Any] | None = None) -> bytes:
    """The ``zarr.json`` of a group."""
    return sealed({"zarr_format": 3, "node_type": "group", "attributes": dict(attributes or {})})


def write_manifest(store: Place, manifest: StoreManifest) -> None:
    """Write the manifest in one atomic step, and to the disk itself."""
    write_file(store / DOCUMENT, [group_document(manifest.to_attributes())], sync=True)


LISTED = 100
"""So many of a folder's names are looked at for stores, where it is none."""


def is_store(path: Place) -> bool:
    """Whether ``path`` is a folder that this library made, of whatever version."""
    try:
        return bool(_attributes(path)["format"] == FORMAT)
    except (StoreDamagedError, StoreNotFoundError, KeyError):
        return False


def read_manifest(store: Place) -> StoreManifest:
    """Read and check a store's manifest.

    Raises :class:`StoreNotFoundError`, :class:`StoreVersionError` or :class:`StoreDamagedError`.
    """
    where = store / DOCUMENT
    try:
        attributes = _attributes(store)
    except StoreNotFoundError as error:
        raise StoreNotFoundError(f"{error}{_stores_in(store)}") from error
    if attributes.get("format") != FORMAT:
        raise StoreNotFoundError(
            f"{store} is a Zarr group but no {FORMAT} store; give the folder <root>/<project> of a run"
        )
    version = attributes.get("version")
    if version != VERSION:
        if isinstance(version, int) and version > VERSION:
            raise StoreVersionError(
                f"{store} was written by format {version}, this library reads format {VERSION}; "
                "upgrade logix_like to read it"
            )
        raise StoreDamagedError(f"{where} names format version {version!r}, expected {VERSION}")
    if attributes.get("digest") != _digest(attributes):
        raise StoreDamagedError(f"{where} does not match its digest: it was damaged or edited; restore it from a copy")
    return _manifest(attributes, where)


def _stores_in(folder: Place) -> str:
    """The stores directly in a folder that is none, to be told to whoever gave it."""
    with suppress(OSError, StoreError):
        found = [name for name in names_in(folder)[:LISTED] if is_store(folder / name)]
        return f"; in it are the stores {', '.join(found)}" if found else ""
    return ""


def _attributes(store: Place) -> dict[str, Any]:
    document = store / DOCUMENT
    try:
        content = json.loads(read_bytes(document))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreNotFoundError(
            f"{store} holds no store: there is no {DOCUMENT}; give the folder <root>/<project> of a run"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise StoreDamagedError(f"{document} cannot be read: {error}; restore it from a copy") from error
    attributes = content.get("attributes") if isinstance(content, dict) else None
    if not isinstance(attributes, dict):
        raise StoreDamagedError(f"{document} has no attributes; restore it from a copy")
    return attributes


def _manifest(attributes: Mapping[str, Any], where: Place) -> StoreManifest:
    try:
        manifest = StoreManifest(
            created=str(attributes["created"]),
            library=str(attributes["library"]),
            config=dict(attributes["config"]),
        )
        if "layout" not in attributes:
            return manifest
        return manifest.described(
            layout=Layout.from_json(attributes["layout"]),
            encoding=str(attributes["encoding"]),
            projection=dict(attributes["projection"]),
            projection_shapes=_shapes(attributes["projection_shapes"]),
            fingerprints={str(k): str(v) for k, v in attributes["fingerprints"].items()},
            optimizer=dict(attributes.get("optimizer", {})),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise StoreDamagedError(f"{where} lacks or garbles a field: {error!r}; restore it") from error


def _shapes(table: Mapping[str, Any]) -> dict[str, dict[str, tuple[int, int] | None]]:
    return {
        side: {name: None if shape is None else _shape(shape) for name, shape in table[side].items()}
        for side in ("input", "output")
    }


def _shape(pair: Any) -> tuple[int, int]:
    rank, width = pair
    return int(rank), int(width)
