"""TracIn over checkpoints, of all parameters and of the last layer, and representer points."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import logix_like as logix
from logix_like.errors import ConfigError, QueryError, StoreError
from logix_like.estimators.checkpointed import TracInCP, TracInLastLayer
from logix_like.estimators.last_layer import LastLayer
from logix_like.estimators.representer import RepresenterPoints
from logix_like.estimators.source import Source
from logix_like.estimators.tracin import TracIn
from logix_like.estimators.tracin_rows import TracInRP
from logix_like.objective import Gaussian, Objective
from tests.path_runs import CLASSES, FEATURES, OBJECTIVE, SAMPLES, batch_of, network, queries, train, training_data

EXACT = 1e-9
"""The same products in another order, in float64."""

EVERY = {"every_steps": 1}


@pytest.mark.parametrize("hyper", [{}, {"lr": 0.05}])
def test_a_checkpoint_at_every_step_of_full_batches_is_exact_tracin(tmp_path: Path, hyper: dict[str, Any]) -> None:
    path, _ = train(tmp_path, steps=4, batch=SAMPLES, checkpoints=EVERY, **hyper)
    exact = TracIn(path, network(), OBJECTIVE, batch_of)
    found = TracInCP(path, network(), OBJECTIVE, batch_of, chunk=7)
    assert list(found.data_id) == list(exact.data_id)
    torch.testing.assert_close(found.scores(queries()), exact.scores(queries()), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(found.self_influence(), exact.self_influence(), rtol=EXACT, atol=EXACT)


def test_adams_own_step_sizes_weigh_the_products(tmp_path: Path) -> None:
    """Without momentum Adam's share of a step is the gradient times the step size that its second moment gives."""
    hyper = {"lr": 0.01, "betas": (0.0, 0.999)}
    path, _ = train(tmp_path, "Adam", steps=30, batch=SAMPLES, checkpoints=EVERY, **hyper)
    exact = TracIn(path.between(20, 30), network(), OBJECTIVE, batch_of).scores(queries())
    found = TracInCP(path, network(), OBJECTIVE, batch_of, checkpoints=range(20, 30)).scores(queries())
    # A checkpoint's second moment is that of before the step: by then it moves by a few percent at most.
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.02 * exact.abs().max().item())


@pytest.mark.parametrize("head_lr", [None, 0.4])
def test_the_last_layers_products_are_those_of_its_gradients(tmp_path: Path, head_lr: float | None) -> None:
    path, _ = train(tmp_path, steps=4, batch=SAMPLES, checkpoints=EVERY, head_lr=head_lr)
    found = TracInLastLayer(path, network(), OBJECTIVE, batch_of, chunk=7)
    frozen_rest = network()
    expected = torch.zeros(4, SAMPLES, dtype=torch.float64)
    for stored in path.checkpoints[:-1]:
        frozen_rest.load_state_dict(dict(stored.read().weights))
        rows, asked = (_last_gradients(frozen_rest, *batch) for batch in (batch_of(range(SAMPLES)), queries()))
        expected += (head_lr or 0.15) / SAMPLES * asked @ rows.T
    torch.testing.assert_close(found.scores(queries()), expected, rtol=EXACT, atol=EXACT)
    own = found.scores(batch_of(range(SAMPLES))).diagonal()
    torch.testing.assert_close(found.self_influence(), own, rtol=EXACT, atol=EXACT)


def _last_gradients(model: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    rows = []
    for one in range(len(x)):
        loss = F.cross_entropy(model(x[one : one + 1]), y[one : one + 1])
        gradients = torch.autograd.grad(loss, list(model[2].parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def test_checkpoints_without_the_optimizers_state_are_no_zeros(tmp_path: Path) -> None:
    path, _ = train(tmp_path, "Adam", steps=3)  # its first checkpoint is of before the first step
    with pytest.raises(StoreError, match="checkpoints of steps 0 hold no state of the optimizer"):
        TracInCP(path, network(), OBJECTIVE, batch_of).scores(queries())


def test_checkpoints_that_are_not_there_are_named(tmp_path: Path) -> None:
    path, _ = train(tmp_path, steps=4, checkpoints={"at_steps": [2]})
    with pytest.raises(StoreError, match="no checkpoint of step 3; there are those of steps 0, 2"):
        TracInCP(path, network(), OBJECTIVE, batch_of, checkpoints=[2, 3])
    with pytest.raises(ConfigError, match=r"'1', which is no nn.Linear of the model; there are: '0', '2'"):
        TracInLastLayer(path, network(), OBJECTIVE, batch_of, layer="1")


def test_a_layer_that_is_not_the_last_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer '0' is called 1 times .* name another layer"):
        LastLayer(network(), OBJECTIVE, "0").factors(queries())


class Keyword(nn.Module):
    """Gives its last layer what goes in by name."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers[2](input=self.layers[1](self.layers[0](x)))
        return out


def test_a_layer_may_be_called_by_keyword() -> None:
    expected = LastLayer(network(), OBJECTIVE).factors(queries())
    assert torch.equal(LastLayer(Keyword(network()), OBJECTIVE).factors(queries()).features, expected.features)


def _points(**options: Any) -> tuple[RepresenterPoints, nn.Sequential]:
    model = network()
    batches = [batch_of(range(s, s + 8)) for s in range(0, SAMPLES, 8)]
    return RepresenterPoints(model, OBJECTIVE, batches, **options), model


def test_parts_add_up_to_the_outputs() -> None:
    """B9: exact at the optimum of the last layer, which the fit reaches."""
    points, model = _points(decay=0.05)
    before = model[2].weight.detach().clone()
    torch.testing.assert_close(points.values(queries()).sum(1), points.outputs(queries()), rtol=1e-7, atol=1e-7)
    assert points.refit.residual < 1e-7 and points.refit.iterations > 3
    assert torch.equal(before, model[2].weight)


def test_off_the_optimum_the_gap_is_the_gradients() -> None:
    """B9': parts minus outputs = - f_q . gradient / decay."""
    points, _ = _points(decay=0.05)
    points.weight = points.weight + 1e-3 * torch.randn_like(points.weight)
    features = points._layer.factors(queries()).features
    slope = points._residuals(points.weight).T @ points._features / SAMPLES + 0.05 * points.weight
    gap = points.values(queries()).sum(1) - points.outputs(queries())
    torch.testing.assert_close(gap, -features @ slope.T / 0.05, rtol=EXACT, atol=EXACT)


def test_scores_are_the_parts_along_the_falling_loss() -> None:
    points, _ = _points(decay=0.05)
    residual = points.outputs(queries()).softmax(1) - F.one_hot(queries()[1], CLASSES)
    expected = -(points.values(queries()) * residual.unsqueeze(1)).sum(2)
    torch.testing.assert_close(points.scores(queries()), expected, rtol=EXACT, atol=EXACT)
    own = points.scores(training_data()).diagonal()
    torch.testing.assert_close(points.self_influence(), own, rtol=EXACT, atol=EXACT)
    assert (points.self_influence() > 0).all()


def test_regression_has_representer_points_too() -> None:
    model = nn.Linear(FEATURES, 1).double()
    x, _ = training_data()
    objective = Objective(Gaussian())
    points = RepresenterPoints(
        model, objective, [(x, x[:, :1] * 2)], decay=0.1, data_id=[f"s{i}" for i in range(SAMPLES)]
    )
    asked = (x[:3], x[:3, :1])
    torch.testing.assert_close(points.values(asked).sum(1), points.outputs(asked), rtol=1e-7, atol=1e-7)
    assert points.data_id[3] == "s3"
    numbered = RepresenterPoints(model, objective, [(x, x[:, :1] * 2)], decay=0.1, data_id=torch.arange(SAMPLES) + 7)
    assert numbered.data_id.tolist() == list(range(7, SAMPLES + 7))


def test_a_fit_that_did_not_arrive_is_said() -> None:
    with pytest.warns(RuntimeWarning, match="after 1 iterations the last layer is not at its optimum"):
        _points(decay=1e-4, iterations=1)
    with pytest.raises(QueryError, match="only with a penalty"):
        _points(decay=0)
    with pytest.raises(QueryError, match="2 data ids were given for 24 samples"):
        _points(data_id=["a", "b"])


def test_an_optimizer_that_climbs_is_refused(tmp_path: Path) -> None:
    path, _ = train(tmp_path, steps=2, checkpoints=EVERY, maximize=True)
    for kind in (TracInCP, TracInLastLayer, Source):
        with pytest.raises(ConfigError, match="maximize=True"):
            kind(path, network(), OBJECTIVE, batch_of)
    with pytest.raises(ConfigError, match="maximize=True"):
        TracInRP(logix.open_store(tmp_path / "run"))


def test_a_layer_that_was_not_trained_is_refused(tmp_path: Path) -> None:
    path, _ = train(tmp_path, steps=2, checkpoints=EVERY)
    without = replace(path, groups=(("0.weight", "0.bias"),))
    with pytest.raises(ConfigError, match=r"did not train '2\.weight'; name another layer"):
        TracInLastLayer(without, network(), OBJECTIVE, batch_of)
