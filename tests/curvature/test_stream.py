"""Curvature gathered during a training: against fits at resting weights, and without a trace in the training."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import logix_like as logix
from logix_like.curvature import Curvature, CurvatureStream, default_selection, fit_curvature
from logix_like.curvature.gradients import Gradients
from logix_like.curvature.sweep import Sweep
from logix_like.errors import CaptureError, ConfigError, StatisticsError
from logix_like.objective import Objective

Data = list[tuple[Tensor, Tensor]]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def data() -> Data:
    return [(torch.randn(5, 5, dtype=torch.float64), torch.randint(3, (5,))) for _ in range(4)]


def trained(model: nn.Module, batches: Data, stream: CurvatureStream, rate: float, scale: float = 1.0) -> None:
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for x, y in batches:
        with stream(len(y), scale=scale):
            (scale * nn.functional.cross_entropy(model(x), y)).backward()
        optimizer.step()
        optimizer.zero_grad()


def same(a: Curvature, b: Curvature) -> bool:
    return a.kind == b.kind and all(
        torch.allclose(values, b.eigenvalues[name], rtol=1e-10) for name, values in a.eigenvalues.items()
    )


def test_at_resting_weights_factors_are_those_of_a_fit() -> None:
    model, batches = network(), data()
    stream = CurvatureStream(model, kind="kfac")
    trained(model, batches, stream, 0.0, scale=0.25)
    found = stream.curvature()
    assert same(found, fit_curvature(model, batches, kind="kfac", labels="empirical", progress=False))
    assert (found.fisher.labels, found.fisher.samples) == ("empirical", 20)


def test_eigenvalues_are_mean_squares_of_the_gradients_of_each_step() -> None:
    model, batches = network(), data()
    twin, stream = copy.deepcopy(model), CurvatureStream(model, basis_samples=10)
    trained(model, batches, stream, 0.5)
    curvature = stream.curvature()
    rotated: dict[str, list[Tensor]] = {name: [] for name in curvature.layout.names}
    sweep, optimizer = Sweep(twin, Objective(), default_selection(twin)), torch.optim.SGD(twin.parameters(), 0.5)
    for x, y in batches:
        sink = Gradients()
        sweep.run((x, y), Objective().losses, sink)
        for name, coordinates in curvature.rotate(sink.blocks).items():
            rotated[name].append(coordinates)
        nn.functional.cross_entropy(twin(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parts in rotated.items():
        expected = torch.cat(parts[2:]).square().mean(0)  # the first two batches gave the basis
        assert torch.allclose(curvature.eigenvalues[name], expected, rtol=1e-10)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_beside_a_run_neither_sees_the_other(tmp_path: Path) -> None:
    model, batches = network(), data()
    rows = []
    stream = CurvatureStream(model, kind="kfac")
    for name in ("alone", "beside"):
        with logix.init(name, model, root=str(tmp_path), store={"dtype": "float64"}, verbose=False) as run:
            for number, (x, y) in enumerate(batches):
                model.zero_grad()
                with run(data_id=range(5 * number, 5 * number + 5)):
                    if name == "alone":
                        nn.functional.cross_entropy(model(x), y).backward()
                    else:
                        with stream(5):
                            nn.functional.cross_entropy(model(x), y).backward()
        rows.append(run.store.gradients[:])
    assert torch.equal(torch.as_tensor(rows[0]), torch.as_tensor(rows[1]))
    assert same(stream.curvature(), fit_curvature(model, batches, kind="kfac", labels="empirical", progress=False))


def test_blocks_that_fail_or_overflow_count_for_nothing() -> None:
    model, batches = network(), data()
    stream = CurvatureStream(model, kind="kfac")
    trained(model, batches, stream, 0.0)
    before = stream.curvature()
    with pytest.raises(RuntimeError, match="stop"), stream(5):
        nn.functional.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
        raise RuntimeError("stop")
    with stream(5):
        (nn.functional.cross_entropy(model(batches[0][0]), batches[0][1]) * float("inf")).backward()
    assert same(stream.curvature(), before) and stream.curvature().fisher.samples == 20


def test_every_second_block_and_what_is_refused() -> None:
    model, batches = network(), data()
    stream = CurvatureStream(model, kind="kfac", every=2)
    with pytest.raises(StatisticsError, match="no block"):
        stream.curvature()
    trained(model, batches, stream, 0.0)
    assert same(stream.curvature(), fit_curvature(model, batches[::2], kind="kfac", labels="empirical", progress=False))
    short = CurvatureStream(model)
    trained(model, batches, short, 0.0)
    with pytest.raises(StatisticsError, match="all 20 samples so far went into the factors"):
        short.curvature()
    with pytest.raises(CaptureError, match="no gradient reached"), stream(5):
        pass
    with pytest.raises(ConfigError, match="every is 0; it must be a whole number"):
        CurvatureStream(model, every=0)
    with pytest.raises(ConfigError, match=r"basis_samples is 1\.5"):
        CurvatureStream(model, basis_samples=1.5)
    with pytest.raises(ConfigError, match="unknown kind 'ekfca'; known: ekfac, kfac"):
        CurvatureStream(model, kind="ekfca")
    with pytest.raises(ConfigError, match="widest is 0"):
        CurvatureStream(model, widest=0)
    with (
        pytest.raises(ConfigError, match="unknown loss_reduction 'Mean'; known: mean, sum"),
        stream(5, loss_reduction="Mean"),
    ):
        pass
    for scale in (0.0, float("nan")):
        with pytest.raises(ConfigError, match="what the loss was multiplied by"), stream(5, scale=scale):
            pass


@pytest.mark.parametrize("at", ["backward", "behind it"])
def test_a_block_that_fails_leaves_nothing_for_the_next_eigenvalues(at: str) -> None:
    model, batches = network(), data()
    clean, hurt = (CurvatureStream(model, basis_samples=10) for _ in range(2))
    trained(model, batches, clean, 0.0)
    trained(model, batches[:2], hurt, 0.0)
    with pytest.raises(RuntimeError, match="stop"), hurt(5):
        hidden = model[0](batches[3][0])
        if at == "backward":
            hidden.register_hook(stop)
        nn.functional.cross_entropy(model[1:](hidden), batches[3][1]).backward()
        stop()
    trained(model, batches[2:], hurt, 0.0)
    assert same(hurt.curvature(), clean.curvature())


def stop(*_: object) -> None:
    raise RuntimeError("stop")
