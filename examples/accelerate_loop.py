"""A loop of one's own with accelerate: gradient accumulation and mixed precision in the same three lines.

Run it with ``python examples/accelerate_loop.py [folder]``, with mixed precision as accelerate is configured.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import logix_like as logix


def digits(count: int) -> TensorDataset:
    """Images ``[count, 64]`` of handwritten digits, their labels, and their numbers for ids."""
    data, labels = load_digits(return_X_y=True)
    images = torch.tensor(data[:count] / 16, dtype=torch.float32)
    return TensorDataset(images, torch.tensor(labels[:count]), torch.arange(count))


def network() -> nn.Module:
    """Two layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def main(folder: Path, count: int = 1500, epochs: int = 3, accumulated: int = 2, **changes: Any) -> logix.Run:
    """Train and log; the run answers queries afterwards."""
    accelerator = Accelerator(gradient_accumulation_steps=accumulated)
    model, loader = network(), DataLoader(digits(count), batch_size=25, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    # The plain model and optimizer are logged: accelerate may wrap the ones that it gives back.
    run = logix.init("digits", model, root=folder, optimizer=optimizer, overwrite=True, **changes)
    wrapped, stepper, loader = accelerator.prepare(model, optimizer, loader)
    for epoch in range(epochs):
        run.epoch(epoch)
        for images, labels, ids in loader:
            with accelerator.accumulate(wrapped):
                # backward() divides by the accumulated batches and multiplies by the scaler, if there is one
                with run(data_id=ids, scale=1 / accumulated, scaler=accelerator.scaler):
                    loss: Tensor = F.cross_entropy(wrapped(images), labels)
                    accelerator.backward(loss)
                stepper.step()
                stepper.zero_grad()
    run.finalize()
    return run


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()))
