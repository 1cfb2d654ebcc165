"""The update rules against torch's own optimizers, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from logix_like.errors import ConfigError
from logix_like.updates import RULES, rule_of, settings_of

EXACT = 1e-12
"""The same operations, some in another order."""

CASES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.02}),
    ("SGD", {"momentum": 0.9, "dampening": 0.3}),
    ("SGD", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    ("Adam", {"weight_decay": 0.1}),
    ("AdamW", {"weight_decay": 0.1, "betas": (0.8, 0.95)}),
    ("RMSprop", {"momentum": 0.5, "weight_decay": 0.1}),
    ("RMSprop", {}),
]


def test_every_rule_is_tested() -> None:
    assert {name for name, _ in CASES} == set(RULES)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_rule_takes_the_optimizers_steps(name: str, settings: dict[str, Any]) -> None:
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    optimizer = getattr(torch.optim, name)([weight], lr=0.05, **settings)
    rule = rule_of(name)
    theta = weight.detach().clone()
    moments = {key: torch.zeros_like(theta) for key in rule.moments}
    for taken in range(12):
        gradient = torch.randn(7, dtype=torch.float64)
        gradient[0] = 0.0
        theta, moments = rule.step(theta, gradient, moments, taken, settings_of(optimizer)[0])
        weight.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(theta, weight.detach(), rtol=EXACT, atol=EXACT)
    for key in rule.moments:
        if (kept := optimizer.state[weight].get(key)) is not None:
            torch.testing.assert_close(moments[key], kept, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_rate_is_the_sum_of_an_impulses_effects(name: str, settings: dict[str, Any]) -> None:
    """With the scale fixed and no decay, a unit of one gradient moves the weights by ``rate`` in the long run."""
    if settings.get("nesterov"):
        pytest.skip("looks a step ahead: its first effect is larger")
    rule = rule_of(name)
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = getattr(torch.optim, name)([weight], lr=0.05, **{**settings, "weight_decay": 0.0})
    hyper, late, square = settings_of(optimizer)[0], 10_000, torch.full((1,), 4.0, dtype=torch.float64)
    decay = hyper["betas"][1] if "betas" in hyper else hyper.get("alpha", 1.0)

    def constant_scale(moments: dict[str, torch.Tensor], value: torch.Tensor) -> dict[str, torch.Tensor]:
        return {k: value if k in ("exp_avg_sq", "square_avg") else m for k, m in moments.items()}

    zeros = {key: torch.zeros_like(square) for key in rule.moments}
    scale = rule.scale(constant_scale(zeros, square), late, hyper)
    expected = rule.rate(hyper) * (1.0 if scale is None else scale.item())
    theta, gradient, moments = torch.zeros(1, dtype=torch.float64), torch.full((1,), 1e-6, dtype=torch.float64), zeros
    for number in range(400):
        moments = constant_scale(moments, square / decay)  # the step multiplies it by the decay
        theta, moments = rule.step(theta, gradient * (number == 0), moments, late, hyper)
    assert (-theta / gradient).item() == pytest.approx(expected, rel=1e-6)


def test_where_no_gradient_comes_none_is_derived() -> None:
    rule, zero = rule_of("Adam"), torch.zeros(2, dtype=torch.float64)
    hyper = settings_of(torch.optim.Adam([zero.requires_grad_()]))[0]

    def moved(gradient: torch.Tensor) -> torch.Tensor:
        return rule.step(zero.detach(), gradient, {"exp_avg": zero.detach(), "exp_avg_sq": zero.detach()}, 0, hyper)[0]

    assert torch.func.jacrev(moved)(zero.detach()).isfinite().all()


def test_what_is_not_known_is_said() -> None:
    with pytest.raises(ConfigError, match="'LBFGS' has no known update rule; known are SGD, Adam, AdamW, RMSprop"):
        rule_of("LBFGS")
    with pytest.raises(ConfigError, match="amsgrad=True, which cannot be replayed"):
        rule_of("Adam").check({"amsgrad": True})


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_impulses_are_what_later_steps_still_hold_of_a_gradient(name: str, settings: dict[str, Any]) -> None:
    rule = rule_of(name)
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = getattr(torch.optim, name)([weight], lr=0.05, **{**settings, "weight_decay": 0.0})
    hyper = settings_of(optimizer)[0]
    theta, moments = weight.detach().clone(), {key: torch.zeros(1, dtype=torch.float64) for key in rule.moments}
    for taken in range(3):  # a past, so that nothing is special about the first step
        theta, moments = rule.step(theta, torch.ones(1, dtype=torch.float64), moments, taken, hyper)
    units = torch.eye(4, dtype=torch.float64)

    def moved(gradients: torch.Tensor) -> torch.Tensor:
        at, kept = theta, moments
        found = []
        for age in range(4):
            after, kept = rule.step(at, 1 + gradients[age : age + 1], kept, 3 + age, hyper, fixed_scale=True)
            found.append(after - at)
            at = after
        return torch.cat(found)

    effects = torch.func.vjp(moved, torch.zeros(4, dtype=torch.float64))[1](units[3])[0]
    at, kept = theta, moments
    for age in range(4):
        at, kept = rule.step(at, torch.ones(1, dtype=torch.float64), kept, 3 + age, hyper)
    scale = rule.scale(kept, 7, hyper)
    factor = 1.0 if scale is None else scale.item()
    for age in range(1 if name == "RMSprop" else 4):  # RMSprop scales a gradient when it enters, not when it moves
        assert -effects[3 - age].item() == pytest.approx(rule.impulse(age, 6, hyper) * factor, rel=1e-9)
