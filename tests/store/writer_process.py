"""A process that writes to a store, to be killed or to end without a word."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from logix_like.store import Place

SCRIPT = """
import sys, torch
from logix_like.store import as_place
from tests.store.store_runs import WIDTH, batches, writer
store, mode = as_place(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
rows = torch.arange(2000.0).unsqueeze(1).expand(2000, WIDTH).contiguous()
out = writer(store, queue_mib=0.01)
for number, batch in enumerate(batches(rows, size=7)):
    out.put(batch)
    if mode == "kill" and number % 3 == 0:
        print(out.commit(), flush=True)
    if mode == "exit" and number == 20:
        sys.exit(3)
"""


def start(store: Place, mode: str) -> subprocess.Popen[str]:
    """Run the script above in a process of its own."""
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(store), mode],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
