"""How logging goes, as numbers for whatever logger the training has.

scalars = ScalarLog(run)
...
if step % 100 == 0:
wandb_run.log(scalars.read())  # Weights & Biases
trainer.log(scalars.read())    # Hugging Face
self.log_dict(scalars.read())  # Lightning
for name, value in scalars.read().items():
writer.add_scalar(name, value, step)  # TensorBoard
"""

from __future__ import annotations

import time

import torch

from logix_like.errors import CaptureError
from logix_like.run.run import Run

QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}


class ScalarLog:
    """Reads off a run how its logging goes; training does not notice.

    Args:
        run: A run that logs.
        prefix: What the names begin with.
    """

    def __init__(self, run: Run, prefix: str = "logix_like/") -> None:
        self._run = run
        self._prefix = prefix
        self._store = run.store
        self._last = (time.monotonic(), len(self._store))

    def read(self) -> dict[str, float]:
        """Committed rows, rows a second since the last reading, and quantiles of the last block's gradient norms.

        The norms are those of the stored, projected rows; there are none before the first block has ended.
        """
        now, rows = time.monotonic(), len(self._store.refresh())
        before, known = self._last
        self._last = (now, rows)
        found = {"rows": float(rows), "rows_per_second": (rows - known) / max(now - before, 1e-9)}
        return {self._prefix + name: value for name, value in (found | self._norms()).items()}

    def _norms(self) -> dict[str, float]:
        try:
            gradients = self._run.get_log().gradients
        except CaptureError:
            return {}
        norms = torch.linalg.vector_norm(gradients.detach().float(), dim=1)
        norms = norms[norms.isfinite()]
        if not len(norms):
            return {}
        return {f"gradient_norm_{name}": float(norms.quantile(share)) for name, share in QUANTILES.items()}
