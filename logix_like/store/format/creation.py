"""Making a store, and telling it what its rows are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor

from logix_like.errors import (
    ConfigError,
    ModelMismatchError,
    StoreDamagedError,
    StoreExistsError,
)
from logix_like.layout import Layout
from logix_like.store.encoding.kinds import encoding_named
from logix_like.store.format.arrays import ArraySpec, chunk_file, read_chunk, write_array, write_document, write_group
from logix_like.store.format.schema import (
    PROJECTIONS,
    WRITERS,
    StoreManifest,
    is_store,
    read_manifest,
    segment,
    write_manifest,
)
from logix_like.store.places.files import Place, as_bytes, as_place, files_of, named_errors, remove_tree

Projections = Mapping[str, tuple[Tensor | None, Tensor | None]]
"""By module: input ``[rank_in, d_in]`` and output ``[rank_out, d_out]`` projection, None for the identity."""

SIDES = ("input", "output")


def create_store(
    path: str | PathLike[str] | Place, config: Mapping[str, Any], *, overwrite: bool = False, resume: bool = False
) -> Place:
    """Create an empty store at ``path`` and return its absolute path.

    With ``resume`` a store that is there already is kept and gone on with; with ``overwrite`` it is
    deleted first (only ever a folder that is a store of this library).

    Raises:
        StoreExistsError: The path holds a run, or anything that is not a store.
        ConfigError: The config is not plain data, or both options are given.
    """
    if overwrite and resume:
        raise ConfigError("resume=True goes on with a store, overwrite=True replaces it; give one of them")
    store = as_place(path)
    manifest = StoreManifest(created=_now(), library=_library_version(), config=_plain(config))
    with named_errors(store):
        if is_store(store):
            if resume:
                read_manifest(store)
                return store
            if not overwrite:
                raise StoreExistsError(
                    f"{store} already holds a run; pass resume=True to go on with it, overwrite=True to "
                    "replace it, or choose another project"
                )
            remove_tree(store)
        elif not files_of(store).vacant(store):
            raise StoreExistsError(
                f"{store} exists and is no store of this library that can be read; nothing was changed: "
                "choose another project, or move it away"
            )
        write_group(store / WRITERS, sync=True)
        write_manifest(store, manifest)
    return store


def describe(
    path: str | PathLike[str] | Place,
    layout: Layout,
    encoding: str,
    projections: Projections,
    *,
    projection: Mapping[str, Any] | None = None,
    fingerprints: Mapping[str, str] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    durability: Literal["process", "commit"] = "process",
) -> StoreManifest:
    """Tell a store what its rows are, at the first batch; returns the manifest.

    Projections are written first and the manifest last, in one atomic step. A store that was
    described before is only compared: the same layout, encoding and projections, or
    :class:`ModelMismatchError`.

    Args:
        path: The store's folder.
        layout: The module table.
        encoding: Name of the stored type.
        projections: For each module of ``layout`` its two projections; members of an input group
            share the input one, which is stored under the group's name.
        projection: How the projections were made, plain data.
        fingerprints: Of the model, by name.
        optimizer: Its ``name`` and the settings of its ``groups``, plain data.
        durability: ``commit`` forces the projections to the disk, file by file.
    """
    store, sync = as_place(path), durability == "commit"
    manifest, shared = read_manifest(store), _shared_matrices(layout, projections)
    if manifest.layout is not None:
        manifest.layout.require_same(layout)
        _require_same(store, manifest, encoding, shared)
        return manifest
    with named_errors(store):
        _write_projections(store, shared, sync=sync)
        manifest = manifest.described(
            layout=layout,
            encoding=encoding_named(encoding).name,
            projection=_plain(projection or {}),
            projection_shapes={
                side: {name: None if matrix is None else tuple(matrix.shape) for name, matrix in shared[side].items()}
                for side in SIDES
            },
            fingerprints=dict(fingerprints or {}),
            optimizer=_plain(optimizer or {}),
        )
        write_manifest(store, manifest)
    return manifest


def _write_projections(store: Place, shared: Mapping[str, Mapping[str, Tensor | None]], *, sync: bool) -> None:
    remove_tree(store / PROJECTIONS)  # what a run that was killed here left behind
    write_group(store / PROJECTIONS, sync=sync)
    for module in sorted({module for matrices in shared.values() for module in matrices}):
        write_group(store / PROJECTIONS / segment(module), sync=sync)
        for side in SIDES:
            matrix = shared[side].get(module)
            if matrix is not None:
                _write_matrix(store / PROJECTIONS / segment(module) / side, matrix, sync=sync)


def add_fingerprints(path: str | PathLike[str] | Place, fingerprints: Mapping[str, str]) -> None:
    """Add fingerprints of the model to a described store's manifest, in one atomic step."""
    store = as_place(path)
    manifest = read_manifest(store)
    with named_errors(store):
        write_manifest(store, manifest.described(fingerprints={**manifest.fingerprints, **fingerprints}))


def read_projections(store: Place, manifest: StoreManifest) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """The projections of each module, float32, None for the identity."""
    shared: dict[str, dict[str, Tensor | None]] = {
        side: {name: read_matrix(store, name, side, shape) for name, shape in shapes.items()}
        for side, shapes in manifest.projection_shapes.items()
    }
    try:
        return {
            block.name: (shared["input"][block.input_group], shared["output"][block.name])
            for block in manifest.layout or ()
        }
    except KeyError as error:
        raise StoreDamagedError(f"{store} names no projection for module {error}") from error


def write_projection_documents(store: Place, manifest: StoreManifest) -> None:
    """Write the Zarr documents of the stored matrices anew; the manifest says what they are."""
    for side, shapes in manifest.projection_shapes.items():
        for name, shape in shapes.items():
            if shape is not None:
                folder = store / PROJECTIONS / segment(name) / side
                write_document(folder, ArraySpec("float32", "NaN", shape[1]), shape[0], shape[0])


def projections_digest(layout: Layout, projections: Projections) -> str:
    """BLAKE2b-128 hex of the matrices, which tells a seed and a basis from others; float32, as they are stored."""
    digest = hashlib.blake2b(digest_size=16)
    for side, matrices in _shared_matrices(layout, projections).items():
        for name, matrix in matrices.items():
            shape = None if matrix is None else list(matrix.shape)
            digest.update(json.dumps([side, name, shape]).encode())
            digest.update(b"" if matrix is None else as_bytes(matrix).data)
    return digest.hexdigest()


def _shared_matrices(layout: Layout, projections: Projections) -> dict[str, dict[str, Tensor | None]]:
    """By side and owner, as float32 on the CPU; an input projection belongs to its group."""
    shared: dict[str, dict[str, Tensor | None]] = {side: {} for side in SIDES}
    for block in layout:
        inward, outward = projections[block.name]
        shared["input"].setdefault(block.input_group, _plain_matrix(inward))
        shared["output"][block.name] = _plain_matrix(outward)
    return shared


def _plain_matrix(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.detach().to("cpu", torch.float32)


def _write_matrix(folder: Place, matrix: Tensor, *, sync: bool) -> None:
    spec = ArraySpec("float32", "NaN", matrix.shape[1])
    write_array(folder, spec, matrix.shape[0], [as_bytes(matrix)], sync=sync)


def read_matrix(store: Place, module: str, side: str, shape: tuple[int, int] | None) -> Tensor | None:
    """A stored projection, None for the identity; :class:`StoreDamagedError` where it is not as it was written."""
    if shape is None:
        return None
    folder = store / PROJECTIONS / segment(module) / side
    what = f"the {side} projection of module {module!r}"
    content = read_chunk(chunk_file(folder, 0, 2), what, size=4 * shape[0] * shape[1])
    return torch.from_numpy(content).view(torch.float32).view(shape)


def _require_same(
    store: Place,
    manifest: StoreManifest,
    encoding: str,
    shared: Mapping[str, Mapping[str, Tensor | None]],
) -> None:
    if manifest.encoding != encoding:
        raise ModelMismatchError(
            f"{store} holds rows of dtype {manifest.encoding!r}, asked for was {encoding!r}; "
            "go on with the store's dtype, or start another store"
        )
    for side, shapes in manifest.projection_shapes.items():
        for name, shape in shapes.items():
            stored, given = read_matrix(store, name, side, shape), shared[side].get(name)
            same = stored is given is None or (stored is not None and given is not None and torch.equal(stored, given))
            if not same:
                raise ModelMismatchError(
                    f"the {side} projection of module {name!r} is not the one that {store} was made with; "
                    "use the stored projections (GradientStore.projections), or start another store"
                )


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(data)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the store keeps plain data only (text, numbers, lists, mappings): {error}") from error
    return plain


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _library_version() -> str:
    try:
        return version("logix_like")
    except PackageNotFoundError:
        return "unknown"
