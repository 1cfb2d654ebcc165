"""Creating, describing, resuming and replacing stores; and refusing to."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from logix_like.errors import (
    ConfigError,
    LogixError,
    ModelMismatchError,
    StoreDamagedError,
    StoreError,
    StoreExistsError,
    StoreNotFoundError,
    StoreVersionError,
    StoreWriteError,
)
from logix_like.layout import Layout, ModuleBlock
from logix_like.store import StoreWriter, create_store, describe, open_store, read_manifest
from logix_like.store.format.schema import StoreManifest, segment
from logix_like.store.places import local
from tests.store.broken_disk import BrokenDisk
from tests.store.store_runs import WIDTH, log, new_store, projections, small_layout, writer


def test_a_new_store_opens_and_is_empty(tmp_path: Path) -> None:
    store = open_store(create_store(tmp_path / "root" / "s", {"project": "p", "nested": {"a": [1, None]}}))
    assert (len(store), store.layout, len(store.modules), store.writers) == (0, None, 0, ())
    assert store.manifest.config == {"project": "p", "nested": {"a": [1, None]}}
    assert store.data_id.tolist() == [] and store.gradients[:].shape == (0, 0)
    assert list(store.chunks()) == [] and store.statistics.rows == 0
    assert len(store.view("mean")) == 0 and store.projections == {} and store.checkpoints == ()


def test_a_described_store_without_rows_is_empty(tmp_path: Path) -> None:
    store = open_store(new_store(tmp_path / "s"))
    assert len(store) == 0 and store.layout == small_layout()
    assert store.gradients[:].shape == (0, WIDTH)


def test_an_existing_run_is_refused(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    with pytest.raises(StoreExistsError, match="resume=True to go on with it, overwrite=True to replace it"):
        create_store(store, {})
    with pytest.raises(ConfigError, match="give one of them"):
        create_store(store, {}, resume=True, overwrite=True)


def test_resume_keeps_rows_and_goes_on_behind_them(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    first, second = torch.randn(20, WIDTH), torch.randn(9, WIDTH)
    log(store, first)
    assert create_store(store, {"project": "other"}, resume=True) == store
    assert describe(store, small_layout(), "float32", projections()).layout == small_layout()
    log(store, second)
    opened = open_store(store)
    assert opened.gradients[:].equal(torch.cat([first, second]))
    assert [(w.name, w.rows, w.state) for w in opened.writers] == [("0-1", 20, "closed"), ("0-2", 9, "closed")]
    assert opened.manifest.config == {"project": "test"}


def test_resume_creates_what_is_not_there(tmp_path: Path) -> None:
    assert len(open_store(create_store(tmp_path / "s", {}, resume=True))) == 0


def test_resume_with_another_model_is_refused(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    blocks = list(small_layout())
    other = Layout([ModuleBlock("encoder.v", *list(vars(blocks[0]).values())[1:]), *blocks[1:]])
    with pytest.raises(ModelMismatchError, match=r"'encoder\.v' of this model differs from the logged 'encoder\.q'"):
        describe(store, other, "float32", {**projections(), "encoder.v": (None, None)})
    with pytest.raises(ModelMismatchError, match="dtype 'float32', asked for was 'bfloat16'"):
        describe(store, small_layout(), "bfloat16", projections())
    with pytest.raises(ModelMismatchError, match=r"output projection of module 'encoder\.k' is not the one"):
        describe(store, small_layout(), "float32", {**projections(), "encoder.k": (None, torch.zeros(2, 6))})
    with pytest.raises(ModelMismatchError, match="output projection of module '' is not the one"):
        describe(store, small_layout(), "float32", {**projections(), "": (projections()[""][0], torch.eye(5))})


def test_overwrite_replaces_a_store_and_nothing_else(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    log(store, torch.randn(5, WIDTH))
    assert len(open_store(create_store(store, {}, overwrite=True))) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(StoreExistsError, match="is no store of this library"):
            create_store(foreign, {}, **options)
    (foreign / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(StoreExistsError, match="nothing was changed"):
        create_store(foreign, {}, overwrite=True)
    assert (foreign / "thesis.tex").read_text() == "years of work"
    with pytest.raises(StoreExistsError):
        create_store(foreign / "thesis.tex", {}, overwrite=True)


def test_an_empty_folder_may_become_a_store(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    assert len(open_store(create_store(tmp_path / "s", {}))) == 0


def test_a_config_that_is_not_plain_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="plain data only"):
        create_store(tmp_path / "s", {"model": object()})
    assert not (tmp_path / "s").exists()


def test_a_config_with_keys_that_are_numbers_opens(tmp_path: Path) -> None:
    store = create_store(tmp_path / "s", {"batch_dim": {10: 1, 9: (2, float("inf"))}})
    assert open_store(store).manifest.config == {"batch_dim": {"10": 1, "9": [2, float("inf")]}}


def test_what_is_not_a_store_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match=r"holds no store.*<root>/<project>"):
        open_store(tmp_path / "nowhere")
    with pytest.raises(StoreNotFoundError, match="holds no store"):
        open_store(tmp_path)
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {"a": 1}}')
    with pytest.raises(StoreNotFoundError, match="a Zarr group but no logix_like store"):
        open_store(tmp_path)


def test_a_newer_format_asks_for_an_upgrade(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    _edit(store, lambda attributes: attributes.update(version=2))
    with pytest.raises(StoreVersionError, match="written by format 2, this library reads format 1; upgrade"):
        open_store(store)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.update(created="later"),
        lambda a: a["layout"][0].update(rank=[4, 4]),
        lambda a: a.pop("digest"),
        lambda a: a.update(version="1"),
        lambda a: a.pop("config"),
    ],
)
def test_an_altered_manifest_is_damage(tmp_path: Path, change: Any) -> None:
    store = new_store(tmp_path / "s")
    _edit(store, change)
    with pytest.raises(StoreDamagedError, match=r"zarr\.json"):
        open_store(store)


@pytest.mark.parametrize(
    "field", ["config", "layout", "encoding", "projection", "projection_shapes", "fingerprints", "created"]
)
@pytest.mark.parametrize("value", [None, 3, "text", [], [1], {}, {"input": {"a": [1]}, "output": 3}, [[]]])
def test_a_crafted_manifest_gives_a_named_error_or_opens(tmp_path: Path, field: str, value: object) -> None:
    store = new_store(tmp_path / "s")

    def change(attributes: dict[str, Any]) -> None:
        attributes[field] = value
        attributes.pop("digest")
        attributes["digest"] = _digest_of(attributes)

    _edit(store, change)
    try:
        opened = open_store(store)
        assert opened.projections is not None
    except LogixError as error:
        assert str(store) in str(error) or "module table" in str(error)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"attributes": 3}', b"\xff\xfe", b"[" * 100_000])
def test_a_garbled_manifest_is_damage(tmp_path: Path, content: bytes) -> None:
    store = new_store(tmp_path / "s")
    (store / "zarr.json").write_bytes(content)
    with pytest.raises(StoreDamagedError):
        open_store(store)
    with pytest.raises(StoreExistsError):
        create_store(store, {}, overwrite=True)


@pytest.mark.parametrize("name", [".", ".."])
def test_names_that_lead_out_of_a_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreDamagedError, match="no module can be called so"):
        segment(name)
    layout = Layout([ModuleBlock(name, "linear", (2, 2), (1, 1), 0, name)])
    store = create_store(tmp_path / "s", {})
    with pytest.raises(StoreDamagedError):
        describe(store, layout, "float32", {name: (torch.ones(1, 2), None)})


@pytest.mark.parametrize("name", ["a/b", "../../x", "a\\b", "%2e", "@root", "naïve", "a b", "c:"])
def test_names_become_one_path_segment(name: str) -> None:
    part = segment(name)
    assert "/" not in part and "\\" not in part and part not in (".", "..", segment(""))
    assert (Path("root") / part).parent == Path("root")


def test_a_kill_while_describing_leaves_an_undescribed_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = create_store(tmp_path / "s", {})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("logix_like.store.format.creation.write_manifest", killed)
        describe(store, small_layout(), "float32", projections())
    assert open_store(store).layout is None
    describe(store, small_layout(), "float32", {**projections(), "": (None, None)})
    assert open_store(store).projections[""] == (None, None)


def test_writing_needs_a_described_store_of_the_same_kind(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError):
        writer(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="no module table yet"):
        writer(create_store(tmp_path / "a", {}))
    store = new_store(tmp_path / "b")
    with pytest.raises(ConfigError, match="dtype is 'float32', asked for was 'bfloat16'"):
        writer(store, "bfloat16")
    with pytest.raises(ConfigError, match="unknown store dtype 'int3'; known: bfloat16, float32"):
        StoreWriter(store, small_layout(), "int3")
    with pytest.raises(ModelMismatchError):
        StoreWriter(store, Layout(list(small_layout())[:2]), "float32")
    with pytest.raises(ConfigError, match="durability is 'always'; known: process, commit"):
        writer(store, durability="always")
    assert open_store(store).writers == ()


def test_the_manifest_round_trips() -> None:
    manifest = StoreManifest(created="now", library="1", config={"a": 1})
    assert manifest.described(encoding="float32").to_attributes()["digest"] == manifest.to_attributes()["digest"]


def test_projection_and_fingerprints_are_kept(tmp_path: Path) -> None:
    store = create_store(tmp_path / "s", {})
    describe(
        store,
        small_layout(),
        "float32",
        projections(),
        projection={"init": "orthogonal", "seed": 3},
        fingerprints={"structure": "ab"},
    )
    manifest = read_manifest(store)
    assert manifest.projection == {"init": "orthogonal", "seed": 3}
    assert manifest.fingerprints == {"structure": "ab"}
    assert manifest.projection_shapes["output"] == {"encoder.q": (3, 6), "encoder.k": (2, 6), "": None}


def _edit(store: Path, change: Any) -> None:
    document = json.loads((store / "zarr.json").read_text())
    change(document["attributes"])
    (store / "zarr.json").write_text(json.dumps(document))


def _digest_of(attributes: dict[str, Any]) -> str:
    from logix_like.store.format import schema

    return schema._digest(attributes)


def test_a_store_that_cannot_be_replaced_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(tmp_path / "s")
    log(store, torch.randn(5, WIDTH))
    for call in (1, 2, 3):
        with monkeypatch.context() as patch, pytest.raises(StoreWriteError, match=r"Permission denied.*see to the"):
            patch.setattr(local, "os", BrokenDisk(call, errno.EACCES))
            create_store(store, {}, overwrite=True)
