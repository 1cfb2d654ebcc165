"""Fits that are interrupted, kept, damaged, sampled, masked; and curvatures where Kronecker factors are exact."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader

import logix_like as logix
from logix_like.capture.selection import select_modules
from logix_like.curvature import Curvature, fit_curvature, load_curvature, partial, save_curvature
from logix_like.curvature.fitting import default_selection
from logix_like.curvature.gradients import Gradients
from logix_like.curvature.sweep import Sweep
from logix_like.errors import (
    CaptureError,
    ConfigError,
    StatisticsError,
    StoreDamagedError,
    StoreError,
    StoreNotFoundError,
)
from logix_like.objective import Categorical, Gaussian, Objective
from logix_like.store import verify
from logix_like.store.format.tensors import write_tensors

Data = list[tuple[Tensor, Tensor]]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def data(samples: int = 20, batch: int = 5) -> Data:
    x, y = torch.randn(samples, 5, dtype=torch.float64), torch.randint(3, (samples,))
    return list(zip(x.split(batch), y.split(batch), strict=True))


def same(a: Curvature, b: Curvature) -> bool:
    return a.kind == b.kind and all(
        torch.allclose(values, b.eigenvalues[name], rtol=1e-12) for name, values in a.eigenvalues.items()
    )


class InterruptedFitError(Exception):
    """What stops a loader."""


@dataclass
class Stopping:
    """Batches, until enough have been yielded in all."""

    batches: Data
    left: int

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            if self.left == 0:
                raise InterruptedFitError
            self.left -= 1
            yield batch


@pytest.mark.parametrize("after", [0, 2, 4, 5, 7])
def test_an_interrupted_fit_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    monkeypatch.setattr(partial, "SAVE_SECONDS", 0.0)
    model, batches = network(), data()
    whole = fit_curvature(model, batches, progress=False)
    folder = tmp_path / "partial"
    with pytest.raises(InterruptedFitError):
        fit_curvature(model, Stopping(batches, after), resume_from=folder, progress=False)
    resumed = fit_curvature(model, batches, resume_from=folder, progress=False)
    assert same(whole, resumed)
    assert not folder.exists()


def test_another_fit_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial, "SAVE_SECONDS", 0.0)
    model, batches = network(), data()
    for stop in (2, 6):
        with pytest.raises(InterruptedFitError):
            fit_curvature(model, Stopping(batches, stop), resume_from=tmp_path, progress=False)
        with pytest.raises(StatisticsError, match="half-finished fit with labels 'sampled'"):
            fit_curvature(model, batches, labels="empirical", resume_from=tmp_path, progress=False)


def test_only_its_own_files_are_taken_away(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights of years")
    fit_curvature(network(), data(), resume_from=tmp_path, progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(ConfigError, match=r"resume_from is .*model.safetensors, a file; it must be a folder"):
        fit_curvature(network(), data(), resume_from=tmp_path / "model.safetensors", progress=False)


def test_a_fit_of_other_modules_or_other_batches_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "SAVE_SECONDS", 0.0)
    model, batches = network(), data()
    with pytest.raises(InterruptedFitError):
        fit_curvature(model, Stopping(batches, 2), resume_from=tmp_path, progress=False)
    first = select_modules(model, types=("Linear",), include=["0"])
    with pytest.raises(StatisticsError, match="half-finished fit with modules '2 modules"):
        fit_curvature(model, Stopping(batches, 8), selection=first, resume_from=tmp_path, progress=False)
    with pytest.raises(StatisticsError, match="half-finished fit with batches 4, and this one has 2"):
        fit_curvature(model, batches[:2], resume_from=tmp_path, progress=False)


def test_a_generator_is_spent_after_one_pass() -> None:
    model, batches = network(), data()
    with pytest.raises(StatisticsError, match="saw 20 samples and the second 0: EK-FAC needs the same ones twice"):
        fit_curvature(model, (batch for batch in batches), progress=False)
    assert same(
        fit_curvature(model, (batch for batch in batches), kind="kfac", progress=False),
        fit_curvature(model, batches, kind="kfac", progress=False),
    )


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    curvature = fit_curvature(network(), data(), widest=3, progress=False)
    loaded = load_curvature(save_curvature(curvature, tmp_path / "c.safetensors"))
    assert same(curvature, loaded)
    assert loaded.layout == curvature.layout
    assert loaded.fisher == curvature.fisher
    vectors = {block.name: torch.randn(2, *block.shape, dtype=torch.float64) for block in curvature.layout}
    for name, applied in curvature.apply(lambda _, values: values.sqrt(), vectors).items():
        assert torch.equal(applied, loaded.apply(lambda _, values: values.sqrt(), vectors)[name])
    assert "ekfac, 2 modules, 57 parameters, sampled labels, 20 samples" in repr(loaded)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    file = save_curvature(fit_curvature(network(), data(), progress=False), tmp_path / "c.safetensors")
    content = bytearray(file.read_bytes())
    for position in (len(content) - 5, len(content) // 2, 40, 3):
        flipped = bytearray(content)
        flipped[position] ^= 4
        file.write_bytes(flipped)
        with pytest.raises(StoreDamagedError, match="fit again"):
            load_curvature(file)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(StoreDamagedError):
        load_curvature(file)
    with pytest.raises(StoreNotFoundError, match="fit a curvature first"):
        load_curvature(tmp_path / "none.safetensors")


def test_a_run_keeps_its_curvature(tmp_path: Path) -> None:
    model, batches = network(), data()
    with logix.init("run", model, root=str(tmp_path), verbose=False) as run:
        for number, (x, y) in enumerate(batches):
            with run(data_id=range(5 * number, 5 * number + 5)):
                nn.functional.cross_entropy(model(x), y).backward()
        fitted = run.fit_curvature(batches, progress=False)
    later = logix.load(tmp_path / "run", model)
    assert same(fitted, later.curvature())
    assert later.curvature().layout.names == later.store.layout.names
    with pytest.raises(StoreNotFoundError):
        later.curvature("other")
    with pytest.raises(ConfigError, match="a curvature's name"):
        later.curvature("../other")
    assert verify(later.path).ok


@dataclass(frozen=True)
class EveryDirection(Gaussian):
    """Draws noise along one output after another, so that a few passes are the exact expectation."""

    outputs_count: int = 3

    def sample(self, outputs: Tensor, targets: Tensor, generator: Generator | None = None) -> Tensor:
        noise = torch.zeros_like(outputs)
        for sample in range(len(outputs)):
            noise[sample, sample % self.outputs_count] = math.sqrt(self.outputs_count)
        return outputs.detach() + noise


def exact_gauss_newton(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """By layer, the block of ``mean_i J_i^T J_i``."""
    parameters = dict(model.named_parameters())

    def outputs(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (sample[None],))[0]

    jacobians = torch.func.vmap(torch.func.jacrev(outputs), (None, 0))(parameters, x)
    return {
        name.removesuffix(".weight"): torch.einsum("nki,nkj->ij", j.flatten(2), j.flatten(2)) / len(x)
        for name, j in jacobians.items()
    }


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_e1_on_deep_linear_networks_the_blocks_are_gauss_newton(kind: str) -> None:
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in ((5, 4), (4, 3), (3, 3)))).double()
    x = torch.randn(8, 5, dtype=torch.float64)
    repeated = x.repeat_interleave(3, 0)  # each sample once with each direction of the noise
    objective = Objective(EveryDirection(), outputs=lambda m, b: m(b), targets=lambda b: b)
    curvature = fit_curvature(model, [repeated], objective, kind=kind, progress=False)
    truth = exact_gauss_newton(model, x)
    for block in curvature.layout:
        inward, outward = (basis.parts[0] for basis in curvature.bases[block.name])
        basis = torch.kron(outward, inward)
        dense = basis @ curvature.eigenvalues[block.name].flatten().diag() @ basis.T
        expected = truth[block.name].detach()
        assert torch.allclose(dense, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


def fisher(model: nn.Module, x: Tensor) -> Tensor:
    """The exact Fisher of the first layer's weight, every label in turn."""
    probabilities = model(x).softmax(-1)
    total = torch.zeros(30, 30, dtype=torch.float64)
    for sample in range(len(x)):
        for label in range(3):
            loss = nn.functional.cross_entropy(model(x[sample : sample + 1]), torch.tensor([label]))
            gradient = torch.autograd.grad(loss, model[0].weight)[0].flatten()
            total += probabilities[sample, label].item() * torch.outer(gradient, gradient) / len(x)
    return total


def dense(curvature: Curvature, name: str) -> Tensor:
    inward, outward = (basis.parts[0] for basis in curvature.bases[name])
    basis = torch.kron(outward, inward)
    return basis @ curvature.eigenvalues[name].flatten().diag() @ basis.T


def test_e2_ekfac_is_never_worse_than_kfac_and_e5_sampling_converges() -> None:
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)).double()
    (x, y) = data(40, 40)[0]
    truth = fisher(model, x)
    errors = {}
    for draws in (1, 10, 200):
        for kind in ("kfac", "ekfac"):
            curvature = fit_curvature(model, [(x, y)] * draws, kind=kind, progress=False)
            errors[kind, draws] = float((dense(curvature, "0") - truth).norm() / truth.norm())
    assert errors["ekfac", 200] < errors["kfac", 200]
    assert errors["ekfac", 200] < errors["ekfac", 1]
    ekfac = fit_curvature(model, [(x, y)] * 400, progress=False)
    assert abs(float(dense(ekfac, "0").trace() / truth.trace()) - 1) < 0.05  # E2'': the trace is the Fisher's
    empirical = fit_curvature(model, [(x, y)], labels="empirical", progress=False)
    assert float((dense(empirical, "0") - truth).norm() / truth.norm()) > errors["ekfac", 200]


def test_e4_damping_is_added_in_the_joint_basis() -> None:
    model, batches = network(), data()
    curvature = fit_curvature(model, batches, kind="kfac", progress=False)
    gradient = torch.randn(1, 6, 6, dtype=torch.float64)
    found = curvature.apply(lambda _, values: 1 / (values + 0.01), {"0": gradient})["0"]
    joint = torch.linalg.solve(
        dense(curvature, "0") + 0.01 * torch.eye(36, dtype=torch.float64), gradient.flatten()
    ).view_as(gradient)
    assert torch.allclose(found, joint, rtol=1e-8)


def test_masked_positions_are_not_counted() -> None:
    embed = torch.randn(4, 6, 5, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([6, 3, 4, 1])[:, None]
    head = nn.Sequential(nn.Linear(5, 3)).double()
    labels = torch.randint(3, (4, 6)).where(mask, -100)
    objective = Objective(outputs=lambda m, b: m(b["x"]), targets=lambda b: b["labels"])
    batch = {"x": embed, "labels": labels, "attention_mask": mask.long()}
    curvature = fit_curvature(head, [batch], objective, labels="empirical", kind="kfac", progress=False)
    kept = torch.cat([embed[mask], torch.ones(int(mask.sum()), 1, dtype=torch.float64)], 1)
    inward = curvature.bases["0"][0].parts[0]
    residual = Categorical().residual(head(embed), labels).detach()[mask]
    a, s = kept.T @ kept / len(kept), residual.T @ residual / 4
    assert torch.allclose((inward.T @ a @ inward).tril(-1), torch.zeros(6, 6, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(curvature.eigenvalues["0"].sum(), a.trace() * s.trace())


def test_a_medium_precision_is_near_and_leaves_torch_as_it_was() -> None:
    model, batches = network().float(), [(x.float(), y) for x, y in data()]
    exact = fit_curvature(model, batches, progress=False)
    near = fit_curvature(model, batches, precision="medium", progress=False)
    assert torch.get_float32_matmul_precision() == "highest"
    for name, values in exact.eigenvalues.items():
        assert abs(float(near.eigenvalues[name].sum() / values.sum()) - 1) < 0.02


def test_what_is_refused() -> None:
    model, batches = network(), data()
    with pytest.raises(ConfigError, match="unknown kind 'full'; known: ekfac, kfac"):
        fit_curvature(model, batches, kind="full", progress=False)
    with pytest.raises(ConfigError, match="unknown labels"):
        fit_curvature(model, batches, labels="true", progress=False)
    for options in ({"widest": 0}, {"seed": -1}, {"seed": 2**40}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))} is .*; it must be a whole number from"):
            fit_curvature(model, batches, progress=False, **options)
    with pytest.raises(ConfigError, match="unknown precision 'low'; known: highest, high, medium"):
        fit_curvature(model, batches, precision="low", progress=False)
    with pytest.raises(StatisticsError, match="not finite"):
        fit_curvature(model, [(x * math.nan, y) for x, y in batches], progress=False)
    reduced = Objective(outputs=lambda m, b: m(b[0]).detach(), targets=lambda b: b[1])
    with pytest.raises(CaptureError, match="no tracked module was called"):
        fit_curvature(model, batches, reduced, progress=False)
    huge = [(x * 1e200, y) for x, y in batches]
    with pytest.raises(StatisticsError, match="not finite"):
        fit_curvature(model, huge, progress=False)


def test_a_seed_draws_its_own_labels_and_the_same_ones_again() -> None:
    model, batches = network(), data()
    first, again, other = (fit_curvature(model, batches, seed=seed, progress=False) for seed in (0, 0, 1))
    assert same(first, again) and not same(first, other)


def test_a_split_fit_takes_factors_and_eigenvalues_from_batches_in_turn() -> None:
    model, batches = network(), data()
    split = fit_curvature(model, batches, labels="empirical", split=True, progress=False)
    factors = fit_curvature(model, batches[::2], labels="empirical", progress=False)
    gradients = {}
    for name, shape in ((block.name, block.shape) for block in split.layout):
        for basis, expected in zip(split.bases[name], factors.bases[name], strict=True):
            assert torch.equal(basis.parts[0], expected.parts[0])
        gradients[name] = torch.zeros(0, *shape, dtype=torch.float64)
    sweep = Sweep(model, Objective(), default_selection(model))
    for batch in batches[1::2]:
        sink = Gradients()
        sweep.run(batch, Objective().losses, sink)
        gradients = {name: torch.cat([found, sink.blocks[name]]) for name, found in gradients.items()}
    for name, found in split.rotate(gradients).items():
        assert torch.allclose(split.eigenvalues[name], found.square().mean(0), rtol=1e-10)
    assert split.fisher.samples == 20
    with pytest.raises(StatisticsError, match="split=True needs at least two batches"):
        fit_curvature(model, batches[:1], split=True, progress=False)


def test_sums_and_eigenvectors_on_disk_are_the_same_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "SAVE_SECONDS", 0.0)
    model, batches = network(), data()
    with pytest.raises(InterruptedFitError):
        fit_curvature(model, Stopping(batches, 6), resume_from=tmp_path / "p", scratch=tmp_path, progress=False)
    found = fit_curvature(model, batches, resume_from=tmp_path / "p", scratch=tmp_path, progress=False)
    assert same(found, fit_curvature(model, batches, progress=False))
    assert not list(tmp_path.iterdir())


def test_a_shuffled_loader_gives_the_same_curvature_and_starts_its_pass_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "SAVE_SECONDS", 0.0)
    model, batches = network(), data()
    samples = [(x, y) for batch in batches for x, y in zip(*batch, strict=True)]
    shuffled: DataLoader[Any] = DataLoader(samples, batch_size=5, shuffle=True)
    whole = fit_curvature(model, batches, labels="empirical", progress=False)
    seen = 0

    def stop(batch: object) -> None:
        nonlocal seen
        seen += 1
        if seen == 7:  # in the second pass
            raise InterruptedFitError

    with pytest.raises(InterruptedFitError):
        fit_curvature(model, shuffled, labels="empirical", resume_from=tmp_path, mask=stop, progress=False)
    resumed = fit_curvature(model, shuffled, labels="empirical", resume_from=tmp_path, mask=stop, progress=False)
    assert same(whole, resumed)
    assert seen == 7 + 4  # the first pass was finished, the second made whole


@pytest.mark.parametrize("failure", [OSError("no space left"), SafetensorError("I/O error: No space left on device")])
def test_a_full_disk_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"torn")
        raise failure

    monkeypatch.setattr("logix_like.store.format.tensors.save_file", full)
    with pytest.raises(StoreError, match=r"could not be written: .*; see to the disk"):
        write_tensors(tmp_path / "curvature.safetensors", {}, {})
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_a_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="could not be written"):
        write_tensors(tmp_path / "file" / "curvature.safetensors", {}, {})
