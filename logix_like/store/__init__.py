"""The store: projected per-sample gradients on disk, as Zarr v3 arrays with a commit record.

Writing: :func:`create_store`, :func:`describe`, :class:`StoreWriter`, :func:`save_checkpoint`,
:func:`build_view`; taking back: :func:`supersede_steps`, :func:`supersede_samples`. Reading:
:func:`open_store` gives a :class:`GradientStore`, whose views satisfy :class:`Rows`.
"""

from logix_like.store.encoding.kinds import ENCODINGS, Encoding
from logix_like.store.format.attempts import WriterInfo
from logix_like.store.format.checkpoints import (
    CheckpointRecord,
    last_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from logix_like.store.format.creation import add_fingerprints, create_store, describe, projections_digest
from logix_like.store.format.journal import PathJournal, next_attempt
from logix_like.store.format.schema import Flag, StoreManifest, is_store, read_manifest
from logix_like.store.format.sums import Coverage
from logix_like.store.places.files import Place, as_place
from logix_like.store.reading.gradients import RowChunk
from logix_like.store.reading.reader import GradientStore, OnDamage, build_view, open_store
from logix_like.store.reading.view import REDUCTIONS, Rows
from logix_like.store.upkeep.export import export_rows
from logix_like.store.upkeep.merging import MergeReport, merge_parts
from logix_like.store.upkeep.repair import RepairReport, repair
from logix_like.store.upkeep.superseding import supersede_samples, supersede_steps
from logix_like.store.upkeep.verify import Damage, VerifyReport, verify
from logix_like.store.writing.writer import StoreWriter

__all__ = [
    "ENCODINGS",
    "REDUCTIONS",
    "CheckpointRecord",
    "Coverage",
    "Damage",
    "Encoding",
    "Flag",
    "GradientStore",
    "MergeReport",
    "OnDamage",
    "PathJournal",
    "Place",
    "RepairReport",
    "RowChunk",
    "Rows",
    "StoreManifest",
    "StoreWriter",
    "VerifyReport",
    "WriterInfo",
    "add_fingerprints",
    "as_place",
    "build_view",
    "create_store",
    "describe",
    "export_rows",
    "is_store",
    "last_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "merge_parts",
    "next_attempt",
    "open_store",
    "projections_digest",
    "read_manifest",
    "repair",
    "save_checkpoint",
    "supersede_samples",
    "supersede_steps",
    "verify",
]
