"""Two small stores to be looked at: labelled texts, some of them hostile, and pictures of digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import logix_like as logix

HOSTILE = {
    "script": "<script>document.title = 'run'</script>",
    "attribute": '"onerror="document.title=\'run\'" <img src=x onerror="document.title=\'run\'">',
    "template": "{{ 7 * 7 }} {% raw %} ${document.title='run'} </script><svg onload=\"document.title='run'\">",
    "direction": "a \u202egnp.exe\u202c and שלום",
    "megabyte": "word " * 200_000,
    "nul": "before\x00after\x1b[31m",
    "<b>an id</b>": "a sample whose very name is markup",
}
"""Texts that a page must show and never run, by their samples' ids."""

SUBJECTS = {
    "animals": ["cat", "dog", "horse", "bird", "fish", "lion", "sheep", "goat"],
    "kitchen": ["bread", "soup", "butter", "onion", "pepper", "stove", "spoon", "plate"],
    "weather": ["rain", "cloud", "storm", "wind", "snow", "thunder", "frost", "sun"],
}
FILLING = ["the", "a", "of", "and", "very", "old", "new", "small", "near", "under", "after", "today", "quite", "with"]
WORDS = {word: n for n, word in enumerate([w for words in SUBJECTS.values() for w in words] + FILLING)}


def make_texts(count: int = 60) -> dict[str | int, dict[str, Any]]:
    """Labelled texts by id; every tenth has a wrong label. Every third id is a number."""
    generator = torch.Generator().manual_seed(0)
    subjects = list(SUBJECTS)
    texts: dict[str | int, dict[str, Any]] = {}
    for n in range(count):
        subject = subjects[n % 3]
        picks = torch.randint(0, 8, (7,), generator=generator).tolist()
        words = [SUBJECTS[subject][p] if i % 2 else FILLING[p] for i, p in enumerate(picks)]
        label = subjects[(n + 1) % 3] if n % 10 == 9 else subject
        texts[n if n % 3 == 2 else f"text-{n}"] = {"text": " ".join(words), "label": label}
    return texts | {name: {"text": text, "label": "weather"} for name, text in HOSTILE.items()}


TEXTS = make_texts()


def words_of(text: str) -> Tensor:
    counts = torch.zeros(len(WORDS))
    for word in text[:1000].split():
        if word in WORDS:
            counts[WORDS[word]] += 1
    return counts + 0.01


def text_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(len(WORDS), 12), nn.Tanh(), nn.Linear(12, 3))


def loss_of_text(model: nn.Module, text: str) -> Tensor:
    """How sure the model is that a text speaks of animals."""
    return F.cross_entropy(model(words_of(text)[None]), torch.tensor([0]))


def text_store(root: Path, epochs: int = 3) -> tuple[Path, nn.Module]:
    """A finished store of :data:`TEXTS`, and the trained model."""
    model = text_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    names = list(TEXTS)
    x = torch.stack([words_of(TEXTS[name]["text"]) for name in names])
    labels = [TEXTS[name]["label"] for name in names]
    y = torch.tensor([list(SUBJECTS).index(label) for label in labels])
    with logix.init("texts", model, optimizer=optimizer, root=root, verbose=False) as run:
        for epoch in range(epochs):
            run.epoch(epoch)
            for ids in torch.randperm(len(names)).split(8):
                losses = F.cross_entropy(model(x[ids]), y[ids], reduction="none")
                chosen = ids.tolist()
                with run(
                    data_id=[names[i] for i in chosen],
                    loss=losses.detach(),
                    metadata={"class": [labels[i] for i in chosen]},
                ):
                    F.cross_entropy(model(x[ids]), y[ids]).backward()
                optimizer.step()
                optimizer.zero_grad()
    return Path(str(run.path)), model


def pictures(count: int = 90) -> tuple[Tensor, Tensor]:
    """Digits of 8 x 8 pixels, and what they are."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.tensor(digits.images[:count]).float() / 16, torch.tensor(digits.target[:count])


def picture_store(root: Path) -> tuple[Path, nn.Module]:
    """A finished store of pictures, and the trained model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = pictures()
    with logix.init("pictures", model, optimizer=optimizer, root=root, verbose=False) as run:
        for epoch in range(3):
            run.epoch(epoch)
            for ids in torch.randperm(len(x)).split(10):
                with run(data_id=ids, metadata={"digit": y[ids].tolist()}):
                    F.cross_entropy(model(x[ids].flatten(1)), y[ids]).backward()
                optimizer.step()
                optimizer.zero_grad()
    return Path(str(run.path)), model


def picture_of(data_id: str | int) -> dict[str, Any]:
    """A picture's content by its id."""
    x, y = pictures()
    return {"image": x[int(data_id)], "label": int(y[int(data_id)])}
