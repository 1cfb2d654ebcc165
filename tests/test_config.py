"""Settings: defaults, files, presets, overrides, and what is said of each mistake."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from logix_like.config import Config, EverySteps, QueryConfig, Statistic, StoreConfig, load_config
from logix_like.config_source import presets
from logix_like.errors import ConfigError
from logix_like.projection import INITS
from logix_like.statistics import STATISTICS

CONFIGS = Path(__file__).parents[1] / "configs"


def _write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def _message(source: Any = None, **overrides: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, **overrides)
    return str(caught.value)


# Defaults and presets


def test_the_default_file_lists_every_setting_with_its_default() -> None:
    listed = yaml.safe_load((CONFIGS / "default.yaml").read_text())
    assert listed == Config().model_dump(mode="json")


def test_every_line_of_the_default_file_that_sets_something_has_a_comment() -> None:
    for line in (CONFIGS / "default.yaml").read_text().splitlines():
        assert not line or "#" in line, line


def test_no_source_gives_the_defaults() -> None:
    assert load_config() == Config() == load_config("default") == load_config({})


@pytest.mark.parametrize("name", ["default", "language_model", "vision"])
def test_a_preset_loads_by_name_and_by_path(name: str) -> None:
    assert load_config(name) == load_config(CONFIGS / f"{name}.yaml") == load_config(str(CONFIGS / f"{name}.yaml"))


def test_presets_are_the_files_in_the_checkout() -> None:
    assert list(presets()) == sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def test_presets_change_what_they_are_for() -> None:
    assert load_config("language_model").loss_reduction == "token_mean"
    assert load_config("vision").projection.init == "eigen"


def test_names_that_other_parts_define_are_the_same_here() -> None:
    assert get_args(Statistic) == (*STATISTICS, "curvature")
    assert get_args(type(Config().projection).model_fields["init"].annotation) == tuple(INITS)


# Reading


def test_a_file_changes_only_what_it_names(tmp_path: Path) -> None:
    config = load_config(_write(tmp_path, "project: mnist\nstore: {dtype: float32}\n"))
    assert config.project == "mnist"
    assert config.store == StoreConfig(dtype="float32")
    assert config.projection == Config().projection


def test_a_bare_word_is_a_preset_whatever_the_folder_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vision").write_text("every: 7\n")
    monkeypatch.chdir(tmp_path)
    assert load_config("vision").every == 1
    assert load_config("./vision").every == load_config(Path("vision")).every == 7


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "store:\n  # dtype: float32\n", "store: {}\n"])
def test_a_file_or_section_of_comments_sets_nothing(tmp_path: Path, text: str) -> None:
    assert load_config(_write(tmp_path, text)) == Config()


def test_numbers_and_dates_are_read_as_people_write_them(tmp_path: Path) -> None:
    config = load_config(_write(tmp_path, "project: 2026-11-22\nquery:\n  damping: 1e-3\nstore: {chunk_mib: 2}\n"))
    assert (config.project, config.query.damping, config.store.chunk_mib) == ("2026-11-22", 1e-3, 2.0)


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    text = "modules: &m {include: ['a*']}\n"
    assert load_config(_write(tmp_path, text + "statistics: &s [mean]\n")).modules.include == ("a*",)
    merged = "store:\n  <<: {dtype: float32, chunk_mib: 2}\n  chunk_mib: 8\n"
    assert load_config(_write(tmp_path, merged)).store == StoreConfig(dtype="float32", chunk_mib=8)


@pytest.mark.parametrize("rank", [8, "auto", {"*.mlp.*": 32, "*": 16}])
def test_every_form_of_rank_is_kept(rank: object) -> None:
    config = load_config({"projection": {"rank": rank}})
    assert config.projection.rank == rank
    assert config.model_dump(mode="json")["projection"]["rank"] == rank


def test_checkpoints_take_a_word_or_a_number_of_steps() -> None:
    assert load_config(checkpoints="every_epoch").checkpoints == "every_epoch"
    assert load_config(checkpoints={"every_steps": 50}).checkpoints == EverySteps(every_steps=50)


def test_a_path_object_names_the_root(tmp_path: Path) -> None:
    assert load_config(root=tmp_path).root == str(tmp_path)


# Overrides


def test_keywords_win_and_keep_the_rest_of_a_section() -> None:
    config = load_config({"store": {"dtype": "float32", "chunk_mib": 8}}, store={"chunk_mib": 2}, every=3)
    assert config.store == StoreConfig(dtype="float32", chunk_mib=2)
    assert config.every == 3


def test_a_mapping_of_globs_is_replaced_as_a_whole() -> None:
    # The first glob that fits holds, so that merging would let the file's globs win over the keyword's.
    config = load_config({"projection": {"rank": {"a": 4}, "seed": 1}}, projection={"rank": {"*": 8}})
    assert config.projection.rank == {"*": 8}
    assert config.projection.seed == 1


def test_a_section_object_and_a_config_are_taken_as_they_are() -> None:
    config = Config(project="a", every=2)
    assert load_config(config) == config
    assert load_config(config, every=3, query=QueryConfig(mode="l2")).model_dump() == {
        **config.model_dump(),
        "every": 3,
        "query": QueryConfig(mode="l2").model_dump(),
    }


def test_a_keyword_that_is_none_counts_as_not_given() -> None:
    assert load_config({"project": "a"}, project=None).project == "a"


def test_the_callers_mapping_is_not_changed_or_kept() -> None:
    ranks = {"*": 4}
    given = {"projection": {"rank": ranks}}
    config = load_config(given, projection={"seed": 3})
    ranks["*"] = 5
    assert given == {"projection": {"rank": {"*": 5}}}
    assert config.projection.rank == {"*": 4}


# The record


def test_a_config_cannot_be_changed() -> None:
    config: Any = Config()
    with pytest.raises(ValueError, match="frozen"):
        config.project = "other"
    with pytest.raises(ValueError, match="frozen"):
        config.store.dtype = "float32"


def test_a_config_survives_json_and_pickle() -> None:
    config = load_config("vision", project="a", checkpoints={"every_steps": 5})
    assert load_config(json.loads(config.model_dump_json())) == config
    assert pickle.loads(pickle.dumps(config)) == config


# Mistakes: unknown keys


def test_an_unknown_key_is_answered_with_file_line_and_the_nearest(tmp_path: Path) -> None:
    path = _write(tmp_path, "project: a\nstore:\n  dtype: float32\n  chunk_mb: 4\n")
    assert _message(path) == (
        f"{path}, line 4: unknown setting 'store.chunk_mb'; did you mean 'store.chunk_mib'? "
        "The settings of 'store' are: dtype, codec, chunk_mib, durability, url, on_error, commit_seconds"
    )


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"projct": "a"}, "project"),
        ({"rank": 8}, "projection.rank"),
        ({"mode": "dot"}, "query.mode"),
        ({"dampening": 1}, "query.damping"),
        ({"store": {"seed": 1}}, "projection.seed"),
        ({"query": {"prconditioner": "kfac"}}, "query.preconditioner"),
    ],
)
def test_the_nearest_known_setting_is_named_wherever_it_stands(written: dict[str, Any], meant: str) -> None:
    assert f"did you mean {meant!r}?" in _message(written)
    assert f"did you mean {meant!r}?" in _message(**written)


def test_a_key_like_no_other_lists_the_settings() -> None:
    message = _message({"zzz": 1})
    assert "did you mean" not in message
    assert message.endswith("The settings are: " + ", ".join(Config.model_fields))


# Mistakes: values


@pytest.mark.parametrize(
    ("written", "found", "expected"),
    [
        (
            {"projection": {"init": "ortogonal"}},
            "'projection.init' is 'ortogonal'",
            "did you mean 'orthogonal'?",
        ),
        ({"projection": {"init": 3}}, "is 3", "one of orthogonal, gaussian, pca, eigen, identity"),
        (
            {"projection": {"rank": 0}},
            "'projection.rank' is 0",
            "a whole number, 1 or more, a mapping from globs",
        ),
        ({"projection": {"rank": True}}, "is True", "a whole number, 1 or more"),
        ({"projection": {"rank": 2.0}}, "is 2.0", "a whole number, 1 or more"),
        ({"projection": {"rank": "8"}}, "is '8'", "a whole number, 1 or more"),
        ({"projection": {"rank": "atuo"}}, "is 'atuo'", "did you mean 'auto'?"),
        ({"projection": {"rank": {}}}, "is {}", "a mapping from globs to such numbers"),
        ({"projection": {"rank": {"*": 0}}}, "'projection.rank' is {'*': 0}", "a whole number, 1 or more"),
        ({"projection": {"seed": -1}}, "is -1", "a whole number, 0 or more"),
        ({"modules": {"include": "*"}}, "'modules.include' is '*'", "a list of text"),
        ({"modules": {"types": [1]}}, "'modules.types' is [1]", "a list of text"),
        ({"modules": {"frozen": "yes"}}, "is 'yes'", "true or false"),
        ({"modules": {"batch_dim": {"*": "1"}}}, "is {'*': '1'}", "a mapping from globs"),
        ({"statistics": ["covarance"]}, "is ['covarance']", "did you mean 'covariance'?"),
        ({"statistics": "mean"}, "is 'mean'", "a list of any of mean"),
        ({"statistics": ["corrected_eigval"]}, "'statistics' is", "(only with kronecker)"),
        ({"loss_reduction": "none"}, "is 'none'", "one of mean, sum, token_mean"),
        ({"checkpoints": "every_epochs"}, "is 'every_epochs'", "did you mean 'every_epoch'?"),
        (
            {"checkpoints": {"every_steps": 0}},
            "'checkpoints' is {'every_steps': 0}",
            "whole number n, 1 or more",
        ),
        ({"checkpoints": {"steps": 5}}, "'checkpoints' is {'steps': 5}", "{every_steps: n}"),
        ({"query": {"damping": -0.1}}, "is -0.1", "a number, 0 or more"),
        ({"query": {"damping": float("nan")}}, "is nan", "a number, 0 or more"),
        ({"store": {"chunk_mib": 0}}, "is 0", "a number above 0"),
        ({"store": {"commit_seconds": float("inf")}}, "is inf", "a number above 0"),
        ({"store": "float32"}, "'store' is 'float32'", "a mapping of settings: dtype, codec, chunk_mib"),
        ({"root": ""}, "'root' is ''", "the path of a folder"),
        ({"root": None}, "'root' is None", "the path of a folder"),
    ],
)
def test_a_wrong_value_is_shown_with_what_is_allowed(written: dict[str, Any], found: str, expected: str) -> None:
    message = _message(written)
    assert message.startswith("the config mapping: ")
    assert found in message
    assert expected in message
    assert "pydantic" not in message
    assert "\n" not in message


@pytest.mark.parametrize("project", ["", ".", "..", "/etc", "a/../../b", 3])
def test_a_project_stays_in_its_root(project: object) -> None:
    assert "a folder under 'root', not absolute and without '..'" in _message(project=project)


def test_a_wrong_value_names_its_line(tmp_path: Path) -> None:
    path = _write(tmp_path, "query:\n  mode: dot\n\n  reduce: max\nstatistics:\n  - mean\n  - median\n")
    first, second = sorted(_message(path).splitlines())
    assert first.startswith(f"{path}, line 4: 'query.reduce' is 'max'; expected one of mean, sum, last, none")
    assert second.startswith(f"{path}, line 5: 'statistics' is ['mean', 'median']; expected a list of any of mean")


def test_a_mistake_in_a_keyword_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = _write(tmp_path, "store:\n  dtype: float32\n  on_error: ignore\n")
    messages = sorted(_message(path, store={"dtype": "int3"}, every=0).splitlines())
    assert [message.partition(": ")[0] for message in messages] == [
        f"{path}, line 3",
        "the keyword argument 'every'",
        "the keyword argument 'store'",
    ]
    assert _message(path, store=5).startswith("the keyword argument 'store': 'store' is 5")


def test_a_config_made_directly_says_the_same() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'store.dtyp'; did you mean 'store.dtype'\?"):
        Config(store={"dtyp": "float32"})


# Mistakes: files


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b\n", "found a list at the top level; expected a mapping"),
        ("just words\n", "found a str at the top level; expected a mapping"),
        ("a: [1\nb: 2\n", "line 2: this is not valid YAML: expected ',' or ']'"),
        ("a: 1\n---\nb: 2\n", "this is not valid YAML: but found another document"),
        (
            "project: a\nevery: 1\nproject: b\n",
            "line 3: 'project' stands here a second time, first on line 1",
        ),
        ("store:\n  dtype: float32\n  dtype: float16\n", "line 3: 'store.dtype' stands here a second time"),
        ("1: a\n", "line 1: the key '1' is not text; put it in quotes"),
        ("? [a, b]\n: 1\n", "line 1: the key (a list) is not text"),
        ("project: !!python/object:os.system x\n", "could not determine a constructor"),
        ("project: !!int x\n", "this is not valid YAML"),
        ("a: " + "[" * 5000 + "]" * 5000, "this is not valid YAML"),
        ("a: &a {b: *a}\n", "unknown setting 'a'"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, text: str, expected: str) -> None:
    path = _write(tmp_path, text)
    message = _message(path)
    assert message.startswith(str(path))
    assert expected in message


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"project: \xff\xfe\n")
    assert "this is not valid YAML" in _message(path)


@pytest.mark.parametrize("name", ["nowhere.yaml", "configs/nowhere.yaml", "nowhere"])
def test_a_missing_file_names_the_presets(name: str) -> None:
    message = _message(name)
    assert f"cannot read the config file '{name}' (No such file or directory)" in message
    assert "default, language_model, vision" in message


def test_a_missing_file_that_is_like_a_preset_suggests_it() -> None:
    assert "did you mean the preset 'language_model'?" in _message("elsewhere/langage_model.yaml")


def test_a_folder_is_no_config_file(tmp_path: Path) -> None:
    assert "(Is a directory)" in _message(tmp_path)


def test_another_type_is_refused() -> None:
    assert _message(3).startswith("config is of type int; expected the path of a YAML file")
    assert "has the key 1" in _message({1: 2})
