"""Curvature gathered during a training: against dense truths, over a kill, and without a trace in the training."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import logix_like as logix
from logix_like.capture.selection import select_modules
from logix_like.curvature import Curvature, fit_curvature, save_curvature, stream
from logix_like.curvature.gradients import Gradients
from logix_like.curvature.stream import CurvatureStream
from logix_like.curvature.sweep import Sweep
from logix_like.errors import ConfigError, StatisticsError, StoreDamagedError, StoreNotFoundError
from logix_like.estimators import EKFAC
from logix_like.objective import Objective
from logix_like.store import repair, verify
from logix_like.store.format.tensors import write_tensors
from tests.curvature.cases import dense_gradients
from tests.models import BATCH, ZOO, Case, build

Data = list[tuple[Tensor, Tensor]]
GATHERED = {"statistics": ["curvature"], "store": {"dtype": "float64"}, "verbose": False}


@pytest.fixture(autouse=True)
def every_block(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(stream, "EVERY", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def data(count: int = 8) -> Data:
    return [(torch.randn(5, 5, dtype=torch.float64), torch.randint(3, (5,))) for _ in range(count)]


def trained(run: logix.Run, model: nn.Module, batches: Data, rate: float = 0.0, scale: float = 1.0) -> None:
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for x, y in batches:
        with run(data_id=range(len(y)), scale=scale):
            (scale * nn.functional.cross_entropy(model(x), y)).backward()
        optimizer.step()
        optimizer.zero_grad()


def gathered(root: Path, model: nn.Module, batches: Data, **options: float) -> Curvature:
    with logix.init("run", model, root=str(root), **GATHERED) as run:
        trained(run, model, batches, **options)
    return logix.load(root / "run", model).curvature("training")


def dense(curvature: Curvature, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """By block the mean square of ``gradients``' coordinates."""
    return {name: found.square().mean(0) for name, found in curvature.rotate(gradients).items()}


def close(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 1e-9) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(values, b[name], rtol=rtol) for name, values in a.items())


def test_basis_and_eigenvalues_are_those_of_a_fit_to_the_blocks_that_gave_them(tmp_path: Path) -> None:
    model, batches = network(), data(4)
    # At resting weights: blocks 1 and 3 give factors (a basis of 5, then of 10 samples), 2 and 4 eigenvalues.
    found = gathered(tmp_path, model, batches, scale=0.25)
    assert (found.fisher.labels, found.fisher.samples) == ("empirical", 20)
    fitted = fit_curvature(model, batches[::2], kind="kfac", labels="empirical", progress=False)
    sweep = Sweep(model, Objective(), select_modules(model))
    for name, bases in found.bases.items():
        for mine, theirs in zip(bases, fitted.bases[name], strict=True):
            assert torch.allclose((mine.parts[0].T @ theirs.parts[0]).abs(), torch.eye(mine.width).double(), atol=1e-6)
    first, second = (gradients_of(sweep, batch) for batch in batches[1::2])
    old = fit_curvature(model, batches[:1], kind="kfac", labels="empirical", progress=False)
    for name, values in found.eigenvalues.items():
        carried = dense_diagonal(old, dense(old, first)[name], found, name)
        assert torch.allclose(values, (carried + dense(found, second)[name]) / 2, rtol=1e-6, atol=1e-12)


def gradients_of(sweep: Sweep, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    sink = Gradients()
    sweep.run(batch, Objective().losses, sink)
    return sink.blocks


def dense_diagonal(old: Curvature, values: Tensor, new: Curvature, name: str) -> Tensor:
    """``values`` on the diagonal of the old basis, as a dense matrix seen in the new one."""
    inward, outward = ([c.bases[name][side].parts[0] for c in (old, new)] for side in (0, 1))
    before, after = (torch.kron(outward[i], inward[i]) for i in (0, 1))
    return (after.T @ before @ values.flatten().diag() @ before.T @ after).diagonal().view(values.shape)


def test_the_mean_is_over_the_steps_each_at_its_own_weights(tmp_path: Path) -> None:
    model, batches = network(), data(4)
    twin = copy.deepcopy(model)
    found = gathered(tmp_path, model, batches, rate=0.5)
    sweep, optimizer = Sweep(twin, Objective(), select_modules(twin)), torch.optim.SGD(twin.parameters(), 0.5)
    total = dict.fromkeys(found.layout.names, 0.0)
    for number, (x, y) in enumerate(batches):
        if number % 2:  # the trace is the same in every basis
            for name, blocks in gradients_of(sweep, (x, y)).items():
                total[name] += float(blocks.square().sum()) / 10
        nn.functional.cross_entropy(twin(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, values in found.eigenvalues.items():
        assert float(values.sum()) == pytest.approx(total[name], rel=1e-10)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_run_that_goes_on_after_a_kill_ends_with_the_same(tmp_path: Path) -> None:
    model, batches = network(), data()
    whole = gathered(tmp_path / "whole", model, batches)
    with logix.init("run", model, root=str(tmp_path / "first"), **GATHERED) as killed:
        trained(killed, model, batches[:5])
        killed.commit()
        shutil.copytree(tmp_path / "first", tmp_path / "left")  # what a kill leaves
        trained(killed, model, batches[5:6])
    assert logix.load(tmp_path / "left" / "run").curvature("training").fisher.samples == 25  # as it stood
    with logix.init("run", model, root=str(tmp_path / "left"), resume=True, **GATHERED) as run:
        trained(run, model, batches[5:])
    found = run.curvature("training")
    assert found.fisher == whole.fisher and close(found.eigenvalues, whole.eigenvalues)


def test_rows_and_answers_are_as_without_it(tmp_path: Path) -> None:
    model, batches = network(), data()
    rows = []
    for statistics in (["curvature", "covariance"], ["covariance"]):
        settings: dict[str, Any] = {**GATHERED, "statistics": statistics}
        with logix.init("run", model, root=str(tmp_path), overwrite=True, **settings) as run:
            trained(run, model, batches)
        rows.append(torch.as_tensor(run.store.gradients[:]))
    assert torch.equal(*rows)
    with pytest.raises(StoreNotFoundError, match=r"finalize\(\) writes it .* or fit a curvature first"):
        run.curvature("training")


def test_estimators_take_it_with_the_modules_it_has(tmp_path: Path) -> None:
    model, batches = network(), data()
    settings = {**GATHERED, "modules": {"include": ["2"]}}
    with logix.init("run", model, root=str(tmp_path), **settings) as run:
        trained(run, model, batches)
    scores = EKFAC(model, batches, curvature=run.curvature("training"), progress=False).module_scores(batches[0])
    assert set(scores) == {"2"}


def test_blocks_that_fail_or_overflow_count_for_nothing(tmp_path: Path) -> None:
    model, batches = network(), data()
    clean = gathered(tmp_path / "clean", model, batches)
    with logix.init("run", model, root=str(tmp_path), **GATHERED) as run:
        for number, batch in enumerate(batches):
            trained(run, model, [batch])
            for at in ("backward", "behind it"):
                with pytest.raises(RuntimeError, match="stop"), run(data_id=range(5)):
                    hidden = model[0](batch[0])
                    if at == "backward":
                        hidden.register_hook(stop)
                    nn.functional.cross_entropy(model[1:](hidden), batch[1]).backward()
                    stop()
            if number == 2:
                with run(data_id=range(5)):
                    (nn.functional.cross_entropy(model(batch[0]), batch[1]) * float("inf")).backward()
            model.zero_grad()
    found = run.curvature("training")
    assert found.fisher == clean.fisher and close(found.eigenvalues, clean.eigenvalues)


def stop(*_: object) -> None:
    raise RuntimeError("stop")


def test_a_module_called_more_often_than_before_costs_one_block() -> None:
    model = network()
    followed = CurvatureStream(select_modules(model), Path("nowhere"))
    for times in (1, 1, 1, 1, 1, 2, 2):  # factors and eigenvalues in turn; the block left out is made up for
        look = followed.look(5)
        assert look is not None
        with look:
            sum(model(x).square().sum() for x, _ in data(times)).backward()
        followed.take(look, 1.0)
    curvature = followed.curvature()
    assert curvature is not None and curvature.fisher.samples == 30


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_over_the_zoo_its_trace_is_that_of_the_gradients(case: Case) -> None:
    model, batch = build(case)
    followed = CurvatureStream(select_modules(model, types=case.types, **case.options), Path("nowhere"))
    for _ in range(3):
        look = followed.look(BATCH, batch.get("mask"))
        assert look is not None
        with look:
            case.losses(model, batch).sum().backward()
        followed.take(look, 1.0)
    curvature = followed.curvature()
    assert curvature is not None
    for name, gradients in dense_gradients(case, model, batch, curvature.layout).items():
        expected = float(gradients.square().flatten(1).sum(1).mean())
        assert float(curvature.eigenvalues[name].sum()) == pytest.approx(expected, rel=1e3 * case.tolerance, abs=1e-20)


def test_few_blocks_are_looked_at_and_none_alike_in_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "EVERY", 8)
    followed = CurvatureStream(select_modules(network()), Path("nowhere"))
    looked = [number for number in range(8000) if followed.look(5) is not None]
    assert looked[:2] == [0, 1] and abs(len(looked) - 1000) < 100
    assert len({number % 64 for number in looked}) == 64  # epochs of 64 blocks: each of them is seen some time


def test_what_is_refused(tmp_path: Path) -> None:
    model = network()
    with pytest.raises(ConfigError, match="is an object store, and a curvature is kept in a file"):
        logix.init("run", model, store={"url": "memory://here"}, statistics=["curvature"], verbose=False)
    gathered(tmp_path, model, data())
    file = tmp_path / "run" / "curvature" / "training.safetensors"
    broken = bytearray(file.read_bytes())
    broken[-9] ^= 1
    file.write_bytes(broken)
    with pytest.raises(StoreDamagedError, match="or delete it"):
        logix.init("run", model, root=str(tmp_path), resume=True, **GATHERED)


def test_verify_finds_any_flipped_bit_and_repair_takes_the_curvature_out(tmp_path: Path) -> None:
    model, batches = network(), data()
    gathered(tmp_path, model, batches)
    store = tmp_path / "run"
    folder = store / "curvature"
    (folder / "default.partial").mkdir()
    sums = write_tensors(folder / "default.partial" / "factors.safetensors", {"a": torch.ones(2)}, {"batches": 1})
    assert verify(store).ok
    for file in (folder / "training.safetensors", sums):
        content = file.read_bytes()
        ends = range(0, len(content), max(1, len(content) // 40))
        for byte in {*ends, 0, 8, len(content) - 1}:
            flipped = bytearray(content)
            flipped[byte] ^= 1 << byte % 8
            file.write_bytes(flipped)
            assert [damage.file for damage in verify(store).damages] == [file], byte
        assert repair(store).ok and not file.exists()
    with logix.init("run", model, root=str(tmp_path), resume=True, **GATHERED) as run:
        trained(run, model, batches)
    assert run.curvature("training").fisher.samples == 40


def test_a_fitted_curvature_is_neither_put_in_its_place_nor_gone_on_with(tmp_path: Path) -> None:
    model, batches = network(), data()
    with logix.init("run", model, root=str(tmp_path), **GATHERED) as run:
        trained(run, model, batches)
        with pytest.raises(ConfigError, match="'training' is the name of the curvature that"):
            run.fit_curvature(batches, name="training", progress=False)
    fitted = fit_curvature(model, batches, progress=False)
    save_curvature(fitted, tmp_path / "run" / "curvature" / "training.safetensors")
    with pytest.raises(StatisticsError, match="was fitted, which a training cannot go on with"):
        logix.init("run", model, root=str(tmp_path), resume=True, **GATHERED)


class TwoReaders(nn.Module):
    """Two modules of one input, of which the second is called only from some time on."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.both = nn.Linear(4, 3), nn.Linear(4, 3), False

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.q(x) + (self.k(x) if self.both else 0)
        return found.square().sum()


def test_a_module_that_joins_another_s_input_later_leaves_its_eigenvalues_alone() -> None:
    model = TwoReaders().double()
    followed = CurvatureStream(select_modules(model), Path("nowhere"))
    for model.both in (False, True):
        x = torch.randn(6, 4, dtype=torch.float64)
        look = followed.look(6)
        assert look is not None
        with look:
            model(x).backward()
        followed.take(look, 1.0)
    found = followed.curvature()
    assert found is not None
    outputs = 2 * (model.q(x) + model.k(x)).detach()
    gradients = torch.einsum("no,ni->noi", outputs, nn.functional.pad(x, (0, 1), value=1.0))
    assert close(found.eigenvalues, dense(found, {"q": gradients, "k": gradients}))


def test_commits_in_a_row_write_it_once_and_the_end_writes_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def noted(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> Path:
        written.append(path)
        return write_tensors(path, tensors, about)

    monkeypatch.setattr(stream, "write_tensors", noted)
    model, batches = network(), data()
    with logix.init("run", model, root=str(tmp_path), **GATHERED) as run:
        for batch in batches:
            trained(run, model, [batch])
            run.commit()
        assert len(written) == 1
    assert len(written) == 2 and run.curvature("training").fisher.samples == 40
    with logix.init("run", model, root=str(tmp_path), resume=True, **GATHERED) as run:
        trained(run, model, batches)
        run.commit()
        assert len(written) == 2


def test_a_run_that_goes_on_without_it_says_so(tmp_path: Path) -> None:
    model, batches = network(), data()
    gathered(tmp_path, model, batches)
    settings = {**GATHERED, "statistics": ["covariance"]}
    with pytest.warns(RuntimeWarning, match="gathered a curvature in training, which is not gone on with: add"):
        run = logix.init("run", model, root=str(tmp_path), resume=True, **settings)
    with run:
        trained(run, model, batches)
    assert run.curvature("training").fisher.samples == 40


def test_nothing_of_it_is_written_before_there_are_rows(tmp_path: Path) -> None:
    model, batches = network(), data()
    settings: dict[str, Any] = {**GATHERED, "projection": {"init": "pca", "warmup": 1000}}
    with logix.init("run", model, root=str(tmp_path), **settings) as run:
        trained(run, model, batches)
        run.commit()
        assert not (tmp_path / "run" / "curvature").exists()
    assert run.curvature("training").fisher.samples == 40
