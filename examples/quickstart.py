"""Log a training run with three lines, then ask which images mattered and which labels are wrong.

A small network learns to read digits from 4,000 images, one in ten of them labelled wrongly on purpose. Run it with
``logix-like demo`` or ``python examples/quickstart.py``.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from logix_like.examples.images import Digits, load_digits, side_by_side
from logix_like.examples.measuring import auroc, compare_steps
from torch import Tensor, nn

import logix_like as logix


@dataclass(frozen=True)
class Settings:
    """Size of the demo; a test makes it smaller."""

    training: int = 4000
    wrong: float = 0.1
    width: int = 1024
    epochs: int = 3
    batch: int = 50
    measured_steps: int = 40
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What the demo found."""

    store: str | None
    """Where the rows are; None if they were removed."""
    rows: int
    seconds: float
    """Of training and logging."""
    accuracy: float
    """On the test images."""
    wrong_labels_auroc: float
    """How well self-influence finds the labels that were made wrong."""


def network(pixels: int, width: int) -> nn.Module:
    """Three layers, nothing special."""
    return nn.Sequential(
        nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, width // 4), nn.ReLU(), nn.Linear(width // 4, 10)
    )


def train(model: nn.Module, data: Digits, settings: Settings, root: Path, overwrite: bool) -> logix.Run:
    """An ordinary loop, with three lines that log it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = logix.init(  # line 1: what is tracked, and where rows go
        "demo", model, optimizer=optimizer, root=root, overwrite=overwrite, projection={"rank": 16}
    )
    for epoch in range(settings.epochs):
        run.epoch(epoch)
        for ids in torch.randperm(len(data.images)).split(settings.batch):
            with run(data_id=ids):  # line 2: around forward and backward
                loss = F.cross_entropy(model(data.images[ids]), data.labels[ids])
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    run.finalize()  # line 3: everything is on disk
    return run


def explain(run: logix.Run, model: nn.Module, data: Digits) -> None:
    """Ask which training images made the model read some test images as it did."""
    answers = model(data.test_images).argmax(1)
    wrong, right = (torch.nonzero((answers == data.test_labels) == good).flatten() for good in (False, True))
    asked = torch.cat([wrong[:2], right[:1]])
    with run.query(data_id=[f"test {i}" for i in asked.tolist()]) as query:
        F.cross_entropy(model(data.test_images[asked]), answers[asked]).backward()
    result = run.compute_influence_all(query, k=4)
    top, bottom = result.proponents(), result.opponents()
    print("\nA positive score: training on that image lowered the loss of the answer; a negative one: it raised it.")
    for place, i in enumerate(asked.tolist()):
        verdict = "rightly" if answers[i] == data.test_labels[i] else "wrongly"
        print(f"\nTest image {i} shows a {data.test_labels[i]}; it was {verdict} read as a {answers[i]}.")
        print(f"  {'for that answer (proponents)':<52}against it (opponents)")
        for n in range(result.held):
            pair = [f"{r.scores[place, n]:+5.0f}  {data.describe(r.ids[place, n])}" for r in (top, bottom)]
            print(f"  {pair[0]:<52}{pair[1]}")
        shown = [data.test_images[i], data.images[top.ids[place, 0]], data.images[bottom.ids[place, 0]]]
        print(side_by_side(shown, ["the test image", "first proponent", "first opponent"]))


def find_wrong_labels(run: logix.Run, model: nn.Module, data: Digits) -> float:
    """Rank training images by self-influence: what only an image itself could teach comes first; returns the AUROC."""
    result = run.compute_self_influence()
    flipped = data.flipped[torch.tensor(result.data_id.tolist())]
    order = result.scores.argsort(descending=True)
    print(f"\n{int(flipped.sum())} of {len(flipped)} labels were made wrong. Ranked by self-influence,")
    for share in (0.05, 0.1):
        found = flipped[order[: int(share * len(flipped))]].float().mean()
        print(f"  {found:.0%} of the first {share:.0%} of the images are labelled wrongly")
    found_by: float = auroc(result.scores, flipped)
    print(f"  AUROC {found_by:.3f} (chance is 0.500)")
    with torch.no_grad():
        losses = F.cross_entropy(model(data.images), data.labels, reduction="none")
    print(f"  For comparison, the final loss alone has {auroc(losses, data.flipped):.3f}: labels wrong at random are")
    print("  easy for it, but it cannot say which images are behind an answer.")
    return found_by


def step_of(model: nn.Module, data: Digits, run: logix.Run | None) -> Callable[[Tensor], None]:
    """One training step, logged if there is a run."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(ids: Tensor) -> None:
        with nullcontext() if run is None else run(data_id=ids):
            F.cross_entropy(model(data.images[ids]), data.labels[ids]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_overhead(model: nn.Module, data: Digits, settings: Settings, root: Path) -> None:
    """Time plain and logged steps of two copies of the model, in turn."""
    plain, logged = copy.deepcopy(model), copy.deepcopy(model)
    batches = torch.randint(len(data.images), (settings.measured_steps, settings.batch))
    with logix.init("measured", logged, root=root, projection={"rank": 16}, verbose=False) as run:
        overhead = compare_steps(step_of(plain, data, None), step_of(logged, data, run), batches)
    print(f"Overhead: {overhead}.")
    print("  The wider the layers, the smaller the share of a step that logging takes.")


def main(root: Path | None = None, *, overwrite: bool = False, settings: Settings | None = None) -> Outcome:
    """Train, ask, measure; the store stays in ``root``, or is removed at the end without one."""
    settings = settings or Settings()
    torch.set_num_threads(1)  # steps this small gain little by a second thread, and lose much on a busy machine
    torch.manual_seed(settings.seed)
    data = load_digits(settings.training, settings.wrong, torch.Generator().manual_seed(settings.seed))
    model = network(data.images.shape[1], settings.width)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        start = time.perf_counter()
        run = train(model, data, settings, root or Path(scratch), overwrite)
        seconds = time.perf_counter() - start
        right = (model(data.test_images).argmax(1) == data.test_labels).float().mean()
        print(f"Trained and logged in {seconds:.1f} s; {right:.1%} of the test images are read rightly.")
        explain(run, model, data)
        found_by = find_wrong_labels(run, model, data)
        store = run.store
        print(f"\nLogged: {len(store):,} rows, one for each image and epoch, of {store.modules.width} numbers from")
        print(f"  {len(store.modules)} modules; {sum(store.bytes.values()) / 1e6:.1f} MB in {store.path}.")
        measure_overhead(model, data, settings, Path(scratch))
        return Outcome(None if root is None else str(store.path), len(store), seconds, float(right), found_by)


if __name__ == "__main__":
    try:
        main()
    except logix.LogixError as error:
        sys.exit(f"error: {error}")
