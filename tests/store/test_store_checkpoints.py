"""Weights in the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from logix_like.errors import StoreDamagedError, StoreError, StoreNotFoundError
from logix_like.store import list_checkpoints, load_checkpoint, open_store, save_checkpoint
from tests.store.store_runs import new_store


def test_checkpoints_come_back_in_order(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    assert list_checkpoints(store) == ()
    for step in range(11):
        record = save_checkpoint(store, {"weight": torch.full((2,), float(step))}, step, step // 4, f"f{step}")
        assert record.number == step + 1
    opened = open_store(store)
    assert [(c.number, c.step, c.epoch, c.fingerprint) for c in opened.checkpoints][9:] == [
        (10, 9, 2, "f9"),
        (11, 10, 2, "f10"),
    ]
    assert opened.load_checkpoint(3)["weight"].tolist() == [2.0, 2.0]


def test_tied_strided_and_odd_tensors_are_kept(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    state = {
        **model.state_dict(),
        "transposed": torch.randn(3, 5).T,
        "half": torch.ones(2, dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "slice": torch.arange(10)[2:5],
    }
    save_checkpoint(store, state, 1)
    found = load_checkpoint(store, 1)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and found[name].equal(tensor)
    model.load_state_dict({name: found[name] for name in model.state_dict()})


def test_what_is_not_a_tensor_is_refused(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    with pytest.raises(StoreError, match="entry 'extra' of the state_dict is a dict"):
        save_checkpoint(store, cast(Any, {"extra": {}}), 1)
    assert list_checkpoints(store) == ()


def test_an_unknown_number_lists_the_known(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    with pytest.raises(StoreNotFoundError, match="no checkpoint 1; there are: none"):
        load_checkpoint(store, 1)
    save_checkpoint(store, {"a": torch.ones(1)}, 1)
    with pytest.raises(StoreNotFoundError, match="no checkpoint 4; there are: 1"):
        load_checkpoint(store, 4)


def test_weights_without_their_record_are_no_checkpoint(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    save_checkpoint(store, {"a": torch.ones(1)}, 1)
    save_checkpoint(store, {"a": torch.ones(1)}, 2)
    (store / "checkpoints/2.json").unlink()
    assert [c.number for c in list_checkpoints(store)] == [1]
    save_checkpoint(store, {"a": torch.zeros(1)}, 3)
    assert load_checkpoint(store, 2)["a"].item() == 0


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    save_checkpoint(store, {"a": torch.ones(100)}, 1)
    file = store / "checkpoints/1.safetensors"
    content = bytearray(file.read_bytes())
    for position in (0, 20, len(content) - 1):
        content[position] ^= 2
        file.write_bytes(content)
        with pytest.raises(StoreDamagedError, match=r"1\.safetensors does not match its checksum"):
            load_checkpoint(store, 1)
        content[position] ^= 2
    file.unlink()
    with pytest.raises(StoreDamagedError, match="cannot be read"):
        load_checkpoint(store, 1)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"number": 2}', b"null"])
def test_a_garbled_record_is_named(tmp_path: Path, content: bytes) -> None:
    store = new_store(tmp_path / "s")
    save_checkpoint(store, {"a": torch.ones(1)}, 1)
    (store / "checkpoints/1.json").write_bytes(content)
    with pytest.raises(StoreDamagedError, match=r"1\.json"):
        list_checkpoints(store)


def test_a_record_in_anothers_place_is_named(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    for number in (1, 2):
        save_checkpoint(store, {"a": torch.ones(number)}, 1)
    (store / "checkpoints/1.json").write_bytes((store / "checkpoints/2.json").read_bytes())
    with pytest.raises(StoreDamagedError, match="says that it is number 2"):
        list_checkpoints(store)
