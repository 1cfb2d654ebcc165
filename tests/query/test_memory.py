"""The memory of a container counts, not that of the machine it stands on."""

from __future__ import annotations

from pathlib import Path

import pytest

from logix_like.query.memory import allowed_memory

MACHINE = allowed_memory(Path("nowhere"), Path("nowhere"))
LIMIT = 2**20


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/a/b\n", {"a/b/memory.max": str(LIMIT), "memory.max": "max"}),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": f"{LIMIT}\n"}),
        ("0::/not/seen/from/inside\n", {"memory.max": str(LIMIT)}),
        ("0::/\n", {"memory.max": str(LIMIT)}),
        ("5:cpu:/x\n4:cpuacct,memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": str(LIMIT)}),
        ("4:memory:/a\n", {"memory/memory.limit_in_bytes": str(LIMIT), "memory/a/memory.limit_in_bytes": str(2**63)}),
    ],
)
def test_the_smallest_limit_holds(tmp_path: Path, groups: str, files: dict[str, str]) -> None:
    (tmp_path / "groups").write_text(groups)
    for name, text in files.items():
        file = tmp_path / "limits" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert allowed_memory(tmp_path / "groups", tmp_path / "limits") == LIMIT


@pytest.mark.parametrize("groups", ["", "nonsense", "0::/a\n", "5:cpu:/a\n"])
def test_without_a_limit_it_is_the_machines(tmp_path: Path, groups: str) -> None:
    (tmp_path / "groups").write_text(groups)
    (tmp_path / "memory.max").write_text("max\n")
    assert MACHINE is not None and MACHINE > 2**28
    assert allowed_memory(tmp_path / "groups", tmp_path) == MACHINE
