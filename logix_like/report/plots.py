"""Plots of results on a matplotlib axis, for notebooks and for the report.

Each function draws what it is given on ``ax`` and returns it; nothing is shown or saved, no setting of matplotlib
is changed. Proponents are blue, opponents orange.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from logix_like.errors import QueryError
from logix_like.query.result import InfluenceResult
from logix_like.report.concentration import held_by
from logix_like.report.content import short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PROPONENT = "#1f6fb4"
OPPONENT = "#c2571a"
NEUTRAL = "#7c8794"

BINS = 61
"""Bars of a distribution."""
SHARES = np.concatenate([[0.0], np.geomspace(1e-4, 1, 60)])
"""Where the curve of concentration is drawn."""


def influence_distribution(result: InfluenceResult, ax: Axes, query: int = 0, k: int = 10) -> Axes:
    """The scores of all samples for one query, with its ``k`` first proponents and opponents marked below.

    Heights are square roots of counts: the few samples that matter stay visible beside the many that do not.

    Raises:
        QueryError: the result holds extremes only (it was asked for with ``k=``).
    """
    scores = all_scores(result)[query]
    k = min(k, result.held)
    draw_distribution(
        ax,
        scores,
        result.proponents(k).scores[query].numpy(),
        result.opponents(k).scores[query].numpy(),
    )
    low, high = float(scores.min()), float(scores.max())
    ax.set_xlim(low - 0.02 * (high - low or 1.0), high + 0.02 * (high - low or 1.0))
    ax.set_ylim(-0.25, 1.05)
    ax.set_yticks([])
    ax.set_xlabel("score (positive: training on the sample lowered the query's loss)")
    ax.set_ylabel("samples (root of count)")
    ax.set_title(f"Influence on {short_name(result.query_id[query])}", parse_math=False)
    return ax


def all_scores(result: InfluenceResult) -> np.ndarray[Any, np.dtype[np.floating[Any]]]:
    """``[queries, samples]``; :class:`QueryError` where a result holds extremes only."""
    if result.scores is None:
        raise QueryError(
            "this result holds the first samples only; a distribution needs the scores of all: ask without k="
        )
    return result.scores.numpy()


def draw_distribution(ax: Axes, scores: ArrayLike, top: ArrayLike, bottom: ArrayLike, **style: Any) -> list[Any]:
    """A histogram of ``scores`` with ``top`` and ``bottom`` marked below it; returns what was drawn.

    The axis's limits are left alone. ``style`` goes to every artist, e.g. a ``transform`` that lays many
    distributions over one another.
    """
    from matplotlib.patches import PathPatch, StepPatch
    from matplotlib.path import Path

    counts, edges = np.histogram(np.asarray(scores, dtype=np.float64), bins=BINS)
    heights = np.sqrt(counts / max(1, counts.max()))
    drawn: list[Any] = [StepPatch(heights, edges, fill=True, color=NEUTRAL, linewidth=0, **style)]
    for marked, colour in ((bottom, OPPONENT), (top, PROPONENT)):
        places = np.repeat(np.asarray(marked, dtype=np.float64), 2)
        ends = np.column_stack([places, np.tile([-0.22, -0.06], len(places) // 2)])
        codes = np.tile([Path.MOVETO, Path.LINETO], len(places) // 2)
        drawn.append(PathPatch(Path(ends, codes), fill=False, edgecolor=colour, linewidth=1.4, **style))
    for artist in drawn:
        ax.add_artist(artist)
    return drawn


def concentration(result: InfluenceResult, ax: Axes) -> Axes:
    """How much of all influence the strongest samples hold; one line for each query, the median in bold.

    On the diagonal influence would be spread evenly. Raises :class:`QueryError` without all scores.
    """
    curves = np.stack([held_by(row, SHARES.tolist()) for row in all_scores(result)])
    for curve in curves[:200]:
        ax.plot(100 * SHARES, 100 * curve, color=NEUTRAL, linewidth=0.7, alpha=0.6)
    ax.plot(100 * SHARES, 100 * np.median(curves, axis=0), color=PROPONENT, linewidth=2.0)
    ax.plot([0, 100], [0, 100], color=NEUTRAL, linewidth=0.8, linestyle=":")
    ax.set_xlabel("% of the samples, strongest first")
    ax.set_ylabel("% of all |score|")
    ax.set_xlim(0, 100)
    ax.set_ylim(0, 101)
    return ax


def module_shares(shares: Mapping[str, float], ax: Axes) -> Axes:
    """How much each module (or layer) adds to some scores, as bars; ``shares`` by name, in order."""
    names, values = list(shares), np.array(list(shares.values()))
    colours = [PROPONENT if value >= 0 else OPPONENT for value in values]
    places = np.arange(len(names))[::-1]
    ax.barh(places, 100 * values, color=colours, height=0.7)
    ax.set_yticks(places, [short_name(name) for name in names], parse_math=False)
    ax.axvline(0, color=NEUTRAL, linewidth=0.8)
    ax.set_xlabel("% of the score")
    return ax


def removal_curve(removed: ArrayLike, curves: Mapping[str, ArrayLike], ax: Axes) -> Axes:
    """What happened to a measure when samples were removed and the model was trained again.

    Args:
        removed: ``[n]`` how many samples were removed.
        curves: by the name of the order of removal, ``[n]``, or ``[n, repetitions]`` whose spread is shaded.
        ax: where to draw.
    """
    places = np.asarray(removed)
    for name, values in curves.items():
        lines = np.asarray(values, dtype=np.float64)
        if lines.shape[:1] != places.shape:
            raise QueryError(f"curve {name!r} has the shape {lines.shape}; it needs {places.size} values, one a point")
        lines = lines.reshape(len(places), -1)
        (line,) = ax.plot(places, lines.mean(axis=1), marker="o", markersize=3, label=name)
        if lines.shape[1] > 1:
            ax.fill_between(
                places, lines.min(axis=1), lines.max(axis=1), color=line.get_color(), alpha=0.15, linewidth=0
            )
    ax.set_xlabel("samples removed")
    ax.set_ylabel("measure after training again")
    ax.legend(frameon=False)
    return ax


def lds_bars(scores: Mapping[str, tuple[float, float, float]], ax: Axes, ceiling: float | None = None) -> Axes:
    """Linear datamodeling scores as bars with intervals.

    Args:
        scores: by the estimator's name: score, lower and upper end of its interval.
        ax: where to draw.
        ceiling: the score that the truth reaches against another sample of itself, as a line.
    """
    places = np.arange(len(scores))[::-1]
    values = np.array(list(scores.values()), dtype=np.float64).reshape(-1, 3)
    middle, low, high = values.T
    if (low > middle).any() or (high < middle).any():
        raise QueryError("each entry must be (score, lower end, upper end) with lower end <= score <= upper end")
    ax.barh(places, middle, color=PROPONENT, height=0.65)
    ax.errorbar(middle, places, xerr=[middle - low, high - middle], fmt="none", ecolor=NEUTRAL, capsize=3)
    if ceiling is not None:
        ax.axvline(ceiling, color=OPPONENT, linestyle="--", linewidth=1)
        above = ax.get_xaxis_transform()  # beside the line's end, where no bar is
        ax.text(ceiling, 1.01, f"noise ceiling {ceiling:.2f}", ha="center", va="bottom", transform=above)
    ax.set_yticks(places, list(scores), parse_math=False)
    ax.set_xlabel("linear datamodeling score (Spearman)")
    return ax


def sensitivity_map(values: ArrayLike, rows: Sequence[str], columns: Sequence[str], ax: Axes) -> Axes:
    """A measure under two settings, e.g. the LDS by damping and rank, as a map with its numbers.

    ``values`` is ``[rows, columns]``; what is NaN was not measured and stays empty.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.shape != (len(rows), len(columns)):
        raise QueryError(f"values have the shape {table.shape}; {len(rows)} rows and {len(columns)} columns are named")
    ax.imshow(np.ma.masked_invalid(table), cmap="cividis", aspect="auto")
    ax.set_xticks(range(len(columns)), columns, parse_math=False)
    ax.set_yticks(range(len(rows)), rows, parse_math=False)
    known = table[np.isfinite(table)]
    middle = (known.min() + known.max()) / 2 if known.size else 0.0
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            colour = "black" if value > middle else "white"
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
    return ax


def norms_by_step(step: ArrayLike, norms: ArrayLike, ax: Axes, name: str = "") -> Axes:
    """Gradient norms over the steps: the median, with the range from the 5th to the 95th percentile shaded.

    Args:
        step: ``[rows]``, e.g. ``store.step``.
        norms: ``[rows]``, e.g. ``store.norm``, or the norms of one layer's columns.
        ax: where to draw; call again with another ``name`` for the next layer.
        name: what the norms are of, for a legend.
    """
    steps, values = np.asarray(step), np.asarray(norms, dtype=np.float64)
    known = (steps >= 0) & np.isfinite(values) & (values > 0)
    if not known.any():
        raise QueryError("no row has a known step and a norm above 0; give init(optimizer=...) to count steps")
    edges = np.unique(np.quantile(steps[known], np.linspace(0, 1, 61)).round())
    place = np.clip(np.searchsorted(edges, steps[known], side="right") - 1, 0, max(0, len(edges) - 2))
    used = np.unique(place)
    lines = np.array([np.quantile(values[known][place == one], (0.05, 0.5, 0.95)) for one in used])
    (line,) = ax.plot(edges[used], lines[:, 1], label=name)
    ax.fill_between(edges[used], lines[:, 0], lines[:, 2], color=line.get_color(), alpha=0.15, linewidth=0)
    ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("norm of a sample's gradient")
    if name:
        ax.legend(frameon=False)
    return ax
