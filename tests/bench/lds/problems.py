"""Three small trainings on real data: a perceptron and a convolutional network on MNIST, a transformer on verses.

Each is a frozen record, so that it travels to worker processes as a few numbers and loads its data there once.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from logix_like.examples.images import load_digits
from logix_like.examples.language_model import LanguageModel, Settings
from logix_like.examples.text import PADDING, Words, batch_of, gospels
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

import logix_like as logix
from logix_like.objective import Categorical, Objective

Samples = list[int] | range

SHIPPED = Path(__file__).parent / "truth"
"""What was trained once for all: what retrained models measured, and pretrained weights."""


@dataclass(frozen=True)
class Problem(ABC):
    """A training whose every sample may be left out, and queries that are measured afterwards."""

    samples: int = 0
    queries: int = 0
    epochs: int = 0
    batch: int = 32
    lr: float = 0.0

    @property
    def name(self) -> str:
        """All that the truth depends on."""
        numbers = "-".join(str(value) for value in asdict(self).values())
        return f"{type(self).__name__.lower()}-{numbers}"

    @property
    def time(self) -> float:
        """Learning rate times steps: eigenvalues of the Hessian below one over it are not learnt by plain SGD."""
        return self.lr * self.epochs * -(-self.samples // self.batch)

    @property
    def small(self) -> bool:
        """Whether derivatives can be carried through every step of it."""
        return False

    @property
    @abstractmethod
    def preset(self) -> str:
        """Preset of the run's config."""

    @property
    @abstractmethod
    def wide(self) -> tuple[str, ...]:
        """Globs of the modules with the largest gradients."""

    @property
    @abstractmethod
    def first(self) -> tuple[str, ...]:
        """Globs of the modules next to the input."""

    @property
    def exclude(self) -> tuple[str, ...]:
        """Modules that are not tracked."""
        return ()

    @property
    @abstractmethod
    def objective(self) -> Objective:
        """What is trained for; batches are those of :meth:`training` and :meth:`asked`."""

    @abstractmethod
    def untrained(self) -> nn.Module:
        """A new model, by torch's seed."""

    def model(self) -> nn.Module:
        """What training begins with."""
        return self.untrained()

    @abstractmethod
    def optimizer(self, model: nn.Module) -> Optimizer:
        """A new optimizer."""

    @abstractmethod
    def training(self, samples: Samples) -> Any:
        """A batch of training samples."""

    @abstractmethod
    def asked(self) -> Any:
        """All queries as one batch."""

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Per-sample losses."""
        return self.objective.losses(model, batch)

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The batch's loss as it is trained on."""

    def mask(self, batch: Any) -> Tensor | None:
        """Positions that count."""
        return None

    def train(self, samples: Samples, seed: int, start: Callable[[nn.Module], logix.Run] | None = None) -> nn.Module:
        """Train a new model on ``samples``, logged by the run that ``start`` makes; the order is the seed's."""
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        model = self.model()
        run = None if start is None else start(model)
        optimizer = self.optimizer(model)
        order = torch.Generator().manual_seed(seed)
        for epoch in range(self.epochs):
            if run is not None:
                run.epoch(epoch)
            for ids in self.order(samples, order):
                batch = self.training(ids)
                with self.logged(run, ids, batch):
                    self.loss(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
        return model.eval()

    def order(self, samples: Samples, generator: torch.Generator) -> Iterator[list[int]]:
        """Batches of one epoch."""
        chosen = torch.tensor(list(samples))
        for part in torch.randperm(len(chosen), generator=generator).split(self.batch):
            yield chosen[part].tolist()

    def logged(self, run: logix.Run | None, ids: list[int], batch: Any) -> AbstractContextManager[Any]:
        """The run's block around a step."""
        return nullcontext() if run is None else run(data_id=ids, mask=self.mask(batch))

    def measure(self, model: nn.Module) -> Tensor:
        """Minus the loss of each query; in float64, since a loss near 0 still has a rank."""
        with torch.no_grad():
            outputs = self.objective.forward(model, self.asked()).double()
        return -self.objective.likelihood.losses(outputs, self.objective.labels(self.asked()))


@cache
def _digits(samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = load_digits(samples, 0.0, torch.Generator().manual_seed(0))
    return data.images, data.labels, data.test_images, data.test_labels


@dataclass(frozen=True)
class Images(Problem):
    """A perceptron on images of digits."""

    samples: int = 1000
    queries: int = 100
    epochs: int = 20
    batch: int = 32
    lr: float = 0.05

    preset = "vision"
    wide = first = ("0",)
    objective = Objective()

    def untrained(self) -> nn.Module:
        return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    def optimizer(self, model: nn.Module) -> Optimizer:
        return torch.optim.SGD(model.parameters(), lr=self.lr)

    def training(self, samples: Samples) -> tuple[Tensor, Tensor]:
        images, labels, *_ = _digits(self.samples)
        chosen = torch.tensor(list(samples))
        return images[chosen], labels[chosen]

    def asked(self) -> tuple[Tensor, Tensor]:
        *_, images, labels = _digits(self.samples)
        return images[: self.queries], labels[: self.queries]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])


@dataclass(frozen=True)
class Small(Images):
    """A small perceptron on the same images, 7 x 7 pixels: for what carries derivatives through every step."""

    samples: int = 300
    queries: int = 50
    epochs: int = 15
    batch: int = 30
    lr: float = 0.2

    small = True
    wide = first = ("3",)

    def model(self) -> nn.Module:
        shrunk = (nn.Unflatten(1, (1, 28, 28)), nn.AvgPool2d(4), nn.Flatten())
        return nn.Sequential(*shrunk, nn.Linear(49, 16), nn.Tanh(), nn.Linear(16, 10))


@dataclass(frozen=True)
class SmallAdam(Small):
    """The same with Adam."""

    lr: float = 0.01

    def optimizer(self, model: nn.Module) -> Optimizer:
        return torch.optim.Adam(model.parameters(), lr=self.lr)


@dataclass(frozen=True)
class Convolutions(Images):
    """A small convolutional network on the same images."""

    samples: int = 1000
    queries: int = 100
    epochs: int = 10
    batch: int = 32
    lr: float = 0.1

    wide, first = ("6",), ("1",)

    def untrained(self) -> nn.Module:
        return nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 8, 5, stride=2),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(400, 10),
        )


VOCABULARY, KNOWN_FROM = 1000, 800
"""Words that have a number: the most frequent ones of at least so many verses."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Verses as numbers of words: to train on, to ask about, and all others."""

    training: list[Tensor]
    asked: list[Tensor]
    others: list[Tensor]
    words: int


@cache
def _corpus(samples: int, queries: int, length: int) -> Corpus:
    texts = list(gospels().values())
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    words = Words([texts[i] for i in order[: max(samples, KNOWN_FROM)]], VOCABULARY)
    encoded = [words.encode(texts[i], length) for i in order]
    return Corpus(encoded[:samples], encoded[samples : samples + queries], encoded[samples + queries :], words.size)


Passages = Mapping[str, Tensor]
"""``inputs`` and ``targets``, both ``[batch, positions]``."""


def _logits(model: Any, batch: Passages) -> Tensor:
    logits: Tensor = model(batch["inputs"])
    return logits


def _targets(batch: Passages) -> Tensor:
    return batch["targets"].masked_fill(batch["targets"] == PADDING, -100)


def _padded(passages: Mapping[int, Tensor]) -> Passages:
    batch = batch_of([str(i) for i in passages], {str(i): passage for i, passage in passages.items()})
    return {"inputs": batch.inputs, "targets": batch.targets}


@dataclass(frozen=True)
class Verses(Problem):
    """A transformer of two layers on verses of the King James Bible."""

    samples: int = 1000
    queries: int = 50
    epochs: int = 3
    batch: int = 16
    lr: float = 3e-3
    width: int = 64
    length: int = 32
    pretraining: int = 0
    """Steps on other verses, before."""

    preset = "language_model"
    wide, first = ("*.up", "*.down"), ("layers.0.*",)
    exclude = ("*lm_head",)
    objective = Objective(Categorical(), outputs=_logits, targets=_targets)

    @property
    def corpus(self) -> Corpus:
        """Loaded once a process."""
        return _corpus(self.samples, self.queries, self.length)

    def untrained(self) -> nn.Module:
        settings = Settings(width=self.width, heads=4, layers=2, length=self.length)
        return LanguageModel(self.corpus.words, settings)

    def model(self) -> nn.Module:
        model = self.untrained()
        if self.pretraining:
            model.load_state_dict(_pretrained(self))
        return model

    def pretrain(self, model: nn.Module) -> None:
        """Train on other verses."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        others, generator = self.corpus.others, torch.Generator().manual_seed(1)
        for _ in range(self.pretraining):
            chosen = torch.randint(len(others), (32,), generator=generator).tolist()
            self.loss(model, _padded({i: others[i] for i in chosen})).backward()
            optimizer.step()
            optimizer.zero_grad()

    def optimizer(self, model: nn.Module) -> Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=self.lr)

    def training(self, samples: Samples) -> Passages:
        return _padded({i: self.corpus.training[i] for i in samples})

    def asked(self) -> Passages:
        return _padded(dict(enumerate(self.corpus.asked)))

    def mask(self, batch: Passages) -> Tensor:
        return batch["targets"] != PADDING

    def loss(self, model: nn.Module, batch: Passages) -> Tensor:
        logits = model(batch["inputs"]).transpose(1, 2)
        return F.cross_entropy(logits, batch["targets"], ignore_index=PADDING)


def _pretrained(problem: Verses) -> Mapping[str, Tensor]:
    """Weights after pretraining, in 16 bits.

    They are shipped beside the truth: every retraining begins with them, and no two machines train the same ones.
    """
    file = SHIPPED / f"pretrained-{problem.pretraining}-{problem.width}.safetensors"
    if not file.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = problem.untrained()
        problem.pretrain(model)
        file.parent.mkdir(exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        save_file({name: weight.half() for name, weight in model.state_dict().items()}, unfinished)
        unfinished.replace(file)
    return {name: weight.float() for name, weight in load_file(file).items()}


PROBLEMS: Mapping[str, Problem] = {
    "images": Images(),
    "small": Small(),
    "small-adam": SmallAdam(),
    "convolutions": Convolutions(),
    "verses": Verses(),
    "finetuning": Verses(samples=400, lr=1e-3, pretraining=800),
}

SHOWN = ("images", "convolutions", "verses", "finetuning")
"""Those of the README's table; the small ones are for estimators that carry derivatives through every step."""
