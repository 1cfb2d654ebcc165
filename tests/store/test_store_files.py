"""One contract for every kind of storage: what the store builds on holds for folders, memory and S3 alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from logix_like.errors import ConfigError, StoreError, StoreWriteError
from logix_like.store.places.files import (
    Place,
    as_place,
    checksum,
    files_of,
    folder_size,
    prepare_checked,
    read_bytes,
)
from logix_like.store.places.storage import Bytes, Files, ObjectPath
from tests.store.s3_server import BUCKET


def write(files: Files, contents: Mapping[Place, Iterable[Bytes]], *, once: bool = False) -> None:
    files.prepare(contents, once=once).publish()


class FilesContract:
    """What every kind of storage must do; those who inherit it give an empty place, the fixture ``root``."""

    @pytest.fixture
    def files(self, root: Place) -> Files:
        return files_of(root)

    def test_what_was_written_is_read(self, root: Place, files: Files) -> None:
        write(files, {root / "a/b": [b"one", bytearray(b"two")], root / "a/c": []})
        assert bytes(files.read(root / "a/b")) == bytes(files.map(root / "a/b")) == b"onetwo"
        assert files.size(root / "a/b") == 6 and bytes(files.map(root / "a/c")) == b""
        write(files, {root / "a/b": [b"three"]})
        assert bytes(files.read(root / "a/b")) == b"three"

    def test_what_is_prepared_is_there_when_it_is_published_and_buffers_are_free_before(
        self, root: Place, files: Files
    ) -> None:
        buffer = bytearray(b"one")
        pending = files.prepare({root / "a/b": [buffer]}, sync=True)
        given_up = files.prepare({root / "a/c": [b"two"]}, sync=True)
        buffer[:] = b"xxx"
        assert not files.exists(root / "a/b")
        given_up.discard()
        pending.publish()
        pending.discard()
        assert [str(file).removeprefix(str(root)) for file, _ in files.walk(root / "a")] == ["/a/b"]
        assert bytes(files.read(root / "a/b")) == b"one"

    def test_a_mapping_may_be_written_to_and_never_reaches_the_file(self, root: Place, files: Files) -> None:
        write(files, {root / "a": [b"abc"]})
        files.map(root / "a")[0] = ord("x")
        assert bytes(files.read(root / "a")) == b"abc"

    def test_checksums_stand_behind_the_content(self, root: Place) -> None:
        crc, pending = prepare_checked({root / "c/0": [b"12", b"345"], root / "c/1": [b""]})
        pending.publish()
        assert crc == {root / "c/0": checksum(b"12345"), root / "c/1": 0}
        assert bytes(read_bytes(root / "c/0")) == b"12345" + crc[root / "c/0"].to_bytes(4, "little")
        assert folder_size(root / "c") == 9 + 4

    def test_what_is_missing_is_a_file_not_found(self, root: Place, files: Files) -> None:
        for read in (files.read, files.map, files.size, files.read_records):
            with pytest.raises(FileNotFoundError):
                read(root / "none")
        assert not files.exists(root / "none") and files.names(root / "none") == []
        assert list(files.walk(root / "none")) == [] and files.identity(root / "none") is None
        files.remove(root / "none")

    def test_folders_tell_what_is_in_them(self, root: Place, files: Files) -> None:
        write(files, {root / name: [b"x"] for name in ("f/b", "f/a", "f/g/c", "fa/x")})
        assert files.names(root / "f") == ["a", "b", "g"]
        assert [(str(file), size) for file, size in files.walk(root / "f")] == [
            (str(root / name), 1) for name in ("f/a", "f/b", "f/g/c")
        ]
        assert files.exists(root / "f") and files.exists(root / "f/a") and not files.exists(root / "f/x")
        assert files.vacant(root / "none") and not files.vacant(root / "f") and not files.vacant(root / "f/a")

    def test_removing_takes_all_of_a_folder_and_nothing_else(self, root: Place, files: Files) -> None:
        write(files, {root / name: [b"x"] for name in ("f/a", "f/g/c", "fa/x")})
        files.remove(root / "f")
        assert not files.exists(root / "f") and files.exists(root / "fa/x")

    def test_folders_and_files_can_be_moved(self, root: Place, files: Files) -> None:
        write(files, {root / name: [name.encode()] for name in ("f/a", "f/g/c", "one", "fa/x")})
        files.move(root / "f", root / "new/f")
        files.move(root / "one", root / "new/one")
        assert not files.exists(root / "f") and not files.exists(root / "one") and files.exists(root / "fa/x")
        assert bytes(files.read(root / "new/f/g/c")) == b"f/g/c" and bytes(files.read(root / "new/one")) == b"one"

    def test_a_folder_is_claimed_by_one(self, root: Place, files: Files) -> None:
        files.make_folder(root)
        assert files.claim_folder(root / "1") and not files.claim_folder(root / "1")
        first = files.identity(root / "1")
        assert first is not None and first == files.identity(root / "1")
        files.remove(root / "1")
        assert files.identity(root / "1") is None
        files.make_folder(root / "inodes/are/used/again")
        assert files.claim_folder(root / "1") and (files.identity(root / "1") != first or isinstance(root, Path))

    def test_records_grow_by_lines(self, root: Place, files: Files) -> None:
        files.make_folder(root)
        records = files.records(root / "commits")
        records.append(b"one")
        assert files.read_records(root / "commits") == b"one\n"
        for number in range(12):
            records.append(b"%d" % number)
        records.close()
        records.close()
        assert files.read_records(root / "commits").split() == [b"one", *(b"%d" % n for n in range(12))]

    def test_a_stamp_changes_with_the_record(self, root: Place, files: Files) -> None:
        files.make_folder(root)
        assert files.stamp(root / "commits") is None
        records = files.records(root / "commits")
        records.append(b"one")
        first = files.stamp(root / "commits")
        assert first is not None and first == files.stamp(root / "commits")
        records.append(b"two")
        assert files.stamp(root / "commits") != first
        records.close()

    def test_a_local_file_can_be_taken_over(self, root: Place, files: Files, tmp_path: Path) -> None:
        files.make_folder(root)
        (tmp_path / "weights").write_bytes(b"w" * 1000)
        files.adopt(tmp_path / "weights", root / "kept")
        assert bytes(files.read(root / "kept")) == b"w" * 1000 and not (tmp_path / "weights").exists()

    def test_a_rank_has_one_writer(self, root: Place, files: Files) -> None:
        files.make_folder(root)
        lock = files.lock(root, root, 0)
        with pytest.raises(StoreError, match=r"already writes|writes to"):
            files.lock(root, root, 0)
        files.lock(root, root, 1).close()
        lock.require()
        lock.close()
        lock.close()
        files.lock(root, root, 0).close()

    def test_an_anchor_leads_to_the_folder(self, root: Place, files: Files) -> None:
        write(files, {root / "f/a": [b"x"]})
        anchor = files.anchor(root / "f")
        write(files, {anchor.place / "b": [b"y"]})
        assert bytes(files.read(root / "f/b")) == b"y"
        anchor.close()
        anchor.close()


class TestLocalFiles(FilesContract):
    """Folders."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Place:
        return tmp_path / "root"

    def test_an_anchor_never_leads_to_another_folder(self, root: Path, files: Files) -> None:
        write(files, {root / "f/a": [b"old"]})
        anchor = files.anchor(root / "f")
        files.move(root / "f", root / "aside")
        write(files, {root / "f/a": [b"new"]})
        write(files, {anchor.place / "a": [b"late"]})
        assert (root / "f/a").read_bytes() == b"new" and (root / "aside/a").read_bytes() == b"late"
        anchor.close()


class ObjectContract(FilesContract):
    """What object stores do besides."""

    def test_an_object_that_is_written_once_is_never_replaced(self, root: Place, files: Files) -> None:
        write(files, {root / "c": [b"one"]}, once=True)
        write(files, {root / "c": [b"one"]}, once=True)  # a repeated request whose answer was lost
        with pytest.raises(StoreWriteError, match="is there already with other content"):
            write(files, {root / "c": [b"two"]}, once=True)
        assert bytes(files.read(root / "c")) == b"one"

    def test_two_writers_of_one_record_do_not_mix(self, root: Place, files: Files) -> None:
        first, second = files.records(root / "commits"), files.records(root / "commits")
        first.append(b"a")
        with pytest.raises(StoreWriteError, match="alone should write"):
            second.append(b"b")
        assert files.read_records(root / "commits") == b"a\n"


class TestMemoryFiles(ObjectContract):
    """This process's memory."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Place:
        return as_place(f"memory://test/{tmp_path.name}")

    def test_a_name_is_the_same_storage_again(self, root: Place, files: Files) -> None:
        write(files, {root / "a": [b"x"]})
        assert bytes(read_bytes(as_place(str(root / "a")))) == b"x"
        with pytest.raises(FileNotFoundError):
            read_bytes(as_place(str(root / "a").replace("test", "other", 1)))


class TestS3Files(ObjectContract):
    """A real S3 server in another process."""

    @pytest.fixture
    def root(self, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Place:
        for name, value in s3_environment.items():
            monkeypatch.setenv(name, value)
        return as_place(f"s3://{BUCKET}/{tmp_path.name}")

    def test_what_the_server_refuses_is_an_os_error(self, root: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(OSError, match=r"s3://no-such-bucket/a"):
            write(files_of(as_place("s3://no-such-bucket/a")), {as_place("s3://no-such-bucket/a"): [b"x"]})


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/a", "no storage that is known.*s3://"),
        ("s3://key:secret@bucket/a", "credentials are taken from the environment"),
        ("s3://bucket/a?token=secret", "credentials are taken from the environment"),
        ("s3:///a", "names no bucket"),
        ("s3://bucket/../a", "a part that is empty, '.' or '..'"),
        ("s3://bucket//a//b", "a part that is empty"),
        ("file://host/a", "another machine"),
        ("s3:/bucket/a", "lost a slash.*'s3://bucket/a'"),
        (Path("s3://bucket/a"), "lost a slash.*'s3://bucket/a'"),
    ],
)
def test_a_url_that_cannot_name_a_store_is_refused(url: str | Path, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        as_place(url)
    assert "secret" not in str(caught.value)


def test_a_place_is_joined_and_named_as_a_path_is() -> None:
    place = as_place("memory://bucket/a/b.c.json/")
    assert isinstance(place, ObjectPath)
    assert (place.name, place.stem, str(place.parent), str(place / "d")) == (
        "b.c.json",
        "b.c",
        "memory://bucket/a",
        "memory://bucket/a/b.c.json/d",
    )
    assert as_place("file:///data/a%20b") == Path("/data/a b") and as_place(place) is place
    assert str(as_place("memory://bucket") / "x") == "memory://bucket/x"
    assert place == as_place(str(place)) and len({place, as_place(str(place))}) == 1
