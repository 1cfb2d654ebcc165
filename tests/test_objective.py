"""Objectives: losses, residuals and Hessians against autograd; sampled labels against their distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logix_like.errors import ConfigError
from logix_like.objective import IGNORED, Bernoulli, Categorical, Gaussian, Likelihood, Objective, bound

EXACT = 1e-12
"""Sums in another order, nothing else."""

CASES: list[tuple[Likelihood, Tensor, Tensor]] = [
    (Categorical(), torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])),
    (Categorical(), torch.randn(2, 4, 3, dtype=torch.float64), torch.tensor([[0, 2, IGNORED, 1], [1, IGNORED, 0, 2]])),
    (Bernoulli(), torch.randn(5, 2, dtype=torch.float64), torch.tensor([[0, 1], [1, 1], [0, 0], [1, 0], [0, 1]])),
    (Gaussian(0.5), torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)),
]


@pytest.mark.parametrize(("likelihood", "outputs", "targets"), CASES)
def test_residual_and_hessian_are_the_losses_derivatives(
    likelihood: Likelihood, outputs: Tensor, targets: Tensor
) -> None:
    def total(outputs: Tensor) -> Tensor:
        return likelihood.losses(outputs, targets).sum()

    vector = torch.randn_like(outputs)
    _, expected = torch.autograd.functional.hvp(total, outputs, vector)
    torch.testing.assert_close(
        likelihood.residual(outputs, targets), torch.func.grad(total)(outputs), rtol=EXACT, atol=EXACT
    )
    torch.testing.assert_close(likelihood.hessian_product(outputs, targets, vector), expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(("likelihood", "outputs", "targets"), CASES)
def test_sampled_residuals_have_the_hessian_as_second_moment(
    likelihood: Likelihood, outputs: Tensor, targets: Tensor
) -> None:
    """E[e e^T] over labels drawn from the model is the losses' Hessian: that makes the Fisher a curvature."""
    many = 20_000
    generator = torch.Generator().manual_seed(0)
    first, target = outputs[:1].expand(many, *outputs.shape[1:]), targets[:1].expand(many, *targets.shape[1:])
    drawn = likelihood.sample(first, target, generator)
    residual = likelihood.residual(first, drawn).flatten(1)
    moment = residual.T @ residual / many
    basis = torch.eye(residual.shape[1], dtype=torch.float64).view(-1, *outputs.shape[1:])
    one = (outputs[:1].expand_as(basis), targets[:1].expand(len(basis), *targets.shape[1:]))
    hessian = likelihood.hessian_product(one[0], one[1], basis).flatten(1)
    torch.testing.assert_close(moment, hessian, rtol=0, atol=6 * (hessian.diagonal().max() / many**0.5).item())


@pytest.mark.parametrize(("likelihood", "outputs", "targets"), CASES)
@pytest.mark.parametrize("draw", [False, True])
def test_losses_for_a_backward_pass_are_the_losses(
    likelihood: Likelihood, outputs: Tensor, targets: Tensor, draw: bool
) -> None:
    objective = Objective(likelihood, outputs=lambda model, batch: model(batch[0]), targets=lambda batch: batch[1])
    generator = torch.Generator()
    drawn = likelihood.sample(outputs, targets, generator.manual_seed(0)) if draw else targets
    leaf = outputs.clone().requires_grad_()
    expected = likelihood.losses(leaf, drawn)
    found = objective.backward_losses(lambda x: x, (leaf, targets), draw=draw, generator=generator.manual_seed(0))
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)
    for weights in (torch.ones(len(outputs), dtype=torch.float64), torch.rand(len(outputs), dtype=torch.float64)):
        first, second = (torch.autograd.grad(losses @ weights, leaf, retain_graph=True) for losses in (found, expected))
        torch.testing.assert_close(first, second, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("classes", [1, 2, 3, 7, 50])
def test_classes_are_drawn_by_their_probabilities(classes: int) -> None:
    p = torch.rand(classes, dtype=torch.float64).square()
    if classes > 2:
        p[1] = p[-1] = 0  # never drawn
    many = 40_000
    drawn = Categorical().sample(p.log().expand(many, classes), torch.zeros(many, dtype=torch.long))
    share = torch.bincount(drawn, minlength=classes) / many
    assert ((share > 0) == (p > 0)).all()
    torch.testing.assert_close(share.double(), p / p.sum(), rtol=0, atol=4 * (0.25 / many) ** 0.5)


def test_losses_of_a_sequence_are_summed_over_the_positions_that_count() -> None:
    _, outputs, targets = CASES[1]
    expected = [
        F.cross_entropy(o[t != IGNORED], t[t != IGNORED], reduction="sum")
        for o, t in zip(outputs, targets, strict=True)
    ]
    torch.testing.assert_close(Categorical().losses(outputs, targets), torch.stack(expected), rtol=EXACT, atol=EXACT)


def test_margin_is_the_log_odds_of_the_target() -> None:
    model = nn.Linear(3, 4).double()
    batch = (torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0]))
    p = model(batch[0]).softmax(-1)[torch.arange(5), batch[1]]
    torch.testing.assert_close(Objective().margins(model, batch), torch.log(p / (1 - p)), rtol=1e-9, atol=1e-9)


def test_margin_of_a_certain_sample_is_finite() -> None:
    objective = Objective(outputs=lambda model, batch: batch[0], targets=lambda batch: batch[1])
    logits = torch.tensor([[1e4, 0.0], [0.0, 1e4]])
    margins = objective.margins(nn.Identity(), (logits, torch.tensor([0, 0])))
    assert margins.isfinite().all() and margins[0] > 10 > -10 > margins[1]


class _LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 7)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        class Output:
            logits = self.table(input_ids)

        return Output()


def test_a_language_model_predicts_the_next_token_where_it_counts() -> None:
    model, tokens = _LanguageModel(), torch.tensor([[1, 2, 3], [4, 5, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    rows = model.table.weight.log_softmax(-1)
    expected = torch.stack([-(rows[1, 2] + rows[2, 3]), -rows[4, 5]])
    objective = Objective.language_model()
    torch.testing.assert_close(objective.losses(model, {"input_ids": tokens, "attention_mask": mask}), expected)
    labels = tokens.where(mask.bool(), IGNORED)
    torch.testing.assert_close(objective.losses(model, {"input_ids": tokens, "labels": labels}), expected)


def test_a_bound_model_is_a_function_of_its_parameters() -> None:
    model, batch = nn.Linear(3, 2), (torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    gradients = torch.func.grad(lambda p: Objective().losses(bound(model, p), batch).sum())(
        dict(model.named_parameters())
    )
    Objective().losses(model, batch).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_what_cannot_be_read_is_said() -> None:
    with pytest.raises(ConfigError, match="a batch is a Tensor; expected a pair"):
        Objective().losses(nn.Identity(), torch.zeros(2))
    with pytest.raises(ConfigError, match="a batch is a dict with x; expected"):
        Objective().labels({"x": torch.zeros(2)})
    with pytest.raises(ConfigError, match="the model returned a tuple"):
        Objective().losses(lambda x: (x, x), (torch.zeros(2, 2), torch.zeros(2)))
    with pytest.raises(ConfigError, match=r"shape \(4, 1\) and targets \(4,\)"):
        Objective(Gaussian()).losses(nn.Linear(3, 1), (torch.zeros(4, 3), torch.zeros(4)))


@pytest.mark.parametrize(
    "targets", [torch.zeros(4, 1, dtype=torch.long), torch.zeros(4), torch.zeros(2, dtype=torch.long)]
)
def test_targets_that_are_no_classes_of_the_outputs_are_said(targets: Tensor) -> None:
    for question in (Categorical().losses, Categorical().with_residual):
        with pytest.raises(ConfigError, match="classes need whole numbers, one for each row of logits"):
            question(torch.zeros(4, 3), targets)


def test_a_likelihood_of_other_shapes_or_without_noise_is_said() -> None:
    with pytest.raises(ConfigError, match=r"\(4, 1\) and targets \(4,\)"):
        Bernoulli().losses(torch.zeros(4, 1), torch.zeros(4))
    with pytest.raises(ConfigError, match=r"the variance is 0\.0"):
        Gaussian(0.0)
