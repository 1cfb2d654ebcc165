"""The commands that look after a store: what they print, and how they end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from logix_like.store import open_store
from tests.cli.calling import call
from tests.store.test_store_merging import scattered
from tests.store.test_store_verify import flip


def test_verify_and_repair_name_what_is_damaged(tmp_path: Path) -> None:
    store = scattered(tmp_path / "s")
    sound = call("verify", store)
    assert sound.exit_code == 0 and "92 rows" in sound.stdout and "all as they were committed" in sound.stdout
    flip(store / "writers/0-1/gradients/c.0.0", 9)
    found = call("verify", store)
    assert found.exit_code == 1 and "gradients/c.0.0" in found.stdout and "rows 0 to 15" in found.stdout
    plain = json.loads(call("verify", store, "--json").stdout)
    assert not plain["ok"] and plain["damages"][0]["data_id"][:2] == [0, "0-1"]
    mended = call("repair", store)
    assert mended.exit_code == 0 and "16 rows taken out" in mended.stdout and "quarantine/1" in mended.stdout
    assert call("verify", store).exit_code == 0
    again = json.loads(call("repair", store, "--json").stdout)
    assert again["found"] == [] and again["quarantine"] is None and again["after"]["ok"]


def test_what_cannot_be_repaired_ends_with_an_error(tmp_path: Path) -> None:
    store = scattered(tmp_path / "s")
    flip(store / "projections/encoder.q/input/c.0.0", 9)
    assert call("repair", store).exit_code == 1
    missing = call("verify", tmp_path / "none")
    assert missing.exit_code == 1 and missing.stderr.startswith("error: ") and missing.stderr.count("\n") == 1


def test_compact_and_export(tmp_path: Path) -> None:
    store = scattered(tmp_path / "s")
    before = open_store(store).gradients[:]
    done = call("compact", store)
    assert done.exit_code == 0 and "parts 3 -> 1" in done.stdout
    assert json.loads(call("compact", store, "--json").stdout)["rows"] == 92
    saved = call("export", store, tmp_path / "rows.npz")
    assert saved.exit_code == 0 and saved.stderr == f"saved to {tmp_path / 'rows.npz'}\n"
    told = json.loads(call("export", store, tmp_path / "again.npz", "--reduce", "mean", "--json").stdout)
    assert told["rows"] == 92 and told["file"] == str(tmp_path / "again.npz") and told["bytes"] > 0
    with np.load(tmp_path / "rows.npz") as archive:
        np.testing.assert_array_equal(archive["gradients"], before.numpy())
    assert call("export", store, tmp_path / "rows.npz", "--reduce", "median").exit_code == 2
    assert "ends in none of" in call("export", store, tmp_path / "rows.csv").stderr
