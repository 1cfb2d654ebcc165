"""R4: whatever a store's metadata says, reading it gives the store or a named error."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logix_like.errors import LogixError
from logix_like.layout import Layout, ModuleBlock
from logix_like.statistics import StatisticsAccumulator
from logix_like.store import StoreWriter, open_store, save_checkpoint, verify
from logix_like.store.format.documents import sealed
from logix_like.store.format.schema import _digest
from logix_like.store.places.files import checksum
from tests.store.store_runs import batches, new_store

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1 << 31, 1 << 40, 1 << 53, 1 << 63, 10**30])
    | st.floats()
    | st.sampled_from(["", ".", "..", "../../etc/passwd", "/", "a/b", "input", "encoder.q", "float16", "int8"])
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
DOCUMENTS = {
    "manifest": "zarr.json",
    "sums": "writers/0-1/statistics/1/outer_sum/zarr.json",
    "statistics": "writers/0-1/statistics/1/zarr.json",
    "record": "writers/0-1/commits",
    "checkpoint": "checkpoints/1.json",
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One chunk of one module, so that reading all of it ten thousand times takes minutes."""
    layout = Layout([ModuleBlock("q", "linear", (6, 8), (2, 2), 0, "q")])
    store = new_store(tmp_path_factory.mktemp("fuzz") / "s", layout=layout)
    with StoreWriter(store, layout, "float32", statistics=StatisticsAccumulator(layout, ["covariance"])) as out:
        for batch in batches(torch.randn(3, layout.width)):
            out.put(batch)
    save_checkpoint(store, {"w": torch.ones(2)}, step=1)
    return store


def places(document: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON document something can be changed: the path of every value."""
    items: Any = document.items() if isinstance(document, dict) else enumerate(document)
    found = [at] if at else []
    for key, value in items if isinstance(document, dict | list) else ():
        found += places(value, (*at, key)) if isinstance(value, dict | list) else [(*at, key)]
    return found


def changed(document: Any, place: tuple[Any, ...], value: object) -> Any:
    copy = json.loads(json.dumps(document))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return copy


def with_digest(document: Any) -> bytes:
    """A manifest or another document, with checksums as if it had been written so."""
    attributes = document.get("attributes")
    if isinstance(attributes, dict):
        if "digest" in attributes:
            attributes["digest"] = _digest(attributes)
        return sealed(document)
    return json.dumps(document).encode()


def forge(file: Path, data: st.DataObject) -> bytes:
    """The file with one value changed, and its checksums made to fit: damage is found anyway, this is malice."""
    content = file.read_bytes()
    if file.name == "commits":
        lines = content.splitlines()
        number = data.draw(st.integers(0, len(lines) - 1))
        entry = json.loads(lines[number][9:])
        body = json.dumps(changed(entry, data.draw(st.sampled_from(places(entry))), data.draw(VALUES))).encode()
        lines[number] = b"%08x %s" % (checksum(body), body)
        return b"".join(line + b"\n" for line in lines)
    document = json.loads(content)
    forged = changed(document, data.draw(st.sampled_from(places(document))), data.draw(VALUES))
    if file.parent.name == "checkpoints":
        bare = {key: value for key, value in forged.items() if key != "crc32c"}
        return json.dumps({**bare, "crc32c": f"{checksum(json.dumps(bare).encode()):08x}"}).encode()
    return with_digest(forged)


def read_everything(store: Path) -> None:
    opened = open_store(store)
    for row in (opened.data_id, opened.step, opened.valid, opened.statistics, opened.projections, opened.checkpoints):
        assert row is not None
    assert opened.gradients[:].shape == (len(opened), opened.modules.width)
    assert len(opened.view("last")) <= len(opened)


READERS: tuple[Callable[[Path], object], ...] = (read_everything, verify)


class Hang(BaseException):
    """Reading takes for ever; nothing that is read may catch this."""


@contextlib.contextmanager
def no_hang(seconds: int) -> Iterator[None]:
    """Whatever takes longer is given up with an error that is not a named one."""

    def give_up(*_: object) -> None:
        raise Hang(f"took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    left = signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(left)  # pytest-timeout has one of its own
        signal.signal(signal.SIGALRM, before)


def run_fuzz(original: Path, name: str, data: st.DataObject) -> None:
    file = original / DOCUMENTS[name]
    kept = file.with_name("kept")
    shutil.copyfile(file, kept)
    try:
        file.write_bytes(forge(file, data))
        for read in READERS:
            with contextlib.suppress(LogixError), no_hang(60):
                read(original)
    finally:
        kept.replace(file)


FUZZ: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@pytest.mark.usefixtures("one_gibibyte")
@pytest.mark.parametrize("name", DOCUMENTS)
@settings(max_examples=40, **FUZZ)
@given(data=st.data())
def test_forged_metadata_gives_a_named_error_or_none(original: Path, name: str, data: st.DataObject) -> None:
    run_fuzz(original, name, data)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.usefixtures("one_gibibyte")
@pytest.mark.parametrize("name", DOCUMENTS)
@settings(max_examples=2000, **FUZZ)
@given(data=st.data())
def test_ten_thousand_forged_documents(original: Path, name: str, data: st.DataObject) -> None:
    run_fuzz(original, name, data)
