"""Which modules are tracked, and what is said of those that are not."""

import pytest
import torch
from torch import Tensor, nn

from logix_like.capture.selection import select_modules
from logix_like.errors import ConfigError
from tests.models import Transformer, gpt2

LINEAR = ("Linear", "Conv1D")


def test_a_module_that_shares_a_tracked_weight_is_tracked_whatever_its_type() -> None:
    selection = select_modules(gpt2(), types=LINEAR)
    block = next(block for block in selection.blocks if block.tied)
    assert (block.name, block.tied) == ("transformer.wte", ("lm_head",))
    assert "transformer.wpe" not in {module.name for module in selection.modules}


def test_an_excluded_partner_is_named() -> None:
    selection = select_modules(Transformer(tied=True), types=LINEAR, exclude=["embed"])
    assert "shares its weight with 'head'" in selection.skipped["embed"]


def test_globs_choose_by_name_and_exclusion_wins() -> None:
    selection = select_modules(Transformer(), types=LINEAR, include=["attention.*", "up"], exclude=["*.v"])
    assert [module.name for module in selection.modules] == ["attention.q", "attention.k", "attention.o", "up"]


def test_a_module_named_exactly_is_tracked_whatever_its_type() -> None:
    selection = select_modules(Transformer(), types=LINEAR, include=["first_norm", "up"])
    assert [module.name for module in selection.modules] == ["first_norm", "up"]


def test_frozen_modules_are_left_out_unless_asked_for() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert [module.name for module in select_modules(model).modules] == ["1"]
    assert "frozen" in select_modules(model).skipped["0"]
    assert [module.name for module in select_modules(model, frozen=True).modules] == ["0", "1"]


def test_a_linear_layer_with_a_forward_of_its_own_is_named() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 1)

    selection = select_modules(nn.Sequential(Noisy(2, 2), nn.Linear(2, 2)))
    assert selection.skipped == {"0": "Noisy overrides the forward pass of its parent"}


def test_the_share_of_parameters_counts_each_once() -> None:
    model = Transformer(tied=True)
    selection = select_modules(model)
    assert selection.covered == selection.parameters == sum(p.numel() for p in model.parameters())


def test_a_reused_bias_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].bias = model[0].bias
    with pytest.raises(Exception, match="'0' and '1' share one bias"):
        select_modules(model)


def test_globs_that_fit_nothing_are_said() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    with pytest.raises(
        ConfigError, match=r"modules.batch_dim: 'inner.\*' fits no module of the model; its modules are"
    ):
        select_modules(model, batch_dim={"inner.*": 1})
    with pytest.warns(RuntimeWarning, match="modules.exclude: 'heads' fits no module of the model, so nothing is left"):
        select_modules(model, exclude=("heads",))
    select_modules(model, exclude=("*lm_head",))


class Scaled(nn.Module):
    """Multiplies by a weight of its own, as adapters of many kinds do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(2, 2), nn.Parameter(torch.ones(2))


def test_trained_weights_of_a_type_without_a_rule_are_named() -> None:
    model = nn.Sequential(Scaled(), nn.Linear(2, 2))
    assert select_modules(model).skipped == {"0": "Scaled has no rule"}
    assert select_modules(Scaled()).skipped == {"the model itself": "Scaled has no rule"}
    model[0].scale.requires_grad_(False)
    assert select_modules(model).skipped == {}


def test_what_is_trained_is_said_where_nothing_can_be_tracked() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Embedding(3, 2), Scaled())
    for frozen in (model[0], model[2].inner):
        frozen.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"what is trained is '1' \(Embedding\), '2' \(Scaled has no rule\): name"):
        select_modules(model, types=LINEAR)
    with pytest.raises(ConfigError, match=r"left out: '0' .*frozen.* tracked with modules.frozen=true"):
        select_modules(model.requires_grad_(False), types=LINEAR)
