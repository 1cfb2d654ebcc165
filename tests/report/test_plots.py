"""Plots draw what they are given, and say what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle, StepPatch

from logix_like.errors import QueryError
from logix_like.query.result import InfluenceResult
from logix_like.report import figures, plots
from logix_like.report.concentration import held_by, share_of_first


@pytest.fixture
def ax() -> Axes:
    return Figure().add_subplot()


def result(scores: torch.Tensor) -> InfluenceResult:
    ids = np.arange(scores.shape[1]).astype(object)
    names = tuple(f"q{q}" for q in range(len(scores)))
    return InfluenceResult(names, len(ids), "dot", "auto", 0.1, "mean", "exact", "note", ids, scores)


def test_shares_of_the_strongest() -> None:
    scores = np.array([-8.0] + [1.0] * 2 + [0.0] * 97)
    assert share_of_first(scores, 0.01) == 0.8
    assert share_of_first(scores, 0.02) == 0.9
    assert share_of_first(np.zeros(5)) == 0.0
    assert share_of_first(np.array([3.0]), 0.01) == 1.0
    assert held_by(scores, [0, 0.005, 0.01, 1]).tolist() == [0, 0.4, 0.8, 1]


def test_a_distribution_counts_every_sample(ax: Axes) -> None:
    scores = torch.linspace(-1, 1, plots.BINS)[None].repeat(2, 1)
    plots.influence_distribution(result(scores), ax, query=1, k=3)
    steps, bottom, top = ax.patches
    assert isinstance(steps, StepPatch)
    assert np.asarray(steps.get_data()[0]).tolist() == [1.0] * plots.BINS
    assert top.get_path().vertices[::2, 0].tolist() == scores[0].flip(0)[:3].tolist()
    assert bottom.get_path().vertices[::2, 0].tolist() == scores[0][:3].tolist()
    assert "q1" in ax.get_title()


def test_extremes_have_no_distribution(ax: Axes) -> None:
    full = result(torch.randn(1, 5))
    fields = {name: getattr(full, name) for name in full.__dataclass_fields__} | {"scores": None, "data_id": None}
    with pytest.raises(QueryError, match="ask without k="):
        plots.influence_distribution(InfluenceResult(**fields), ax)


def test_even_influence_lies_on_the_diagonal(ax: Axes) -> None:
    plots.concentration(result(torch.ones(2, 1000)), ax)
    line = ax.lines[-2]
    assert np.allclose(line.get_xdata(), line.get_ydata())


def test_bars_curves_and_maps(ax: Axes) -> None:
    plots.module_shares({"a": 0.5, "b": -0.25}, ax)
    assert [patch.get_width() for patch in ax.patches if isinstance(patch, Rectangle)] == [50, -25]
    plots.lds_bars({"ours": (0.5, 0.4, 0.6)}, ax.figure.add_subplot(), ceiling=0.9)
    plots.removal_curve(
        [0, 10], {"random": [1.0, 0.9], "ours": np.array([[1, 1], [0.5, 0.7]])}, ax.figure.add_subplot()
    )
    plots.sensitivity_map([[0.1, float("nan")]], ["r"], ["a", "b"], drawn := ax.figure.add_subplot())
    assert [text.get_text() for text in drawn.texts] == ["0.10"]


def test_norms_over_steps_are_medians(ax: Axes) -> None:
    step = np.repeat([0, 1, -1], 3)
    plots.norms_by_step(step, [1, 2, 3, 4, 5, 6, 1e9, 1e9, 1e9], ax, "layer 1")
    assert ax.lines[0].get_ydata().tolist() == [3.5]  # one bin of two steps; unknown steps are left out


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda ax: plots.lds_bars({"x": (0.5, 0.6, 0.7)}, ax), "lower end <= score"),
        (lambda ax: plots.removal_curve([1, 2], {"x": [1, 2, 3]}, ax), "it needs 2 values"),
        (lambda ax: plots.sensitivity_map([[1]], ["a"], ["b", "c"], ax), "1 rows and 2 columns"),
        (lambda ax: plots.norms_by_step([-1], [1.0], ax), "no row has a known step"),
    ],
)
def test_what_does_not_fit_is_refused(ax: Axes, draw: Callable[[Axes], object], message: str) -> None:
    with pytest.raises(QueryError, match=message):
        draw(ax)


def test_pieces_of_a_page_take_its_colours() -> None:
    drawn = figures.distributions(result(torch.randn(3, 50)), 2)
    assert len(drawn) == 3
    for svg in (*drawn, figures.figure(lambda ax: ax.plot([0, 1]), 2, 1, "a line")):
        assert svg.startswith("<svg viewBox=") and 'role="img"' in svg
        assert "clip-path" not in svg and "xmlns" not in svg and "xlink" not in svg
        identities = set(re.findall(r' id="([^"]*)"', svg))
        assert identities == set(re.findall(r'href="#([^"]*)"', svg))
    assert all("var(--for)" in svg and "var(--against)" in svg and "var(--bars)" in svg for svg in drawn)


def test_zero_is_found_in_a_distribution() -> None:
    places = figures.zero_places(result(torch.tensor([[-1.0, 3.0], [0.0, 2.0], [1.0, 2.0], [5.0, 5.0]])))
    assert places[:2] == [0.25, 0.0]
    assert np.isnan(places[2:]).all()


def test_names_are_text_and_no_formula(ax: Axes) -> None:
    odd = "$\\frac{$"
    named = result(torch.randn(1, 20))
    fields = {name: getattr(named, name) for name in named.__dataclass_fields__} | {"query_id": (odd,)}
    svg = figures.figure(lambda axis: plots.influence_distribution(InfluenceResult(**fields), axis), 4, 2, "scores")
    assert odd in svg
    assert odd in figures.figure(lambda axis: plots.module_shares({odd: 0.5}, axis), 4, 2, "shares")
    assert odd in figures.figure(lambda axis: plots.lds_bars({odd: (0.1, 0, 0.2)}, axis), 4, 2, "bars")


def test_a_map_without_any_measurement_is_empty(ax: Axes) -> None:
    assert not plots.sensitivity_map([[np.nan]], ["a"], ["b"], ax).texts


def test_a_line_takes_the_pages_colour() -> None:
    svg = figures.figure(lambda ax: plots.norms_by_step(np.arange(9), np.ones(9), ax), 4, 2, "norms")
    assert "var(--for)" in svg
