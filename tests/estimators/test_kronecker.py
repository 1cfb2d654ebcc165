"""K-FAC and EK-FAC influence against dense matrices built from the curvature's own parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from transformers import BatchEncoding

from logix_like.capture.selection import select_modules
from logix_like.curvature import fit_curvature
from logix_like.errors import (
    ConfigError,
    EmptyStoreError,
    ModelMismatchError,
    QueryError,
    StatisticsError,
    UnsupportedModuleError,
)
from logix_like.estimators import EKFAC, KFAC
from logix_like.objective import Gaussian, Objective
from tests.curvature.cases import dense_gradients, objective_of
from tests.models import ZOO, Case, build

CASES = {case.name: case for case in ZOO}
SAME = 1e-9


def classifier() -> tuple[nn.Module, list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """A model with three layers, twelve samples in uneven batches, four queries."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(16, 5, dtype=torch.float64), torch.randint(3, (16,))
    data = list(zip(x[:12].split(5), y[:12].split(5), strict=True))
    return model, data, (x[12:], y[12:])


def dense_scores(estimator: EKFAC | KFAC, queries: dict[str, Tensor], samples: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    curvature = estimator.curvature
    for block in curvature.layout:
        inward, outward = (torch.block_diag(*basis.parts) for basis in curvature.bases[block.name])
        basis, values = torch.kron(outward, inward), curvature.eigenvalues[block.name].flatten()
        if not bool(values.any()):
            continue
        matrix = basis @ (values + estimator.damping * values.mean()).diag() @ basis.T
        q, i = queries[block.name].flatten(1), samples[block.name].flatten(1)
        found[block.name] = q @ torch.linalg.solve(matrix, i.T)
    return found


@pytest.mark.parametrize("estimator", [EKFAC, KFAC])
@pytest.mark.parametrize("name", ["mlp", "mlp_positions", "cnn", "transformer", "tied_with_bias", "reused", "gpt2"])
def test_scores_are_those_of_the_dense_inverse(name: str, estimator: type[EKFAC]) -> None:
    case: Case = CASES[name]
    model, batch = build(case)
    selection = select_modules(model, types=case.types, **case.options)
    influence = estimator(
        model, [batch, batch], objective_of(case), selection=selection, mask=lambda b: b.get("mask"), progress=False
    )
    gradients = dense_gradients(case, model, batch, influence.curvature.layout)
    expected = dense_scores(influence, gradients, gradients)
    total = torch.stack(list(expected.values())).sum(0)
    found = influence.scores(batch)
    assert torch.allclose(found, total.repeat(1, 2), rtol=1e-7, atol=1e-7 * float(total.abs().max()))
    assert torch.allclose(influence.self_influence(), total.diagonal().repeat(2), rtol=1e-7)
    for module, scores in influence.module_scores(batch).items():
        if module in expected:
            assert torch.allclose(
                scores, expected[module].repeat(1, 2), rtol=1e-6, atol=1e-7 * float(scores.abs().max())
            )
    assert list(influence.data_id) == list(range(10))


def test_one_pass_serves_queries_of_any_loss() -> None:
    model, data, queries = classifier()
    influence = EKFAC(model, data, progress=False)
    logit = influence.scores(queries, lambda model, batch: -model(batch[0]).gather(1, batch[1][:, None])[:, 0])
    assert logit.shape == (4, 12)
    assert not torch.allclose(logit, influence.scores(queries))


def test_a_training_sample_is_its_own_proponent() -> None:
    model, data, _ = classifier()
    influence = EKFAC(model, data, progress=False)
    scores = torch.cat([influence.scores(batch) for batch in data])
    assert torch.allclose(scores, scores.T)
    assert torch.allclose(scores.diagonal(), influence.self_influence())
    assert bool((scores.diagonal() > 0).all())


def test_full_rank_is_exact_and_low_rank_is_near() -> None:
    model, data, queries = classifier()
    whole = EKFAC(model, data, progress=False)
    scores = whole.scores(queries)
    near = EKFAC(model, data, curvature=whole.curvature, rank=2, progress=False).scores(queries)
    same = EKFAC(model, data, curvature=whole.curvature, rank=6, progress=False).scores(queries)
    assert torch.allclose(same, scores)
    assert torch.corrcoef(torch.stack([near.flatten(), scores.flatten()]))[0, 1] > 0.95
    assert not torch.allclose(near, scores)


def test_names_of_samples() -> None:
    model, data, queries = classifier()
    named = EKFAC(model, data, data_id=[f"s{i}" for i in range(12)], progress=False)
    result = named.influence(queries)
    assert list(named.data_id)[:2] == ["s0", "s1"]
    assert result.scores.shape == (4, 12)
    taken = EKFAC(model, data, data_id=lambda batch: [f"{float(x[0]):.3f}" for x in batch[0]], progress=False)
    assert taken.data_id[0] == f"{float(data[0][0][0, 0]):.3f}"
    with pytest.raises(ConfigError, match="2 data ids were given for 12 samples"):
        _ = EKFAC(model, data, data_id=["a", "b"], progress=False).data_id


def test_a_group_is_the_sum_of_its_members_to_first_order() -> None:
    model, data, queries = classifier()
    influence = EKFAC(model, data, progress=False)
    first = influence.group_influence(queries, data[0], order=1)
    assert torch.allclose(first, influence.scores(queries)[:, :5].sum(1), rtol=SAME)


def test_a_group_is_a_newton_step_with_the_remaining_curvature_to_second_order() -> None:
    model, data, queries = classifier()
    curvature = fit_curvature(model, data, labels="empirical", progress=False)
    influence = EKFAC(model, data, curvature=curvature, progress=False)
    found = influence.group_influence(queries, data[0])
    expected = torch.zeros(4, dtype=torch.float64)
    gradients = influence.gradients(queries)
    members = influence.gradients(data[0])
    remaining = influence.gradients((torch.cat([b[0] for b in data[1:]]), torch.cat([b[1] for b in data[1:]])), None)
    for name, values in curvature.eigenvalues.items():
        left = curvature.rotate({name: remaining[name]})[name].square().sum(0) / 12
        coordinates = curvature.rotate({name: gradients[name]})[name]
        group = curvature.rotate({name: members[name].sum(0, keepdim=True)})[name]
        expected += (coordinates * group / (left + 0.1 * values.mean())).flatten(1).sum(1)
    assert torch.allclose(found, expected, rtol=1e-8)
    with pytest.raises(QueryError, match="order is 3"):
        influence.group_influence(queries, data[0], order=3)


def test_averages_over_several_weights() -> None:
    model, data, queries = classifier()
    first = {name: value.clone() for name, value in model.state_dict().items()}
    second = {name: value + 0.1 * torch.randn_like(value) for name, value in first.items()}

    def both() -> Iterator[nn.Module]:
        for weights in (first, second):
            model.load_state_dict(weights)
            yield model

    averaged = EKFAC(model, data, at=both, progress=False)
    assert averaged.curvature.fisher.samples == 24
    model.load_state_dict(first)
    parts: list[dict[str, Tensor]] = []
    ends: list[dict[str, Tensor]] = []
    for _ in both():
        single = EKFAC(model, data, curvature=averaged.curvature, progress=False)
        parts.append(single.gradients(queries))
        ends.append(single.gradients((torch.cat([b[0] for b in data]), torch.cat([b[1] for b in data]))))
    expected = dense_scores(
        averaged,
        {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]},
        {name: (ends[0][name] + ends[1][name]) / 2 for name in ends[0]},
    )
    assert torch.allclose(averaged.scores(queries), torch.stack(list(expected.values())).sum(0), rtol=1e-8)
    group = averaged.group_influence(queries, data[0], order=1)
    assert torch.allclose(group, averaged.scores(queries)[:, :5].sum(1), rtol=1e-8)


def test_a_group_is_taken_out_of_the_curvature_once_however_often_its_samples_were_counted() -> None:
    model, data, queries = classifier()

    def twice() -> Iterator[nn.Module]:
        yield from (model, model)

    once, repeated = (fit_curvature(model, part, labels="empirical", progress=False) for part in (data, [*data, *data]))
    expected = EKFAC(model, data, curvature=once, progress=False).group_influence(queries, data[0])
    found = EKFAC(model, data, curvature=repeated, progress=False).group_influence(queries, data[0])
    assert torch.allclose(found, expected, rtol=1e-8)
    averaged = EKFAC(model, data, curvature=once, at=twice, progress=False)
    assert torch.allclose(averaged.group_influence(queries, data[0]), expected, rtol=1e-8)


def test_weights_that_change_between_questions_are_spoken_of() -> None:
    model, data, queries = classifier()
    influence = EKFAC(model, data, progress=False)
    influence.scores(queries)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    for question in (influence.self_influence, lambda: influence.scores(queries)):
        with pytest.warns(RuntimeWarning, match="not those that the curvature was fitted at"):
            question()


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": SubsetRandomSampler(range(4))},
        {"sampler": WeightedRandomSampler(torch.ones(4), 4)},
        {"batch_sampler": BatchSampler(RandomSampler(range(4)), 2, False)},
    ],
)
def test_a_loader_of_random_order_is_refused(options: dict[str, Any]) -> None:
    model, _, queries = classifier()
    with pytest.raises(ConfigError, match="shuffles"):
        EKFAC(model, DataLoader(TensorDataset(*queries), **options), progress=False)
    EKFAC(model, DataLoader(TensorDataset(*queries), batch_size=2), progress=False)


def test_a_generator_that_is_spent_is_said() -> None:
    model, data, queries = classifier()
    influence = EKFAC(model, iter(data), curvature=fit_curvature(model, data, progress=False), progress=False)
    with pytest.raises(EmptyStoreError, match="a generator is spent after one pass"):
        influence.influence(queries)


def test_nothing_of_the_model_changes() -> None:
    model, data, queries = classifier()
    model.train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    EKFAC(model, data, progress=False).scores(queries)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[2].weight.grad is None
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_refused() -> None:
    model, data, queries = classifier()
    curvature = fit_curvature(model, data, progress=False)
    fewer = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    with pytest.raises(ModelMismatchError, match="'4', which was tracked, is not in this model"):
        EKFAC(fewer, data, curvature=curvature, progress=False)
    other = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with pytest.raises(ModelMismatchError, match="shape"):
        EKFAC(other, data, curvature=curvature, progress=False)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    with pytest.warns(RuntimeWarning, match="not those that the curvature was fitted at"):
        EKFAC(model, data, curvature=curvature, progress=False)
    with pytest.raises(QueryError, match="rank is 0"):
        EKFAC(model, data, rank=0, progress=False)
    shuffled = DataLoader(TensorDataset(*queries), shuffle=True)
    with pytest.raises(ConfigError, match="shuffles"):
        EKFAC(model, shuffled, progress=False)
    with pytest.raises(ConfigError, match=r"objective is a CrossEntropyLoss.*Objective\(\) for a classifier"):
        EKFAC(model, data, nn.CrossEntropyLoss(), progress=False)
    with pytest.raises(ConfigError, match="the model is a list"):
        EKFAC(data, model, progress=False)
    one = (queries[0][0], queries[1][0])
    with pytest.raises(ConfigError, match=r"single number.*x\[None\]"):
        EKFAC(model, data, progress=False).scores(one)
    with pytest.raises(ConfigError, match="a DataLoader in place of a dataset"):
        EKFAC(model, TensorDataset(*queries), progress=False).scores(queries)
    with pytest.raises(StatisticsError, match="no samples"):
        _ = EKFAC(model, [], progress=False).curvature
    with pytest.raises(QueryError, match="not finite"):
        EKFAC(model, data, progress=False).scores((queries[0] * float("inf"), queries[1]))
    with pytest.raises(UnsupportedModuleError, match="rules exist for"):
        select_modules(nn.Sequential(nn.Linear(3, 3), nn.Bilinear(3, 3, 3)), include=("0", "1"))


def test_damping_is_given_as_everywhere() -> None:
    model, data, queries = classifier()
    curvature = fit_curvature(model, data, progress=False)
    estimator = EKFAC(model, data, curvature=curvature, damping={"absolute": 0.3}, progress=False)
    vectors = curvature.apply(lambda _, values: 1 / (values + 0.3), estimator.gradients(queries))
    inner = sum((vectors[name] * g).flatten(1).sum(1) for name, g in estimator.gradients(queries).items())
    batch = EKFAC(model, [queries], curvature=curvature, damping={"absolute": 0.3}, progress=False)
    torch.testing.assert_close(batch.self_influence(), inner, rtol=1e-9, atol=0)
    assert estimator.influence(queries).damping == {"absolute": 0.3}
    estimator.damping = "auto"
    auto = estimator.scores(queries)
    assert auto.isfinite().all() and not torch.equal(auto, batch.scores(queries))
    for wrong in (-0.5, math.nan, True, "much", None):
        with pytest.raises(QueryError, match=r"damping is .*; it must be a number of at least 0"):
            EKFAC(model, data, curvature=curvature, damping=wrong, progress=False)


def test_a_curvature_of_the_other_kind_is_refused() -> None:
    model, data, _ = classifier()
    for kind, estimator in (("kfac", EKFAC), ("ekfac", KFAC)):
        curvature = fit_curvature(model, data, kind=kind, progress=False)
        with pytest.raises(QueryError, match=f"the curvature is '{kind}', and {estimator.name} needs"):
            estimator(model, data, curvature=curvature, progress=False)


def test_a_batch_without_a_query_is_refused() -> None:
    model, data, queries = classifier()
    none = tuple(part[:0] for part in queries)
    with pytest.raises(QueryError, match="holds no sample"):
        EKFAC(model, data, progress=False).scores(none)


def test_singular_curvature_without_damping_is_refused() -> None:
    model, data, queries = classifier()
    with pytest.raises(StatisticsError, match=r"singular with damping 0.*larger damping"):
        EKFAC(model, [data[2]], damping=0.0, progress=False).scores(queries)


def test_rounding_in_single_precision_does_not_pass_for_curvature() -> None:
    model, x, y = nn.Linear(60, 2), torch.randn(40, 60), torch.randn(40, 2)
    data = list(zip(x.split(8), y.split(8), strict=True))
    for estimator in (KFAC, EKFAC):
        influence = estimator(model, data, Objective(Gaussian()), damping=0.0, progress=False)
        with pytest.raises(StatisticsError, match="singular with damping 0"):
            influence.scores((x[:2], y[:2]))
        with pytest.raises(StatisticsError, match="singular with damping 0"):
            influence.self_influence()
        influence.damping = 0.1
        assert bool(influence.scores((x[:2], y[:2])).isfinite().all())
    wide = torch.randn(200, 6)
    full = EKFAC(nn.Linear(6, 2), [(wide, torch.randn(200, 2))], Objective(Gaussian()), damping=0.0, progress=False)
    assert bool((full.self_influence() > 0).all())


class Pair(NamedTuple):
    """A batch whose parts are called by name."""

    x: Tensor
    y: Tensor


@pytest.mark.parametrize("kind", [Pair, lambda x, y: BatchEncoding({"x": x, "y": y})])
def test_batches_keep_their_kind(kind: Callable[[Tensor, Tensor], Any]) -> None:
    model, data, queries = classifier()
    objective = Objective(outputs=lambda model, batch: model(batch.x), targets=lambda batch: batch.y)
    influence = EKFAC(model, [kind(*batch) for batch in data], objective, progress=False)
    assert torch.allclose(influence.scores(kind(*queries)), EKFAC(model, data, progress=False).scores(queries))


def test_the_objective_decides_what_a_sample_is() -> None:
    model, data, _ = classifier()
    reduced = Objective(outputs=lambda model, batch: model(batch[0]), targets=lambda batch: batch[1])
    assert torch.allclose(
        EKFAC(model, data, reduced, progress=False).scores(data[0]), EKFAC(model, data, progress=False).scores(data[0])
    )
