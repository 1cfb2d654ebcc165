"""The example of EK-FAC beside LoGra, small on a text made here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from logix_like.examples import completion, language_model
from logix_like.examples.language_model import Settings
from logix_like.examples.text import PADDING, Words

TINY = Settings(width=16, heads=2, layers=1, vocabulary=60, length=16, epochs=2, batch=8)


def test_both_answers_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    lines = [f"the {who} {what} the {where}." for who in ["cat", "dog", "man"] for what in ["sees", "likes"]
             for where in ["house", "tree", "river", "hill"]]  # fmt: skip
    file.write_text("\n\n".join(lines))
    monkeypatch.setattr(language_model, "QUICK", TINY)
    completion.main(["--quick", "--text", str(file), "--prompt", "the dog"])
    printed = capsys.readouterr().out
    assert "Completion: the dog " in printed
    assert "LoGra, from the store" in printed
    assert "EK-FAC, full size" in printed
    assert printed.count("paragraph ") == 10
    assert "over 24 passages" in printed


def test_only_the_completion_is_asked_about() -> None:
    words = Words(["a b c d e f"], 20)
    question = completion.question_about("a b", "a b c d", words, 10)
    assert question.inputs.shape == (1, 4)
    assert (question.targets[0] != PADDING).tolist() == [False, False, True, True]
    assert torch.equal(question.inputs[0], words.encode("a b c", 10)[:4])
