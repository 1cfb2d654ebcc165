"""What a sample or a query looks like to a person: its text, its picture, its label, by its id.

People keep their data in many ways, so a provider may be a mapping, a list or a function, and what it gives for an
id may be a text, a picture, scored tokens, or a mapping with any of these and further facts.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from logix_like.errors import MissingDependencyError, QueryError
from logix_like.layout import DataId
from logix_like.query.result import Provider

TEXT_LIMIT = 600
"""Characters of a text that are shown; a page of long documents stays readable and small."""
TOKEN_LIMIT = 160
"""Tokens of a text that are shown."""
ID_LIMIT = 120
"""Characters of an id that are shown."""
THUMBNAIL = 160
"""Longest side of a picture, in pixels; larger ones are made smaller, none is made larger."""

KNOWN = ("text", "tokens", "image")
"""Keys of a mapping that are shown as content; all others are facts with a name."""


@dataclass(frozen=True)
class Token:
    """One token with its share in a score."""

    text: str
    """As printed."""
    level: int
    """From -9 (against) to 9 (for), relative to the strongest token of the sample."""


@dataclass(frozen=True)
class Content:
    """What is shown of one sample."""

    text: str = ""
    """At most :data:`TEXT_LIMIT` characters; control characters are made visible."""
    length: int = 0
    """Characters of the whole text."""
    tokens: tuple[Token, ...] = ()
    """Where tokens are scored; they are shown instead of the text."""
    image: str = ""
    """A ``data:`` address of a picture."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Label, loss and whatever else was given, as text by name."""

    @property
    def shortened(self) -> bool:
        """Whether there is more than what is shown."""
        return self.length > len(self.text)


class Contents:
    """Looks contents up and remembers which ids had none.

    Args:
        provider: None where there is nothing but ids.
        what: what the provider is called in error messages.
    """

    def __init__(self, provider: Provider | None, what: str = "data") -> None:
        if provider is not None and (isinstance(provider, str | bytes) or not _provides(provider)):
            raise QueryError(
                f"{what} is a {type(provider).__name__}; it must be a mapping, a list or a function that gives a "
                "sample's text, picture or facts for its id"
            )
        self._provider = provider
        self._what = what
        self._known: dict[DataId, Content | None] = {}

    @property
    def given(self) -> bool:
        """Whether there is a provider at all."""
        return self._provider is not None

    @property
    def missing(self) -> list[DataId]:
        """Ids that were asked for and not known."""
        return [data_id for data_id, content in self._known.items() if content is None]

    @property
    def found(self) -> int:
        """How many of the ids that were asked for are known."""
        return len(self._known) - len(self.missing)

    def of(self, data_id: DataId) -> Content | None:
        """The content for an id; None when the provider knows no such id.

        Raises:
            QueryError: the provider failed, or gave something that cannot be shown.
        """
        if self._provider is None:
            return None
        if data_id not in self._known:
            self._known[data_id] = self._look_up(data_id)
        return self._known[data_id]

    def require_some(self) -> None:
        """Raise :class:`QueryError` if not one of several ids was known: the ids are of another kind."""
        if self.missing and not self.found:
            first = self.missing[0]
            raise QueryError(
                f"{self._what} knows none of the {len(self.missing)} ids to show, e.g. {first!r} (a "
                f"{type(first).__name__}); it must be keyed by the ids that the run was given, of the same type"
            )

    def _look_up(self, data_id: DataId) -> Content | None:
        provider: Any = self._provider  # lists of other libraries are often no Sequence
        try:
            if callable(provider):
                value = provider(data_id)
            elif isinstance(provider, Mapping) or (isinstance(data_id, int) and data_id >= 0):
                value = provider[data_id]
            else:
                return None
        except LookupError:
            return None
        except Exception as error:
            raise QueryError(
                f"{self._what} failed for the id {data_id!r}: {type(error).__name__}: {error}; a function may raise "
                "KeyError (or return None) for an id that it does not know"
            ) from error
        if value is None:
            return None
        try:
            return as_content(value)
        except (TypeError, ValueError, OSError) as error:
            raise QueryError(
                f"{self._what} gave something for the id {data_id!r} that cannot be shown: {error}"
            ) from error


def _provides(provider: Any) -> bool:
    return callable(provider) or isinstance(provider, Mapping) or hasattr(provider, "__getitem__")


def as_content(value: Any) -> Content:
    """What a provider gave, ready to be shown.

    Raises:
        TypeError, ValueError, OSError: it is no text, picture, list of scored tokens or mapping of these.
    """
    if isinstance(value, Mapping):
        facts = {str(name): shown(fact) for name, fact in value.items() if name not in KNOWN and fact is not None}
        return _content(**{name: value.get(name) for name in KNOWN}, facts=facts)
    if isinstance(value, str):
        return _content(text=value)
    if _is_tokens(value):
        return _content(tokens=value)
    return _content(image=value)


def _content(
    text: Any = None, tokens: Any = None, image: Any = None, facts: Mapping[str, str] | None = None
) -> Content:
    words = "" if text is None else str(text)
    return Content(
        text=visible(words[:TEXT_LIMIT]),
        length=len(words),
        tokens=() if tokens is None else _levels(tokens),
        image="" if image is None else picture(image),
        facts=facts or {},
    )


def _is_tokens(value: Any) -> bool:
    """Whether ``value`` is a list of pairs (token, score)."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in value)
    )


def _levels(tokens: Sequence[tuple[str, Any]]) -> tuple[Token, ...]:
    if not _is_tokens(tokens):
        raise TypeError("tokens must be a list of pairs (text, score)")
    scores = [float(score) for _, score in tokens]
    strongest = max((abs(score) for score in scores if math.isfinite(score)), default=0.0) or 1.0
    return tuple(
        Token(visible(text), round(9 * score / strongest) if math.isfinite(score) else 0)
        for (text, _), score in zip(tokens[:TOKEN_LIMIT], scores, strict=False)
    )


def visible(text: str) -> str:
    """``text`` with what a browser would not show made visible: control characters, marks of direction.

    A mark that turns the direction of writing could make a line read as another; it is shown by its name.
    """
    if text.replace("\n", "").replace("\t", "").isprintable():  # the usual case, in one pass
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _named(c) for c in text)


def _named(character: str) -> str:
    code = ord(character)
    if character in ("\r", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"):
        return "\n"
    if character == "\xa0" or 0x2000 <= code <= 0x200A or code in (0x202F, 0x205F, 0x3000):
        return " "
    if code in (0x200C, 0x200D):  # joiners: without them many scripts and pictographs fall apart
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    return f"\\u{code:04x}"


def shown(value: Any) -> str:
    """A fact as text: numbers in short, anything else as it prints."""
    if isinstance(value, float | np.floating):
        return "unknown" if math.isnan(value) else f"{value:.4g}"
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return f"{int(value):,}"
    if hasattr(value, "item") and getattr(value, "size", 0) == 1 and not callable(getattr(value, "size", None)):
        return shown(value.item())
    return visible(str(value)[:TEXT_LIMIT])


def picture(image: Any) -> str:
    """A ``data:`` address of a picture, made smaller where it is large.

    Args:
        image: a PIL image, the path of one, or an array or tensor: ``[height, width]``, ``[height, width, channels]``
            or ``[channels, height, width]`` with 1, 3 or 4 channels; whole numbers count to 255, others are
            stretched from their least to their largest value unless they lie within 0 and 1.

    Raises:
        TypeError, ValueError, OSError: it is none of these, or cannot be read.
        MissingDependencyError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError(
            "pictures need Pillow, which is not installed: pip install 'logix_like[report]'"
        ) from error
    if isinstance(image, Path):
        with Image.open(image) as opened:
            small = opened.convert("RGBA" if "A" in opened.getbands() else "RGB")
    elif isinstance(image, Image.Image):
        small = image.convert("RGBA" if "A" in image.getbands() else "RGB")
    else:
        small = Image.fromarray(_pixels(image))
    large = max(small.size) > THUMBNAIL // 2
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    kind = "WEBP" if large else "PNG"
    small.save(file, kind, **({"quality": 80} if large else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _pixels(image: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    array = np.asarray(image.detach().float().cpu() if hasattr(image, "detach") else image)
    if array.dtype.kind not in "buif" or array.ndim not in (2, 3) or 0 in array.shape:
        raise TypeError(
            f"a {type(image).__name__} of {array.dtype} and shape {array.shape} is no picture; give a text, a PIL "
            "image, the path (pathlib.Path) of a picture, or numbers [height, width] or [height, width, channels]"
        )
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim == 3 and array.shape[2] not in (3, 4):
        raise TypeError(f"a picture has 1, 3 or 4 channels; this array has the shape {array.shape}")
    if array.dtype == np.uint8:
        return array
    values = np.nan_to_num(array.astype(np.float64))
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 1:
        values = 255 * values
    elif low < 0 or high > 255:
        values = 255 * (values - low) / (high - low or 1.0)
    return values.round().astype(np.uint8)


def short_name(data_id: DataId) -> str:
    """An id as text that can be shown."""
    text = str(data_id)
    return visible(text[:ID_LIMIT]) + ("…" if len(text) > ID_LIMIT else "")
