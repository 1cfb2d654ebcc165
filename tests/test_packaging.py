"""What is on disk is what is installed: an editable install would hide a package that the wheel lacks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = (".py", ".yaml", ".j2", "py.typed")
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
KEPT_FOLDERS = {"logix_like", "integrations", "configs", "examples"}

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]


def _package_folders() -> dict[str, Path]:
    """Every package on disk by its installed name."""
    roots = {"logix_like": ROOT / "logix_like"} | {name: ROOT / folder for name, folder in MAPPED.items()}
    return {
        ".".join((name, *init.parent.relative_to(folder).parts)): init.parent
        for name, folder in roots.items()
        for init in folder.rglob("__init__.py")
    }


def _shipped_files() -> set[str]:
    """Every file that an installation must hold, by its installed path."""
    return {
        f"{name.replace('.', '/')}/{path.name}"
        for name, folder in _package_folders().items()
        for path in folder.iterdir()
        if path.name.endswith(SHIPPED)
    }


def test_the_package_list_equals_the_folders_on_disk() -> None:
    assert PROJECT["tool"]["setuptools"]["packages"] == sorted(_package_folders())


@pytest.mark.parametrize("folder", sorted(KEPT_FOLDERS))
def test_every_folder_with_shipped_files_is_a_package(folder: str) -> None:
    packages = set(_package_folders().values())
    for path in (ROOT / folder).rglob("*"):
        if path.name.endswith(SHIPPED):
            assert path.parent in packages, f"{path.relative_to(ROOT)} stands in a folder without __init__.py"


def test_every_extra_but_the_gpu_is_in_all_or_for_developers() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    (everything,) = extras["all"]
    named = set(everything.partition("[")[2].rstrip("]").split(","))
    assert named == set(extras) - {"all", "gpu", "test"}


def test_the_two_faiss_packages_never_meet() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    together = [extra for extra in extras if "faiss-gpu" in str(extras[extra]) and "faiss-cpu" in str(extras[extra])]
    assert not together
    assert "faiss" not in str(PROJECT["project"]["dependencies"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution as an index would hold it."""
    checkout, out = tmp_path_factory.mktemp("checkout") / "logix_like", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, checkout, ignore=NOT_COPIED)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(checkout)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.wheel
@pytest.mark.timeout(300)
def test_the_wheel_holds_every_module_preset_and_template(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert held == _shipped_files()
    assert licences


@pytest.mark.wheel
@pytest.mark.timeout(300)
def test_the_wheel_imports_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    python = _clean_environment(tmp_path / "env")
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-index",
        "-q",
    ]
    subprocess.run([*install, str(wheel)], check=True)
    code = (
        "import logix_like, logix_like.integrations, logix_like.examples\n"
        "from logix_like.config import load_config\n"
        "load_config('language_model'), load_config('vision')\n"
        "print(logix_like.__version__, logix_like.__file__)"
    )
    done = subprocess.run([python, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version, place = done.stdout.split()
    assert version == wheel.name.split("-")[1]
    assert Path(place).is_relative_to(tmp_path)


def _clean_environment(folder: Path) -> Path:
    """A new environment that borrows this one's dependencies, but not its editable install."""
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    purelib = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(folder)}))
    # A folder that a .pth file names is searched, but .pth files in it (the editable install) are not read.
    folders = [path for path in sys.path if Path(path).name == "site-packages"]
    (purelib / "dependencies.pth").write_text("\n".join(folders))
    return Path(sysconfig.get_path("scripts", "venv", vars={"base": str(folder)})) / Path(sys.executable).name
