"""Bad input is answered by a clear error, and nothing that was logged is lost."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import logix_like as logix
from logix_like.errors import (
    CaptureError,
    ConfigError,
    EmptyStoreError,
    ModelMismatchError,
    StoreError,
    StoreExistsError,
    StoreNotFoundError,
    UnsupportedModuleError,
)
from tests.interrupts import broken_off_at
from tests.training import SAMPLES, data, network, trained_run


def step(run: logix.Run, model: nn.Module, ids: object, size: int = 4) -> None:
    x, y = data(next(model.parameters()).dtype)
    with run(data_id=ids):
        F.cross_entropy(model(x[:size]), y[:size]).backward()


@pytest.fixture
def model() -> nn.Module:
    return network()


@pytest.fixture
def run(tmp_path: Path, model: nn.Module) -> logix.Run:
    return logix.init("run", model, root=str(tmp_path), verbose=False)


@pytest.mark.parametrize("ids", [["a", "b", "c"], range(5), torch.arange(9)])
def test_a_wrong_number_of_ids_names_the_module(run: logix.Run, model: nn.Module, ids: object) -> None:
    with pytest.raises(CaptureError, match=r"module '0': its input has shape \(4, 6\), so 4 samples .* data ids"):
        step(run, model, ids)
    step(run, model, range(4))
    run.finalize()
    assert len(run.store) == 4


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1.5] * 4, "1.5 is a float"),
        ([True] * 4, "is a bool"),
        ([None] * 4, "None is a NoneType"),
        ("abcd", "give a sequence"),
        (torch.rand(4), "whole numbers"),
        (torch.zeros(4, 2, 2, dtype=torch.long), "whole numbers"),
        ([], "data_id is empty"),
    ],
)
def test_ids_that_are_none(run: logix.Run, model: nn.Module, ids: object, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        step(run, model, ids)
    run.finalize()


def test_rows_that_are_not_finite_are_flagged_and_left_out(run: logix.Run, model: nn.Module) -> None:
    x, y = data()
    x[2] = float("nan")
    with run(data_id=["a", "b", "bad", "d"]):
        F.cross_entropy(model(x[:4]), y[:4], reduction="none").mean().backward()
    model.zero_grad()
    x, y = data()
    with run(data_id=["e", "f"]):
        F.cross_entropy(model(x[4:6]), y[4:6]).backward()
    run.finalize()
    store = run.store
    assert list(store.valid[:]) == [True, True, False, True, True, True]
    assert len(store) == 6
    assert store.statistics.sums["0"]["rows"] == 5
    assert all(bool(torch.isfinite(t).all()) for sums in store.statistics.sums.values() for t in sums.values())
    with run.query(data_id=["q"]) as query:
        F.cross_entropy(model(x[:1]), y[:1]).backward()
    result = run.compute_influence_all(query)
    assert list(result.data_id) == ["a", "b", "d", "e", "f"]


def test_backward_outside_the_block(run: logix.Run, model: nn.Module) -> None:
    x, y = data()
    with pytest.raises(CaptureError, match=r"call loss.backward\(\) inside"), run(data_id=range(4)):
        loss = F.cross_entropy(model(x[:4]), y[:4])
    loss.backward()
    with pytest.raises(CaptureError, match="no tracked module was called"), run(data_id=range(4)):
        pass
    step(run, model, range(4))
    run.finalize()
    assert len(run.store) == 4


def test_an_exception_in_a_block_loses_that_block_only(run: logix.Run, model: nn.Module) -> None:
    step(run, model, ["a", "b", "c", "d"])
    with pytest.raises(RuntimeError, match="mat1 and mat2"), run(data_id=["x"]):
        model(torch.zeros(1, 99, dtype=torch.float64))
    step(run, model, ["e", "f", "g", "h"])
    run.finalize()
    assert list(run.store.data_id[:]) == list("abcdefgh")


# Between open() and its "with" a file is left to be closed when it is forgotten, which Python tells of.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_block_that_is_broken_off_anywhere_leaves_nothing_on_the_model(run: logix.Run, model: nn.Module) -> None:
    """Ctrl-C at every 11th place of the interpreter: at most the open block is to be dropped by hand, as is said."""
    left = 0
    for at in itertools.count(1, 11):
        if broken_off_at(at, lambda: step(run, model, range(4))):
            break
        run.abort()
        left += sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
        for module in model.modules():
            module._forward_hooks.clear()
    torch.compiler.set_stance("default")  # broken off right behind torch's own set_stance, it stays as it was set
    assert at > 1000 and left <= 4, "more than what is broken off within torch's own register_forward_hook"
    run.finalize()
    assert len(run.store) % 4 == 0 and len(run.store)
    assert len({tuple(row.tolist()) for row in run.store.gradients[:]}) == 4, "torn or mixed rows"


def test_blocks_are_not_nested(run: logix.Run, model: nn.Module) -> None:
    run.start(data_id=range(4))
    with pytest.raises(CaptureError, match="already"):
        run.start(data_id=range(4))
    x, y = data()
    F.cross_entropy(model(x[:4]), y[:4]).backward()
    run.end()
    with pytest.raises(CaptureError, match="without start"):
        run.end()
    run.finalize()


def test_a_path_that_holds_another_run(tmp_path: Path, run: logix.Run, model: nn.Module) -> None:
    step(run, model, range(4))
    run.finalize()
    with pytest.raises(StoreExistsError, match=r"resume=True .* overwrite=True"):
        logix.init("run", model, root=str(tmp_path))
    resumed = logix.init("run", model, root=str(tmp_path), resume=True, verbose=False)
    assert resumed.resumed_at == (-1, 0)
    step(resumed, model, range(4, 8))
    resumed.finalize()
    assert list(resumed.store.data_id[:]) == list(range(8))
    assert list(resumed.store.step[:]) == [0] * 4 + [1] * 4
    fresh = logix.init("run", model, root=str(tmp_path), overwrite=True, verbose=False)
    step(fresh, model, ["new"] * 4)
    fresh.finalize()
    assert set(fresh.store.data_id[:]) == {"new"}


def test_a_notebook_goes_on_with_a_run_that_it_has_lost(tmp_path: Path, run: logix.Run, model: nn.Module) -> None:
    """The traceback of an interrupted cell keeps its run alive, and nobody can end it any more."""
    step(run, model, range(4))
    resumed = logix.init("run", model, root=str(tmp_path), resume=True, verbose=False)
    assert resumed.resumed_at == (-1, 0)
    step(resumed, model, range(4, 8))
    with pytest.raises(StoreError, match="a later init"):
        step(run, model, range(8, 12))
    for act in (run.commit, run.checkpoint, run.finalize):
        with pytest.raises(StoreError, match="a later init"):
            act()
    resumed.finalize()
    assert list(resumed.store.data_id[:]) == list(range(8))


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_an_optimizer_that_outlives_its_run_trains_for_the_next(tmp_path: Path, model: nn.Module, how: str) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings: dict[str, Any] = {"root": str(tmp_path), "verbose": False, "checkpoints": {"every_steps": 1}}
    first = logix.init("run", model, optimizer=optimizer, **settings)
    step(first, model, range(4))
    optimizer.step()
    again = logix.init("run", model, optimizer=optimizer, **{how: True}, **settings)
    step(again, model, range(4, 8))
    optimizer.step()
    again.finalize()
    assert [record.step for record in again.store.checkpoints] == ([1, 2] if how == "resume" else [1])


def test_a_resumed_store_without_rows_is_at_no_step(tmp_path: Path, run: logix.Run, model: nn.Module) -> None:
    again = logix.init("run", model, root=str(tmp_path), resume=True, verbose=False)
    assert again.resumed_at is None
    step(again, model, range(4))
    again.finalize()
    assert list(again.store.step[:]) == [0] * 4


def test_resuming_with_another_model_is_refused(tmp_path: Path, run: logix.Run, model: nn.Module) -> None:
    step(run, model, range(4))
    run.finalize()
    with pytest.raises(ModelMismatchError, match="'2'"):
        logix.init("run", nn.Sequential(nn.Linear(6, 8)), root=str(tmp_path), resume=True)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (
            nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)),
            r"'2'.*shape is \(4, 9\), logged was \(3, 9\)",
        ),
        (nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3)), r"'0'.*shape"),
        (nn.Sequential(nn.Linear(6, 8)), "'2', which was tracked, is not in this model"),
        (nn.Sequential(nn.Conv1d(6, 8, 1), nn.Tanh(), nn.Linear(8, 3)), "'0'.*kind is 'conv'"),
    ],
)
def test_another_model_names_the_first_difference(
    tmp_path: Path, model: nn.Module, other: nn.Module, difference: str
) -> None:
    trained_run(tmp_path, model)
    with pytest.raises(ModelMismatchError, match=difference):
        logix.load(tmp_path / "run", other)


def test_other_weights_are_warned_of_once(tmp_path: Path, model: nn.Module) -> None:
    trained_run(tmp_path, model)
    x, y = data()
    run = logix.load(tmp_path / "run", model)
    with run.query(data_id=["q"]):
        F.cross_entropy(model(x[:1]), y[:1]).backward()
    run = logix.load(tmp_path / "run", model)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    with pytest.warns(RuntimeWarning, match="weights are neither"), run.query(data_id=["q"]):
        F.cross_entropy(model(x[:1]), y[:1]).backward()


def test_an_empty_store(run: logix.Run, model: nn.Module, tmp_path: Path) -> None:
    x, y = data()
    with run.query(data_id=["q"]) as query:
        F.cross_entropy(model(x[:1]), y[:1]).backward()
    with pytest.raises(EmptyStoreError, match="no rows"):
        run.compute_influence_all(query)
    run.finalize()
    assert len(logix.open_store(tmp_path / "run")) == 0
    with pytest.raises(EmptyStoreError):
        logix.load(tmp_path / "run", model).compute_self_influence()


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="nothing"):
        logix.load(tmp_path / "nothing")


def test_no_model(tmp_path: Path) -> None:
    run = logix.init("run", root=str(tmp_path))
    with pytest.raises(CaptureError, match="no model is watched"):
        run.start(data_id=[1])


def test_watching(run: logix.Run, model: nn.Module) -> None:
    run.watch(model)
    step(run, model, range(4))
    with pytest.raises(CaptureError, match="another model"):
        run.watch(network())
    run.finalize()
    run.finalize()
    assert len(run.store) == 4
    expected = float(run.store.statistics.covariance("0").trace())
    assert expected == pytest.approx(float(run.store.gradients[:][:, : 8 * 7].square().sum(1).mean()), rel=1e-2)


def test_no_project_and_unknown_words(tmp_path: Path, run: logix.Run) -> None:
    with pytest.raises(ConfigError, match="no project"):
        logix.init()
    with pytest.raises(ConfigError, match="'modules'"):
        logix.init("p", modulse={}, root=str(tmp_path))
    with pytest.raises(ConfigError, match="known are log, mean, variance, covariance, corrected_eigval"):
        run.setup({"grad": ["logs"]})
    with pytest.raises(ConfigError, match="known are grad, forward, backward"):
        run.setup({"gradient": ["log"]})
    with pytest.raises(ConfigError, match=r"every_steps .*optimizer"):
        logix.init("p", root=str(tmp_path), checkpoints={"every_steps": 3})
    run.finalize()


def test_modules_that_cannot_be_tracked(tmp_path: Path) -> None:
    model = nn.ModuleDict({"act": nn.PReLU(), "rnn": nn.LSTM(3, 4), "fc": nn.Linear(3, 4)})
    with pytest.raises(UnsupportedModuleError, match=r"'rnn' \(LSTM\) .* rules exist for Linear"):
        logix.init("a", model, root=str(tmp_path), modules={"include": ["rnn"]})
    with pytest.raises(ConfigError, match=r"'dense\*' fits no module"):
        logix.init("b", model, root=str(tmp_path), modules={"include": ["dense*"]})
    with pytest.raises(ConfigError, match="'LSTM' has no rule; rules exist for"):
        logix.init("c", model, root=str(tmp_path), modules={"types": ["LSTM"]})
    attention = nn.MultiheadAttention(4, 2, kdim=3)
    with pytest.raises(ConfigError, match="MultiheadAttention with kdim or vdim uses its weights without calling them"):
        logix.init("d", attention, root=str(tmp_path))


def test_a_module_that_mixes_samples_is_refused_by_name(tmp_path: Path) -> None:
    class Flattened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.tokens(x.flatten(0, 1))

    model = Flattened()
    run = logix.init("run", model, root=str(tmp_path), verbose=False)
    with (
        pytest.raises(CaptureError, match=r"module 'tokens': .*20 samples .*but 4 data ids"),
        run(data_id=range(4)),
    ):
        model(torch.randn(4, 5, 3)).sum().backward()
    run.finalize()


def test_checkpoints_that_do_not_exist(run: logix.Run, model: nn.Module) -> None:
    step(run, model, range(4))
    with pytest.raises(StoreError, match="no checkpoint"):
        next(iter(run.at_checkpoints()))
    run.checkpoint()
    with pytest.raises(StoreError, match="numbers 1"):
        next(iter(run.at_checkpoints([7])))
    run.finalize()


def test_a_query_that_was_never_run(run: logix.Run, model: nn.Module) -> None:
    step(run, model, range(4))
    with pytest.raises(CaptureError, match="no tracked module"), run.query(data_id=["q"]) as query:
        pass
    with pytest.raises(logix.LogixError, match="holds no gradient"):
        run.compute_influence_all(query)
    run.finalize()


def test_a_script_that_never_finalizes_keeps_its_rows(tmp_path: Path) -> None:
    script = (
        "import torch, logix_like as logix\n"
        "model = torch.nn.Linear(3, 2)\n"
        f"run = logix.init('run', model, root={str(tmp_path)!r}, verbose=False)\n"
        "for i in range(3):\n"
        "    with run(data_id=[i]):\n"
        "        model(torch.ones(1, 3)).sum().backward()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)
    assert list(logix.open_store(tmp_path / "run").data_id[:]) == [0, 1, 2]


def test_shuffled_loaders_need_ids(run: logix.Run) -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=4, shuffle=True)
    with pytest.raises(ConfigError, match="shuffles"):
        run.extract(loader, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    run.finalize()
    assert len(run.store) == 0
    assert SAMPLES > 0


WRONG_OPTIONS: dict[str, tuple[dict[str, object], str]] = {
    "a scale of text": ({"scale": "0.5"}, "scale is 0.5; give the positive factor"),
    "no scale": ({"scale": None}, "scale is None"),
    "an endless scale": ({"scale": float("inf")}, "scale is inf"),
    "no scaler": ({"scaler": "cuda"}, "scaler is 'cuda'; give the torch.amp.GradScaler"),
    "columns in a list": ({"metadata": ["label"]}, "metadata is a list"),
    "one text for all": ({"metadata": {"split": "abcd"}}, "metadata .split. is .abcd.; give a sequence with one value"),
    "one number for all": ({"metadata": {"fold": 3}}, "metadata .fold. is 3; give a sequence"),
    "one tensor for all": ({"metadata": {"fold": torch.tensor(3)}}, r"metadata .fold. is tensor\(3\); give a sequence"),
    "vectors in a column": ({"metadata": {"label": torch.zeros(4, 2)}}, "a metadata value is tensor"),
    "an empty mask": ({"mask": [[0] * 6] * 4, "loss_reduction": "token_mean"}, "mask leaves out every token"),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_options_of_a_block_that_make_no_sense(run: logix.Run, model: nn.Module, case: str) -> None:
    options, said = WRONG_OPTIONS[case]
    x, y = data()
    with pytest.raises(CaptureError, match=said), run(data_id=range(4), **options):
        F.cross_entropy(model(x[:4]), y[:4]).backward()
    step(run, model, range(4))
    run.finalize()
    assert len(run.store) == 4


@pytest.mark.parametrize("number", [None, "one", 1.5, -1])
def test_steps_and_epochs_that_are_no_numbers_reach_no_store(run: logix.Run, model: nn.Module, number: Any) -> None:
    with pytest.raises(ConfigError, match=r"the epoch is .*whole number"):
        run.epoch(number)
    if number is not None:
        with pytest.raises(ConfigError, match=r"the step is .*whole number"):
            run.step(number)
    run.epoch(torch.tensor(2))
    step(run, model, range(4))
    run.finalize()
    assert list(run.store.epoch) == [2] * 4


def test_a_step_is_not_gone_back_on(run: logix.Run, model: nn.Module) -> None:
    """Its rows would count twice; before the first row any number may be told."""
    assert [run.step(9), run.step(3), run.step(5)] == [9, 3, 5]
    step(run, model, range(4))
    stood = run.step()
    with pytest.raises(ConfigError, match=rf"step is 2, but the run stands at {stood}.*resume=True, resume_step=2"):
        run.step(2)
    assert run.step() == run.step(stood) == stood
    run.finalize()
    again = logix.init("run", model, run.config, resume=True, verbose=False)
    with pytest.raises(ConfigError, match="resume_step=0"):
        again.step(0)
    again.finalize()
    assert len(again.store) == 4


def test_forgetting_nothing_takes_nothing_back(run: logix.Run, model: nn.Module) -> None:
    step(run, model, range(4))
    assert run.forget([]) == 0
    run.finalize()
    assert run.store.valid.all()


@pytest.mark.parametrize("given", ["at once", "by watch", "when resuming"])
def test_an_optimizer_of_another_model_is_refused(tmp_path: Path, model: nn.Module, given: str) -> None:
    others = torch.optim.SGD(network().parameters(), lr=0.1)  # as a notebook's that made the model anew
    settings: dict[str, Any] = {"root": str(tmp_path), "verbose": False, "optimizer": others}
    if given == "when resuming":
        logix.init("run", model, root=str(tmp_path), verbose=False).finalize()
    with pytest.raises(ConfigError, match=r"holds none of the 4 parameters of the model, but 4 other tensors"):
        if given == "by watch":
            logix.init("run", **settings).watch(model)
        else:
            logix.init("run", model, resume=given == "when resuming", **settings)
    assert given != "at once" or not list(tmp_path.iterdir())


@pytest.mark.parametrize("held", ["flat", "master"])
def test_an_optimizer_of_stand_ins_is_warned_of(tmp_path: Path, held: str) -> None:
    model = network().to(torch.bfloat16)
    copies = [parameter.detach().float().requires_grad_() for parameter in model.parameters()]
    if held == "flat":
        copies = [torch.cat([one.flatten() for one in copies]).bfloat16().detach().requires_grad_()]
    with pytest.warns(RuntimeWarning, match="may be flattened from them or copies of them"):
        logix.init("run", model, root=str(tmp_path), optimizer=torch.optim.SGD(copies, lr=0.1), verbose=False)


@pytest.mark.parametrize("part", ["one layer", "wrapped", "adapter"])
def test_an_optimizer_of_a_part_of_the_model_is_its_own(tmp_path: Path, model: nn.Module, part: str) -> None:
    trained = list(model.parameters())
    if part == "adapter":
        model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(trained[-2:] if part != "wrapped" else trained, lr=0.1)
    whole = model if part != "wrapped" else torch.compile(model, backend="eager")
    assert isinstance(whole, nn.Module)
    logix.init("run", whole, root=str(tmp_path), optimizer=optimizer, verbose=False).finalize()
