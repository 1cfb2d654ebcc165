"""Results: rankings, tables, data frames, and files that give back what was saved."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from logix_like.errors import MissingDependencyError, QueryError
from logix_like.query.files import FORMATS
from logix_like.query.result import Ids, InfluenceResult, Ranking, SelfInfluence
from logix_like.query.table import ID_WIDTH, SIGN_CONVENTION, shown_id, side_names
from logix_like.query.tokens import TokenScores

AWKWARD: list[str | int] = ["", "7", 7, -(10**30), "ü\n\x1b[31m", "nul\x00", "\ud800", "日本語" * 20]
"""Ids that a careless format loses: empty, a digit string beside an int, huge, control characters, lone
surrogates, wide and long."""

PLAIN = {
    "query_id": ("q0", 1),
    "samples": 8,
    "mode": "dot",
    "preconditioner": "auto",
    "damping": 0.1,
    "reduce": "mean",
    "engine": "exact",
    "note": "8 samples, each the mean of its visits; dot score",
}


def _ids(values: list[Any], *shape: int) -> Ids:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array.reshape(shape) if shape else array


def _full(dtype: torch.dtype = torch.float32, *, steps: bool = False) -> InfluenceResult:
    scores = torch.tensor([[0.1, -2.5, 3.0, 1e-38, -0.0, 3.0, 1 / 3, -7.0], [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    step = np.arange(8, dtype=np.int64) if steps else None
    return InfluenceResult(**PLAIN, data_id=_ids(AWKWARD), scores=scores.to(dtype), step=step)


def _extremes(*, steps: bool = False) -> InfluenceResult:
    full = _full(steps=steps)
    return InfluenceResult(**PLAIN, top=full.proponents(3), bottom=full.opponents(3))


RESULTS = {
    "full": _full(),
    "float64": _full(torch.float64),
    "full with steps": _full(steps=True),
    "extremes": _extremes(),
    "extremes with steps": _extremes(steps=True),
}


def test_rankings_of_a_full_result() -> None:
    result = _full()
    assert result.proponents(3).ids.tolist() == [[7, AWKWARD[5], "\ud800"], AWKWARD[:3]]
    assert result.opponents(2).ids.tolist() == [[AWKWARD[7], "7"], [AWKWARD[7], "\ud800"]]
    assert result.opponents(2).scores.tolist() == [[-7.0, -2.5], [1.0, 2.0]]
    assert result.proponents().k == 8


def test_a_ranking_of_extremes_cannot_grow() -> None:
    result = _extremes()
    assert result.proponents(2).ids.tolist() == [line[:2] for line in result.proponents().ids.tolist()]
    with pytest.raises(QueryError, match="k is 4; this result was asked for with k=3, so k must be between 1 and 3"):
        result.proponents(4)
    with pytest.raises(QueryError, match="k is 9; this result ranked 8 samples"):
        _full().opponents(9)
    with pytest.raises(QueryError, match="k is 0"):
        result.opponents(0)


def _assert_equal(one: InfluenceResult, other: InfluenceResult) -> None:
    for name in PLAIN:
        assert getattr(one, name) == getattr(other, name), name
    assert [type(i) for i in one.query_id] == [type(i) for i in other.query_id]
    _assert_same_ranking(*((r.scores, r.data_id, r.step) for r in (one, other)))
    for side in ("top", "bottom"):
        mine, theirs = getattr(one, side), getattr(other, side)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            _assert_same_ranking(*((r.scores, r.ids, r.step) for r in (mine, theirs)))


def _assert_same_ranking(one: tuple[Any, Any, Any], other: tuple[Any, Any, Any]) -> None:
    assert [field is None for field in one] == [field is None for field in other]
    if one[0] is None:
        return
    assert one[0].dtype == other[0].dtype
    assert one[0].numpy().tobytes() == other[0].numpy().tobytes()
    assert one[1].tolist() == other[1].tolist()
    assert [type(i) for i in one[1].ravel()] == [type(i) for i in other[1].ravel()]
    if one[2] is not None:
        assert one[2].tolist() == other[2].tolist() and other[2].dtype == np.int64


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kind", RESULTS)
def test_a_saved_result_comes_back_bit_for_bit(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"answer{suffix}"
    assert RESULTS[kind].save(path) == path
    _assert_equal(RESULTS[kind], InfluenceResult.load(path))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", FORMATS)
def test_ids_of_numpy_ints_are_saved_as_ints(tmp_path: Path, suffix: str) -> None:
    ids = _ids([np.int64(5), np.int32(6)])
    result = InfluenceResult(**PLAIN | {"samples": 2}, data_id=ids, scores=torch.zeros(2, 2))
    loaded = InfluenceResult.load(result.save(tmp_path / f"answer{suffix}"))
    assert loaded.data_id is not None
    assert loaded.data_id.tolist() == [5, 6] and type(loaded.data_id[0]) is int


@pytest.mark.parametrize("suffix", FORMATS)
def test_saving_again_replaces_and_a_failed_save_leaves_the_old(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"answer{suffix}"
    RESULTS["full"].save(path)
    RESULTS["extremes"].save(path)
    _assert_equal(RESULTS["extremes"], InfluenceResult.load(path))

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", full_disk)
        patch.setattr(json, "dumps", full_disk)
        with pytest.raises(OSError, match="No space"):
            RESULTS["full"].save(path)
    _assert_equal(RESULTS["extremes"], InfluenceResult.load(path))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_unknown_formats_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(QueryError, match=r"saved as \.json or \.npz; 'answer\.pkl' ends in neither"):
        _full().save(tmp_path / "answer.pkl")
    with pytest.raises(QueryError, match=r"there is no result at .*answer\.json"):
        InfluenceResult.load(tmp_path / "answer.json")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("content", [b"", b"[]", b'{"arrays": 3}', b'{"arrays": {}}', b"PK\x03\x04", b"\x93NUMPY"])
def test_other_files_are_refused_by_name(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"answer{suffix}"
    path.write_bytes(content)
    with pytest.raises(QueryError, match=f"answer{suffix} cannot be read as a saved result"):
        InfluenceResult.load(path)


@pytest.mark.parametrize("suffix", FORMATS)
def test_cut_and_flipped_files_give_a_named_error_or_a_result(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"answer{suffix}"
    whole = _extremes().save(path).read_bytes()
    for cut in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(QueryError):
            InfluenceResult.load(path)
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :])
        try:
            InfluenceResult.load(path)
        except QueryError:
            continue


def test_a_file_with_objects_is_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "answer.npz"
    np.savez(path, header=np.array([object()], dtype=object))
    with pytest.raises(QueryError, match="cannot be read"):
        InfluenceResult.load(path)


def test_scores_and_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = _full().save(tmp_path / "answer.json")
    content = json.loads(path.read_text())
    content["arrays"]["ids"]["values"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(QueryError, match="do not fit"):
        InfluenceResult.load(path)


@pytest.mark.parametrize("kind", RESULTS)
def test_the_table_is_readable_and_aligned(kind: str) -> None:
    text = str(RESULTS[kind])
    lines = text.splitlines()
    assert lines[0] == "Influence of 8 samples on 2 queries"
    assert lines[1] == PLAIN["note"]
    assert lines[2] == SIGN_CONVENTION
    assert "proponent, helpful" in text and "opponent, harmful" in text
    assert "\x1b" not in text and "\x00" not in text
    first = lines.index("query q0")
    # The full results have so few samples that positive ones stand among the five lowest.
    lowest = "opponents" if kind.startswith("extremes") else "lowest scores"
    assert lines[first + 1] == f"  {'proponents':<30}       score    {lowest:<30}       score"
    second = lines[lines.index("query 1") + 1]
    assert second.split() == ["proponents", "score", "lowest", "scores", "score"]  # all of its scores are positive
    assert "+3" in lines[first + 2] and "-7" in lines[first + 2]


def test_long_answers_are_cut_and_say_so() -> None:
    result = InfluenceResult(
        **PLAIN | {"query_id": tuple(range(25))},
        data_id=_ids(AWKWARD),
        scores=torch.zeros(25, 8),
    )
    assert str(result).endswith("... and 15 queries more")


@pytest.mark.parametrize("data_id", AWKWARD)
def test_shown_ids_fit_their_column(data_id: str | int) -> None:
    text = shown_id(data_id, ID_WIDTH)
    assert text.isprintable()
    assert len(text) <= ID_WIDTH
    if data_id == AWKWARD[-1]:
        assert text.endswith("…") and len(text) == 15  # 14 wide letters and the dots take 29 columns


def test_data_frames() -> None:
    full = _full(steps=True).to_pandas()
    assert full.shape == (2, 8)
    assert list(full.columns.get_level_values("step")) == list(range(8))
    pairs = _extremes().to_pandas()
    assert list(pairs.columns) == ["query_id", "kind", "rank", "data_id", "score"]
    assert len(pairs) == 2 * 2 * 3
    best = pairs[(pairs.query_id == 1) & (pairs.kind == "proponent") & (pairs["rank"] == 1)]
    assert best.data_id.tolist() == [""] and best.score.tolist() == [8.0]
    assert "step" in _extremes(steps=True).to_pandas().columns
    assert _full().to_pandas().loc["q0", "7"] == -2.5


def test_self_influence() -> None:
    own = SelfInfluence(
        _ids(["a", "b", 3]), torch.tensor([1.0, 5.0, 2.0]), "auto", 0.1, "mean", "3 samples", np.array([4, 5, 6])
    )
    best = own.highest(2)
    assert best.ids.tolist() == [["b", 3]] and best.step is not None and best.step.tolist() == [[5, 6]]
    assert "Self-influence of 3 samples" in str(own) and "b @5" in str(own)
    assert own.to_pandas().to_dict("list") == {"data_id": ["a", "b", 3], "score": [1.0, 5.0, 2.0], "step": [4, 5, 6]}
    with pytest.raises(QueryError, match="k is 4; it must be between 1 and 3, the number"):
        own.highest(4)


def test_a_ranking_keeps_its_first() -> None:
    ranking = Ranking(_ids(["a", "b"], 1, 2), torch.tensor([[2.0, 1.0]]), np.array([[8, 9]]))
    first = ranking.first(1)
    assert (first.ids.tolist(), first.scores.tolist(), first.k) == ([["a"]], [[2.0]], 1)
    assert first.step is not None and first.step.tolist() == [[8]]


@pytest.mark.parametrize(("package", "extra"), [("pandas", "report"), ("jinja2", "report")])
def test_missing_packages_say_what_to_install(
    tmp_path: Path, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> ModuleType:
        if name == package:
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=rf"needs {package}.*pip install 'logix_like\[{extra}\]'"):
        _full().to_pandas() if package == "pandas" else _full().report(tmp_path / "answer.html")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [False, True])
def test_self_influences_come_back(tmp_path: Path, suffix: str, dtype: torch.dtype, steps: bool) -> None:
    full = _full(dtype)
    assert full.scores is not None
    step = np.arange(8, dtype=np.int64) if steps else None
    saved = SelfInfluence(_ids(AWKWARD), full.scores[0], "auto", 0.1, "none", "a note", step)
    path = saved.save(tmp_path / f"self{suffix}")
    read = SelfInfluence.load(str(path))
    assert torch.equal(read.scores, saved.scores) and read.scores.dtype == dtype
    assert read.data_id.tolist() == AWKWARD and [type(i) for i in read.data_id] == [type(i) for i in AWKWARD]
    assert (read.step is None) == (not steps) and (step is None or np.array_equal(read.step, step))
    names = ("preconditioner", "damping", "reduce", "note")
    assert [getattr(read, name) for name in names] == [getattr(saved, name) for name in names]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(QueryError, match="cannot be read as a saved result"):
        InfluenceResult.load(path)


@pytest.mark.parametrize("suffix", FORMATS)
def test_another_result_is_no_self_influence(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(QueryError, match="cannot be read as a saved result"):
        SelfInfluence.load(_full().save(tmp_path / f"full{suffix}"))
    with pytest.raises(QueryError, match="there is no result at"):
        SelfInfluence.load(tmp_path / f"missing{suffix}")


def test_a_result_needs_its_folder(tmp_path: Path) -> None:
    with pytest.raises(QueryError, match=r"there is no folder .*nowhere; create it first"):
        _full().save(tmp_path / "nowhere" / "result.json")


@pytest.mark.parametrize(
    ("scores", "names"),
    [
        ([3.0, 1.0, -1.0, -3.0], ("proponents", "opponents")),
        ([3.0, 2.0, 0.0, -0.0], ("proponents", "opponents")),  # 0 is neither, and contradicts neither
        ([4.0, 3.0, 2.0, 1.0], ("proponents", "lowest scores")),
        ([-1.0, -2.0, -3.0, -4.0], ("highest scores", "opponents")),
        ([1.0, -2.0, -3.0, float("nan")], ("highest scores", "opponents")),
    ],
)
def test_no_table_calls_a_sample_what_its_sign_denies(scores: list[float], names: tuple[str, str]) -> None:
    assert side_names(torch.tensor(scores[:2]), torch.tensor(scores[2:])) == names


@pytest.mark.parametrize("show", [InfluenceResult._repr_html_, InfluenceResult.__str__])
def test_the_lowest_of_positive_scores_are_no_opponents(show: Any) -> None:
    result = InfluenceResult(
        **PLAIN | {"query_id": ("q",), "samples": 2}, data_id=_ids(["a", "b"]), scores=torch.tensor([[1.0, 2.0]])
    )
    shown = show(result)
    assert "lowest scores" in shown and "opponents" not in shown and "proponents" in shown


def test_rankings_and_token_scores_print_in_a_line() -> None:
    assert repr(_full().proponents(1)) == "Ranking(queries=2, k=1, first 7: +3)"
    assert str(_full().opponents()).endswith(", ...)")
    tokens = TokenScores(("q",), ("a", "b"), torch.zeros(1, 2, 16), torch.zeros(1, 2))
    assert str(tokens) == "TokenScores(queries=1, samples=2, positions=16)"
