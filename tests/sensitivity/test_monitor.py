"""The monitor in a training loop, its posteriors, groups and the choice of a strength: B7, H2, H3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from logix_like.errors import ConfigError, QueryError
from logix_like.estimators.flat import FlatModel
from logix_like.objective import Gaussian, Objective
from logix_like.sensitivity import SensitivityMonitor, choose_strength, posterior_of
from logix_like.sensitivity.forms import deviations
from logix_like.sensitivity.posterior import VARIANCES, dense_laplace
from tests.sensitivity.truths import classes_of_noise, linear, softmax_optimum, without_each

EXACT = 1e-9


def _network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def _batches() -> list[tuple[Tensor, Tensor]]:
    x, y = classes_of_noise(40)
    return list(zip(x.split(16), y.split(16), strict=True))


def _trained(optimizer: str, **hyper: Any) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = _network()
    taker: torch.optim.Optimizer = getattr(torch.optim, optimizer)(model.parameters(), **{"lr": 0.01, **hyper})
    for _ in range(5):
        for x, y in _batches():
            taker.zero_grad()
            F.cross_entropy(model(x), y).backward()
            taker.step()
    return model, taker


def test_a_kronecker_posterior_knows_how_a_layer_keeps_its_weight() -> None:
    """Transformers' Conv1D holds the transpose of a linear layer's weight; a convolution of one pixel has more axes."""
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    x, y = classes_of_noise(40)
    plain, transposed = _network(), _network()
    pixels = nn.Sequential(
        nn.Unflatten(1, (6, 1)), nn.Conv1d(6, 5, 1), nn.Flatten(), nn.Tanh(), nn.Linear(5, 3)
    ).double()
    pixels.load_state_dict({"1.weight": plain[0].weight[:, :, None], "1.bias": plain[0].bias, **_named("4", plain[2])})
    transposed[0] = pytorch_utils.Conv1D(5, 6).double()
    transposed[0].load_state_dict({"weight": plain[0].weight.T, "bias": plain[0].bias})
    looks = [
        SensitivityMonitor(model, samples=40, posterior="kronecker", strength=1.0).measure([(x, y)])
        for model in (plain, transposed, pixels)
    ]
    for look in looks[1:]:
        torch.testing.assert_close(look.shift, looks[0].shift, rtol=1e-6, atol=1e-9)


def _named(name: str, layer: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for key, value in layer.state_dict().items()}


@pytest.mark.parametrize("posterior", ["diagonal", "kronecker", "dense"])
def test_a_look_is_the_same_whatever_the_batches(posterior: Any) -> None:
    model, _ = _trained("SGD")
    x, y = classes_of_noise(40)
    looks = []
    for batches in (_batches(), [(x, y)]):
        for memory in (256.0, 3 * 3 * 53 * 8 / 2**20 * 2.5):  # all at once, two samples at a time
            monitor = SensitivityMonitor(model, samples=40, posterior=posterior, strength=1.0, memory_mib=memory)
            looks.append(monitor.measure(batches))
    for look in looks[1:]:
        if posterior != "kronecker":  # its labels are drawn batch by batch
            torch.testing.assert_close(look.sensitivity, looks[0].sensitivity, rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(look.loss, looks[0].loss, rtol=EXACT, atol=EXACT)
    assert looks[0].train_loss == pytest.approx(F.cross_entropy(model(x), y).item())
    assert looks[0].loo_loss > looks[0].train_loss


def test_on_softmax_regression_the_estimate_is_that_of_retraining() -> None:
    x, y = classes_of_noise()
    optimum = softmax_optimum(x, y, 3, 2.0)
    monitor = SensitivityMonitor(linear(optimum), samples=len(x), posterior="dense", strength=2.0)
    found = monitor.measure([(x, y)], validation=[(x, y)])
    left = without_each(x, y, 3, 2.0, optimum)
    truth, train = F.cross_entropy(left, y).item(), F.cross_entropy(x @ optimum, y).item()
    assert found.loo_loss == pytest.approx(truth, abs=0.02 * (truth - train))
    moved = (left.softmax(1) - (x @ optimum).softmax(1)).abs().sum(1)
    assert np.corrcoef(found.sensitivity, moved)[0, 1] > 0.999
    assert set(found.most_sensitive(10)) & set(moved.argsort(descending=True)[:10].tolist()) >= set(
        found.most_sensitive(5)
    )
    (line,) = monitor.history
    assert line.epoch == 0 and line.train_loss == line.validation_loss == pytest.approx(train)
    error, variance = found.map()
    assert error.shape == variance.shape == (120,) and (variance > 0).all()
    assert "120 samples: loss" in str(found)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_the_optimizers_own_state_is_the_covariance(optimizer: str) -> None:
    model, taker = _trained(optimizer, weight_decay=0.05)
    flat = FlatModel(model, Objective())
    variance = posterior_of(taker, flat, samples=40).times(torch.ones(flat.width, dtype=torch.float64))
    start = 0
    for parameter in model.parameters():
        own = variance[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
        if optimizer == "SGD":
            expected = torch.full_like(parameter, 0.01 / 40)
        else:
            state = taker.state[parameter]
            square = state["square_avg"] if optimizer == "RMSprop" else state["exp_avg_sq"] / (1 - 0.999**15)
            expected = 1 / (40 * (square.sqrt() + 1e-8 + 0.05))
        torch.testing.assert_close(own, expected.detach(), rtol=1e-9, atol=0)
    monitor = SensitivityMonitor(model, taker, samples=40)
    found = monitor.measure(_batches())
    assert found.loo_loss > found.train_loss and (found.sensitivity > 0).all()


def test_training_does_not_notice() -> None:
    x, y = classes_of_noise(40)
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    ends = []
    for watched in (False, True):
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.2), nn.Linear(5, 3)).double()
        optimizer = torch.optim.Adam(model.parameters())
        monitor = SensitivityMonitor(model, optimizer, samples=40)
        for _ in range(2):
            for a, b in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(a), b).backward()
                optimizer.step()
            if watched:
                monitor.measure(loader, data_id=lambda batch: list(range(len(batch[0]))))
        ends.append([p.detach().clone() for p in model.parameters()])
        assert model.training and all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_a_large_output_takes_the_full_form_without_jacobians() -> None:
    model, taker = _trained("Adam")
    whole = SensitivityMonitor(model, taker, samples=40, form="full").measure(_batches())
    found = SensitivityMonitor(model, taker, samples=40, form="full", memory_mib=1e-4).measure(_batches())
    torch.testing.assert_close(found.sensitivity, whole.sensitivity, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(found.left_out_loss, whole.left_out_loss, rtol=EXACT, atol=EXACT)
    with pytest.raises(ConfigError, match=r"3 outputs by 53 parameters exceeds memory_mib; use form='full'"):
        SensitivityMonitor(model, taker, samples=40, form="loo", memory_mib=1e-4).measure(_batches())


def test_a_loss_without_derivative_is_estimated_by_draws() -> None:
    """The share of errors, which no gradient tells anything of."""
    model, taker = _trained("Adam")

    def wrong(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(1) != targets).double()

    found = SensitivityMonitor(model, taker, samples=40, loss=wrong, draws=32).measure(_batches())
    x, y = classes_of_noise(40)
    assert found.train_loss == pytest.approx(wrong(model(x), y).mean().item())
    assert found.sensitivity.max() > 0 and (found.left_out_loss >= found.loss).float().mean() > 0.9


def test_the_last_layer_alone_may_be_uncertain() -> None:
    model, _ = _trained("SGD")
    flat = FlatModel(model, Objective(), ["2.weight", "2.bias"])
    x, y = classes_of_noise(40)
    expected = deviations(flat, dense_laplace(flat, [(x, y)], 1.0), flat.theta, (x, y), "loo").shift.abs().sum(1)
    options: dict[str, Any] = {"samples": 40, "posterior": "dense", "strength": 1.0}
    found = SensitivityMonitor(model, parameters=["2.*"], **options).measure([(x, y)])
    torch.testing.assert_close(found.shift, expected, rtol=EXACT, atol=EXACT)
    with pytest.raises(ConfigError, match=r"no trained parameter of the model fits 'head\.\*'"):
        SensitivityMonitor(model, parameters=["head.*"], **options)


def test_leaving_a_class_out_orders_the_classes() -> None:
    """H3: far outside first order, so only the order counts; here against retraining without each class."""
    x, y = classes_of_noise(120)
    optimum = softmax_optimum(x, y, 3, 10.0)
    monitor = SensitivityMonitor(linear(optimum), samples=120, posterior="dense", strength=10.0)
    effects = monitor.leave_out([(x[:70], y[:70]), (x[70:], y[70:])])
    truth = {}
    for one in range(3):
        kept = (y != one).double()
        truth[one] = F.cross_entropy(x[y == one] @ softmax_optimum(x, y, 3, 10.0, kept, optimum), y[y == one]).item()
    assert {e.group: e.samples for e in effects} == {one: int((y == one).sum()) for one in range(3)}
    estimated, measured = [e.left_out_loss for e in effects], [truth[e.group] for e in effects]
    assert np.corrcoef(estimated, measured)[0, 1] > 0.9
    assert all(e.left_out_loss > e.loss for e in effects)
    small = softmax_optimum(x, y, 3, 1e4)  # so stiff that first order is exact
    (effect, *_) = SensitivityMonitor(linear(small), samples=120, posterior="dense", strength=1e4).leave_out([(x, y)])
    kept = softmax_optimum(x, y, 3, 1e4, (y != effect.group).double(), small)
    own = y == effect.group
    assert effect.left_out_loss == pytest.approx(F.cross_entropy(x[own] @ kept, y[own]).item(), rel=1e-3)


def test_the_strength_is_chosen_as_retraining_would() -> None:
    """B7: near the true leave-one-out loss for every strength, from one trained model (full form: 2 x off)."""
    x, y = classes_of_noise(60)
    strengths = (0.1, 1.0, 10.0, 100.0)
    sweep = choose_strength(linear(softmax_optimum(x, y, 3, 1.0)), [(x[:25], y[:25]), (x[25:], y[25:])], strengths)
    truths = []
    for strength, train, estimate in zip(strengths, sweep.train_loss, sweep.loo_loss, strict=True):
        optimum = softmax_optimum(x, y, 3, strength)
        assert train == pytest.approx(F.cross_entropy(x @ optimum, y).item(), rel=1e-6)
        truths.append(F.cross_entropy(without_each(x, y, 3, strength, optimum), y).item())
        assert estimate == pytest.approx(truths[-1], rel=0.04)
    assert sweep.best == strengths[int(np.argmin(truths))]
    with pytest.raises(ConfigError, match="at least one number, 0 or more"):
        choose_strength(_network(), _batches(), [-1.0])


@pytest.mark.parametrize("given", [np.array([1.0, 10.0]), torch.tensor([1.0, 10.0]), iter([1.0, 10.0])])
def test_strengths_come_in_any_form(given: Any) -> None:
    assert choose_strength(_network(), _batches(), given, parameters=["2.*"]) == choose_strength(
        _network(), _batches(), [1.0, 10.0], parameters=["2.*"]
    )


def test_regression_is_watched_too() -> None:
    x, _ = classes_of_noise(40)
    monitor = SensitivityMonitor(
        linear(torch.zeros(6, 1, dtype=torch.float64)), None, Objective(Gaussian(0.5)), samples=40, posterior="dense",
        strength=1.0,
    )  # fmt: skip
    assert monitor.measure([(x, x[:, :1])]).loo_loss > 0


def _ivon(steps: int) -> tuple[Tensor, Any, list[Tensor]]:
    """IVON on least squares with an orthogonal design: the data, the optimizer, variances in the second half."""
    ivon = pytest.importorskip("ivon")
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 4, generator=generator, dtype=torch.float64))[0]
    x = basis * 8 * torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    y = x.sum(1, keepdim=True) + 0.3 * torch.randn(64, 1, generator=generator, dtype=torch.float64)
    model = linear(torch.zeros(4, 1, dtype=torch.float64))
    taker = ivon.IVON(model.parameters(), lr=0.05, ess=64, weight_decay=2 / 64, hess_init=1.0, beta2=0.999)
    flat, variances = FlatModel(model, Objective(Gaussian())), []
    for step in range(steps):
        with taker.sampled_params(train=True):
            taker.zero_grad()
            ((model(x) - y) ** 2 / 2).mean().backward()
        taker.step()
        if step >= steps // 2:
            variances.append(posterior_of(taker, flat, 64).times(torch.ones(4, dtype=torch.float64)))
    return x, taker, variances


def test_ivons_own_variance_is_read() -> None:
    _, taker, variances = _ivon(steps=4)
    torch.testing.assert_close(variances[-1], 1 / (64 * taker.param_groups[0]["hess"] + 2.0), rtol=EXACT, atol=0)


@pytest.mark.slow
def test_ivons_variance_is_that_of_the_posterior() -> None:
    """H2: its h is the diagonal of the mean Hessian, in the mean over many steps."""
    x, _, variances = _ivon(steps=6000)
    mean = 1 / torch.stack([1 / v for v in variances]).mean(0)
    torch.testing.assert_close(mean, 1 / ((x**2).sum(0) + 2.0), rtol=0.1, atol=0)


def test_every_optimizer_is_tested() -> None:
    assert set(VARIANCES) == {"SGD", "Adam", "AdamW", "RMSprop", "IVON"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: SensitivityMonitor(m, samples=4), r"give optimizer="),
        (lambda m: SensitivityMonitor(m, samples=4, posterior="dense"), r"give strength="),
        (lambda m: SensitivityMonitor(m, samples=0, posterior="dense", strength=1.0), "samples is 0"),
        (lambda m: SensitivityMonitor(m, samples=4, posterior="dense", strength=-1.0), "strength is -1.0"),
        (lambda m: SensitivityMonitor(m, samples=4, posterior="exact"), "known: optimizer, diagonal, kronecker, dense"),
        (lambda m: SensitivityMonitor(m, samples=4, posterior="dense", strength=1.0, form="half"), "known: loo, full"),
    ],
)
def test_what_is_missing_is_said(make: Callable[[nn.Module], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(_network())


def test_what_cannot_be_measured_is_said() -> None:
    model = _network()
    x, y = classes_of_noise(40)
    adam = SensitivityMonitor(model, torch.optim.Adam(model.parameters()), samples=40)
    with pytest.raises(ConfigError, match=r"no state for '0.weight' yet; take a step first"):
        adam.measure(_batches())
    other = SensitivityMonitor(model, torch.optim.Adadelta(model.parameters()), samples=40)
    with pytest.raises(ConfigError, match=r"'Adadelta' .* known are SGD, Adam, AdamW, RMSprop, IVON"):
        other.measure(_batches())
    monitor = SensitivityMonitor(model, samples=40, posterior="diagonal", strength=1.0)
    samplers: tuple[Any, ...] = (
        RandomSampler(x),
        SubsetRandomSampler(range(40)),
        WeightedRandomSampler([1.0] * 40, 40),
    )
    for sampler in samplers:
        with pytest.raises(ConfigError, match="the loader shuffles"):
            monitor.measure(DataLoader(TensorDataset(x, y), sampler=sampler))
    with pytest.raises(ConfigError, match="draws is 0"):
        SensitivityMonitor(model, samples=40, posterior="diagonal", strength=1.0, draws=0)
    with pytest.raises(ConfigError, match=r"not the same ones twice.*a generator cannot"):
        SensitivityMonitor(model, torch.optim.SGD(model.parameters()), samples=40).leave_out(iter(_batches()))
    with pytest.raises(ConfigError, match="2 ids for 40 samples"):
        monitor.measure([(x, y)], data_id=lambda batch: ["a", "b"])
    with pytest.raises(ConfigError, match="yielded no batch"):
        monitor.measure([])
    with pytest.raises(ConfigError, match="a generator cannot"):
        monitor.measure(batch for batch in _batches())
    wide = SensitivityMonitor(nn.Linear(6, 5000), samples=40, posterior="dense", strength=1.0)
    with pytest.raises(ConfigError, match=r"posterior of 35,000 parameters .* at most 20,000"):
        wide.measure([(x.float(), y)])
    with pytest.raises(ConfigError, match="unknown form 'half'; known: loo, full"):
        choose_strength(model, _batches(), [1.0], form="half")
    with pytest.raises(ConfigError, match=r"strengths are \(nan,\)"):
        choose_strength(model, _batches(), [float("nan")])
    with pytest.raises(ConfigError, match="validation yielded no batch"):
        monitor.measure([(x, y)], validation=[])
    with pytest.raises(ConfigError, match="not positive definite"):
        SensitivityMonitor(model, samples=40, posterior="dense", strength=0.0).measure(_batches())
    with pytest.raises(QueryError, match="between 1 and 40"):
        monitor.measure([(x, y)]).most_sensitive(41)


def test_groups_may_be_named_by_a_tensor() -> None:
    x, y = classes_of_noise(40)
    monitor = SensitivityMonitor(_network(), samples=40, posterior="diagonal", strength=1.0)
    assert monitor.leave_out(_batches(), lambda batch: batch[1]) == monitor.leave_out([(x, y)])[:3]
    with pytest.raises(ConfigError, match="groups named 1 groups for 16 samples"):
        monitor.leave_out(_batches(), lambda batch: ["a"])
