"""Plots as pieces of a page: drawn by matplotlib, coloured by the page.

A piece is inline SVG whose colours are the page's CSS variables, so that it follows light and dark; words are text,
in the page's font. Distributions, one for each query, are drawn over one another on a single axis and cut apart
afterwards: matplotlib's cost for a figure is paid once, not once for each query.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from logix_like.errors import MissingDependencyError
from logix_like.report import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from logix_like.query.result import InfluenceResult

SVG = "http://www.w3.org/2000/svg"
THEME = {
    plots.PROPONENT: "var(--for)",
    plots.OPPONENT: "var(--against)",
    plots.NEUTRAL: "var(--bars)",
    "#000000": "currentColor",
}
"""A plot's colours in the page's."""

_ATTRIBUTES = re.compile(r' (?:xmlns:?\w*|clip-path)="[^"]*"')
_ID = re.compile(r' id="([^"]*)"')
_REFERENCE = re.compile(r'href="#([^"]*)"')
_FAMILY = re.compile(r"font-family: [^;\"]*;?")
_DIGITS = re.compile(r"(\d+\.\d)\d+")
_SPACE = re.compile(r"\s+")

SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "logix_like",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "savefig.transparent": True,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.prop_cycle": f"cycler('color', ['{plots.PROPONENT}', '{plots.OPPONENT}', '{plots.NEUTRAL}'])",
}


def figure(draw: Callable[[Axes], object], width: float, height: float, label: str) -> str:
    """What ``draw`` draws on an axis, as inline SVG; ``label`` says for those who do not see it what it shows."""
    mpl = _matplotlib()
    with mpl.rc_context(SETTINGS):
        canvas = mpl.figure.Figure(figsize=(width, height), layout="constrained")
        draw(canvas.add_subplot())
        root = _svg(canvas)
    return _element(root.findall(f"{{{SVG}}}g"), root, label)


def distributions(result: InfluenceResult, k: int) -> list[str]:
    """The distribution of each query's scores with the ``k`` first of both sides marked, as inline SVG."""
    from matplotlib.transforms import Affine2D

    mpl = _matplotlib()
    scores = plots.all_scores(result)
    top, bottom = result.proponents(k).scores.numpy(), result.opponents(k).scores.numpy()
    with mpl.rc_context(SETTINGS):
        canvas = mpl.figure.Figure(figsize=(6.4, 0.9))
        ax = canvas.add_axes((0, 0, 1, 1))
        ax.set_axis_off()
        ax.set_xlim(0, 1)
        ax.set_ylim(-0.25, 1)
        for query, row in enumerate(scores):
            low, high = float(row.min()), float(row.max())
            stretch = Affine2D().translate(-low, 0).scale(1 / (high - low or 1.0), 1) + ax.transData
            artists = plots.draw_distribution(ax, row, top[query], bottom[query], transform=stretch, clip_on=False)
            for part, artist in enumerate(artists):
                artist.set_gid(f"query-{query}-{part}")
        root = _svg(canvas)
    groups = {group.get("id", ""): group for group in root.iter(f"{{{SVG}}}g")}
    label = "distribution of the scores of all samples; those shown are marked below it"
    return [
        _element((groups[f"query-{query}-{part}"] for part in range(3)), root, label) for query in range(len(scores))
    ]


def zero_places(result: InfluenceResult) -> list[float]:
    """Where 0 lies in each distribution: from 0 (its left end) to 1; NaN where it lies outside."""
    scores = plots.all_scores(result)
    low, high = scores.min(axis=1).astype(np.float64), scores.max(axis=1).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        places = -low / (high - low)
    return [float(place) if 0 <= place <= 1 else float("nan") for place in places]


def _matplotlib() -> Any:
    try:
        import matplotlib.figure
    except ImportError as error:
        raise MissingDependencyError(
            "plots need matplotlib, which is not installed: pip install 'logix_like[report]'"
        ) from error
    return matplotlib


def _svg(canvas: Any) -> ElementTree.Element:
    file = io.StringIO()
    canvas.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return ElementTree.fromstring(file.getvalue())


def _element(groups: Iterable[ElementTree.Element], root: ElementTree.Element, label: str) -> str:
    """An ``<svg>`` of some of a drawing's groups in the page's colours; ids that nothing refers to are left out."""
    inside = "".join(ElementTree.tostring(group, encoding="unicode") for group in groups)
    for colour, name in THEME.items():
        inside = inside.replace(colour, name)
    inside = _ATTRIBUTES.sub("", inside.replace("ns0:", "")).replace("xlink:href", "href").replace("ns1:href", "href")
    unique = hashlib.blake2b(inside.encode(), digest_size=4).hexdigest()
    referred = set(_REFERENCE.findall(inside))
    inside = _ID.sub(lambda found: f' id="{unique}-{found[1]}"' if found[1] in referred else "", inside)
    inside = _REFERENCE.sub(rf'href="#{unique}-\1"', inside)
    inside = _DIGITS.sub(r"\1", _FAMILY.sub("", _SPACE.sub(" ", inside)))
    return f'<svg viewBox="{root.get("viewBox")}" role="img" aria-label="{label}">{inside}</svg>'
