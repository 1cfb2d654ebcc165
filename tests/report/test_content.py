"""What is shown of a sample."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from logix_like.errors import QueryError
from logix_like.report.content import TEXT_LIMIT, Contents, as_content, picture, visible


def pixels(address: str) -> np.ndarray:
    kind, _, code = address.partition(";base64,")
    assert kind in ("data:image/png", "data:image/webp")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(code))))


def test_a_long_text_is_shortened_and_says_so() -> None:
    content = as_content("x" * 1_000_000)
    assert (len(content.text), content.length, content.shortened) == (TEXT_LIMIT, 1_000_000, True)
    assert not as_content("short").shortened


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc", "a\nb\tc"),
        ("nul\x00", "nul\u2400"),
        ("esc\x1b[31m", "esc\u241b[31m"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("a\r\nb\u2028c", "a\n\nb\nc"),
        ("\ud800", "\\ud800"),
        ("naïve 日本語 שלום", "naïve 日本語 שלום"),
        ("a\u00a0b", "a b"),
        ("👩\u200d🔬", "👩\u200d🔬"),
    ],
)
def test_what_a_browser_would_not_show_is_made_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_tokens_are_graded_by_the_strongest() -> None:
    tokens = as_content([("a", 4.0), ("b", -2.0), ("c", 0.0), ("d", float("nan"))]).tokens
    assert [(t.text, t.level) for t in tokens] == [("a", 9), ("b", -4), ("c", 0), ("d", 0)]


def test_a_mapping_has_content_and_facts() -> None:
    content = as_content({"text": "t", "label": np.int64(1234), "loss": np.float32(0.123456), "none": None})
    assert content.text == "t"
    assert dict(content.facts) == {"label": "1,234", "loss": "0.1235"}


@pytest.mark.parametrize(
    "image",
    [
        np.array([[0, 255], [128, 7]], dtype=np.uint8),
        torch.tensor([[0, 255], [128, 7]], dtype=torch.uint8),
        np.array([[[0], [255]], [[128], [7]]], dtype=np.int64),
        torch.tensor([[[0, 255], [128, 7]]]) / 255,
        Image.fromarray(np.array([[0, 255], [128, 7]], dtype=np.uint8)),
    ],
)
def test_pictures_of_many_kinds(image: Any) -> None:
    shown = pixels(picture(image))
    grey = shown[..., 0] if shown.ndim == 3 else shown
    assert grey.tolist() == [[0, 255], [128, 7]]


def test_pictures_beyond_a_byte_are_stretched() -> None:
    assert pixels(picture(np.array([[-1.0, 0.0], [1.0, float("nan")]]))).tolist() == [[0, 128], [255, 128]]


def test_large_pictures_are_made_smaller_and_files_are_read(tmp_path: Path) -> None:
    Image.new("RGB", (800, 400), "red").save(tmp_path / "a.png")
    assert pixels(picture(tmp_path / "a.png")).shape == (80, 160, 3)


@pytest.mark.parametrize("value", [np.zeros(3), np.zeros((2, 2, 7)), object(), np.zeros((0, 4)), 3.5])
def test_what_is_no_picture_is_refused_by_name(value: Any) -> None:
    with pytest.raises(QueryError, match="data gave something for the id 'a' that cannot be shown"):
        Contents({"a": value}).of("a")


def test_a_list_and_a_function_provide_too() -> None:
    listed, function = Contents(["zero", "one"]), Contents({"x": "y"}.get)
    assert listed.of(1).text == "one"
    assert (listed.of(2), listed.of(-1), listed.of("1")) == (None, None, None)
    assert function.of("x").text == "y"
    assert function.of("z") is None
    assert (function.missing, function.found) == (["z"], 1)


@pytest.mark.parametrize("provider", ["text", 7])
def test_what_is_no_provider_is_refused(provider: Any) -> None:
    with pytest.raises(QueryError, match="must be a mapping, a list or a function"):
        Contents(provider)
