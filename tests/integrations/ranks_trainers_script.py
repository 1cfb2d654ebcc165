"""What each process of test_trainers_in_two_processes.py runs: ``ranks_trainers_script.py <root> <trainer>``.

Imported, it trains in one process, with batches as large as those of all processes together.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DistributedSampler

import logix_like as logix

SAMPLES = 12
"""A whole number of batches of 2 for each of two processes."""


class Dealt:
    """Batches of 4: those of 2 that two processes get, put together."""

    epoch = -1

    def __len__(self) -> int:
        return SAMPLES // 4

    def __iter__(self) -> Iterator[list[int]]:
        self.epoch += 1
        shares: list[Any] = []
        for rank in range(2):
            sampler: Any = DistributedSampler(range(SAMPLES), 2, rank)
            sampler.set_epoch(self.epoch)
            shares.append(list(sampler))
        for first in range(0, SAMPLES // 2, 2):
            yield [index for share in shares for index in share[first : first + 2]]


def by_huggingface(root: Path, processes: int) -> logix.Run:
    """Two epochs, shuffled, with accumulation."""
    from tests.integrations import sentences as s

    callback = s.trained(
        root, s.llama(), s.sentences(SAMPLES), learning_rate=1e-2, seed=3, optim="sgd",
        per_device_train_batch_size=4 // processes, gradient_accumulation_steps=2,
    )  # fmt: skip
    return callback.run


def by_lightning(root: Path, processes: int, broken: bool = False) -> logix.Run:
    """Two epochs, shuffled, as Lightning deals them out to the processes; the second may break off."""
    import lightning
    from logix_like.integrations.lightning import LogixCallback
    from torch.utils.data import DataLoader, Subset

    from tests.integrations.test_lightning import IDENTITY, Classifier

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Breaking(Classifier):
        def training_step(self, batch: Any, number: int) -> Any:
            if broken and number == 2 and self.global_rank == 1:
                raise RuntimeError("broken")
            return self.loss(batch)

    callback = LogixCallback("run", root=root, verbose=False, **IDENTITY)
    module = Breaking(lr=0.1)
    data: Any = Subset(module.dataset, range(SAMPLES))
    loader: Any = DataLoader(data, batch_size=2) if processes > 1 else DataLoader(data, batch_sampler=Dealt())
    trainer = lightning.Trainer(
        default_root_dir=root, max_epochs=2, accelerator="cpu", devices=processes, callbacks=[callback], logger=False,
        strategy="ddp" if processes > 1 else "auto", enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    return callback.run


TRAINERS = {"huggingface": by_huggingface, "lightning": by_lightning}

if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if sys.argv[2] == "broken":
        by_lightning(Path(sys.argv[1]), 2, broken=True)
    TRAINERS[sys.argv[2]](Path(sys.argv[1]), 2)
    sys.stdout.flush()
    os._exit(0)  # torch's own threads were seen to abort the interpreter's exit; all that is tested has been written
