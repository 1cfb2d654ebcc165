"""The store: projected per-sample gradients on disk, as Zarr v3 arrays with a commit record.

Writing: :func:`create_store`, :func:`describe`, :class:`StoreWriter`, :func:`save_checkpoint`,
:func:`build_view`; taking back: :func:`supersede_steps`, :func:`supersede_samples`. Reading:
:func:`open_store` gives a :class:`GradientStore`, whose views satisfy :class:`Rows`.
"""

from logix_like.store.attempts import WriterInfo
from logix_like.store.checkpoints import (
    CheckpointRecord,
    last_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from logix_like.store.creation import add_fingerprints, create_store, describe, projections_digest
from logix_like.store.encoding import ENCODINGS, Encoding
from logix_like.store.export import export_rows
from logix_like.store.files import Place, as_place
from logix_like.store.gradients import RowChunk
from logix_like.store.journal import PathJournal, next_attempt
from logix_like.store.merging import MergeReport, merge_parts
from logix_like.store.reader import GradientStore, OnDamage, build_view, open_store
from logix_like.store.repair import RepairReport, repair
from logix_like.store.schema import Flag, StoreManifest, is_store, read_manifest
from logix_like.store.sums import Coverage
from logix_like.store.superseding import supersede_samples, supersede_steps
from logix_like.store.verify import Damage, VerifyReport, verify
from logix_like.store.view import REDUCTIONS, Rows
from logix_like.store.writer import StoreWriter

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
