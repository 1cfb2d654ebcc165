"""Settings: frozen, validated records with a default for everything, read from YAML, a mapping or keywords.

The defaults here and ``configs/default.yaml`` are the same; that file describes every setting once more
for its reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from logix_like.config_errors import Place, explain, section_of
from logix_like.config_source import KeyPath, Source, read_source

# A description says what is allowed, in the words of an error message.
Flag = Annotated[bool, Field(strict=True, description="true or false")]
Natural = Annotated[int, Field(strict=True, ge=0, description="a whole number, 0 or more")]
Positive = Annotated[int, Field(strict=True, ge=1, description="a whole number, 1 or more")]
NonNegativeNumber = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False, description="a number, 0 or more")]
PositiveNumber = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False, description="a number above 0")]
Names = Annotated[tuple[str, ...], Field(description="a list of text")]
Folder = Annotated[
    str,
    BeforeValidator(lambda value: fspath(value) if isinstance(value, PathLike) else value),
    Field(min_length=1, description="the path of a folder"),
]


def _inside(name: str) -> str:
    """Refuse a folder name that leads out of the folder it is joined to."""
    path = PurePath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(name)
    return name


ProjectName = Annotated[
    Annotated[str, AfterValidator(_inside)] | None,
    Field(description="a name for the run: a folder under 'root', not absolute and without '..'"),
]


Url = Annotated[
    Annotated[
        str,
        BeforeValidator(lambda value: fspath(value) if isinstance(value, PathLike) else value),
        Field(min_length=1),
    ]
    | None,
    Field(description="a folder, or a URL such as s3://bucket/key"),
]


class _Section(BaseModel):
    """Frozen settings; a key that is not one of the fields is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModulesConfig(_Section):
    """Which modules are tracked, by globs on their qualified names and by type."""

    include: Names = ("*",)
    """A module is tracked if a glob here fits its name; one named without wildcards is, whatever its type."""
    exclude: Names = ()
    """Globs of modules to leave out; they win over ``include``."""
    types: Names = (
        "Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d",
    )  # fmt: skip
    """Class names of the modules that globs choose among."""
    batch_dim: Annotated[dict[str, Natural], Field(description="a mapping from globs to whole numbers, 0 or more")] = {}
    """Which dimension counts the samples, by glob: 1 for sequence-first modules. 0 where none fits."""
    frozen: Flag = False
    """Whether modules whose weights are frozen are tracked too."""


class ProjectionConfig(_Section):
    """How a module's gradient matrix is made small before it is stored."""

    rank: Annotated[
        Positive | Literal["auto"] | Annotated[dict[str, Positive], Field(min_length=1)],
        Field(description="a whole number, 1 or more, a mapping from globs to such numbers, or 'auto'"),
    ] = "auto"
    """Rank of both sides, or ranks by glob (the first that fits holds).

    ``auto``: 16, and 32 where a layer is 512 wide or more.
    """
    init: Literal["orthogonal", "gaussian", "pca", "eigen", "identity"] = "orthogonal"
    """Kind of matrix; ``identity`` stores full gradients."""
    seed: Natural = 0
    """Seed of the random kinds."""
    warmup: Positive = 64
    """Samples that ``pca`` and ``eigen`` look at before they fix their matrices."""


class StoreConfig(_Section):
    """How rows are written."""

    dtype: Literal["bfloat16", "float32", "float16", "float64", "int8", "int4", "sign"] = "bfloat16"
    """Type of the stored numbers."""
    codec: Literal["none", "blosc-lz4", "zstd"] = "none"
    """Lossless compression of the rows; costs time to write and to read."""
    chunk_mib: PositiveNumber = 4.0
    """Size of one chunk of rows, in MiB."""
    durability: Literal["process", "commit"] = "process"
    """What committed rows survive: the process's end, or (``commit``, by fsync) the machine's too."""
    url: Url = None
    """Where stores are kept in place of ``root``: a folder, ``s3://bucket/key``, ``memory://name``, ..."""
    on_error: Literal["raise", "stop_logging"] = "raise"
    """What a failing disk does to training: it stops it, or only the logging."""
    commit_seconds: PositiveNumber = 60.0
    """Rows are committed at least this often, in seconds."""


class AbsoluteDamping(_Section):
    """Damping that is the same in every module."""

    absolute: NonNegativeNumber


class QueryConfig(_Section):
    """What a query does unless it is told otherwise."""

    preconditioner: Literal["auto", "identity", "diagonal", "covariance", "kfac", "ekfac"] = "auto"
    """Curvature that scores are taken in; ``auto``: covariance where there are samples enough, else kfac."""
    damping: Annotated[
        NonNegativeNumber | Literal["auto"] | AbsoluteDamping,
        Field(description="a number, 0 or more, auto, or {absolute: x} with such a number x"),
    ] = 0.1
    """Damping, as a share of the mean eigenvalue of each module's own block; ``auto``; or ``{absolute: x}``."""
    mode: Literal["dot", "cosine", "relatif", "l2"] = "dot"
    """How two gradients are compared."""
    reduce: Literal["mean", "sum", "last", "none"] = "mean"
    """How the visits of one sample are combined."""
    engine: Literal["exact", "faiss"] = "exact"
    """What searches the rows."""


class EverySteps(_Section):
    """Weights are kept after every ``every_steps`` optimizer steps."""

    every_steps: Positive


class AtSteps(_Section):
    """Weights are kept after these optimizer steps."""

    at_steps: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Numbers of steps taken."""


Statistic = Literal["mean", "variance", "covariance", "kronecker", "corrected_eigval", "curvature"]


def _kronecker_beside(names: tuple[Statistic, ...]) -> tuple[Statistic, ...]:
    """The corrected eigenvalues are taken in the eigenbasis of the Kronecker factors."""
    if "corrected_eigval" in names and "kronecker" not in names:
        raise ValueError(names)
    return names


class Config(_Section):
    """All settings of a run.

    ``Config(project="mnist", store={"dtype": "float32"})`` sets some and leaves the others at their
    defaults; :func:`load_config` reads files. Raises :class:`~logix_like.errors.ConfigError`.
    """

    project: ProjectName = None
    """Name of the run; its store is the folder ``root/project``."""
    root: Folder = "logix"
    """Folder of all stores."""
    modules: ModulesConfig = ModulesConfig()
    projection: ProjectionConfig = ProjectionConfig()
    statistics: Annotated[
        tuple[Statistic, ...],
        AfterValidator(_kronecker_beside),
        Field(
            description="a list of any of mean, variance, covariance, kronecker, corrected_eigval "
            "(only with kronecker) and curvature"
        ),
    ] = ("covariance", "kronecker")
    """What is gathered over all rows; preconditioners are fitted from it.

    ``curvature`` is EK-FAC at full size, from every eighth block: see :meth:`Run.curvature`.
    """
    loss_reduction: Literal["mean", "sum", "token_mean"] = "mean"
    """What the loop's loss is: the mean or the sum over a batch's samples, or the mean over its tokens."""
    per_token: Flag = False
    """Whether a row is divided by its sample's number of counted tokens."""
    store: StoreConfig = StoreConfig()
    checkpoints: Annotated[
        Literal["none", "every_epoch"] | EverySteps | AtSteps,
        Field(
            description="none, every_epoch, {every_steps: n} or {at_steps: [n, ...]} with a whole number n, 1 or more"
        ),
    ] = "none"
    """When the model's weights are kept in the store, for queries averaged over them."""
    record: Annotated[Literal["none", "path"], Field(description="none or path")] = "none"
    """``path``: keep what each optimizer step used, so that the training can be replayed."""
    every: Positive = 1
    """Log every n-th block."""
    query: QueryConfig = QueryConfig()

    def __init__(self, place: Place | None = None, /, **settings: Any) -> None:
        """Check ``settings``; ``place`` tells error messages where each comes from."""
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise explain(error, type(self), settings, place or (lambda path: "Config")) from None


def load_config(source: str | PathLike[str] | Mapping[str, Any] | Config | None = None, **overrides: Any) -> Config:
    """Read settings from ``source``; keywords win over it.

    Args:
        source: path of a YAML file, name of a preset (``default``, ``language_model``, ``vision``), a
            mapping or a :class:`Config`; None for the defaults.
        overrides: further settings; one that is None counts as not given. A section takes a mapping and
            keeps what that does not name: ``store={"dtype": "float32"}``.

    Raises:
        ConfigError: a file that is missing or not YAML, an unknown key (names the nearest known one), a
            value that is not allowed. Messages name the file and the line.
    """
    if isinstance(source, Config):
        found = Source("the given Config", source.model_dump())
    else:
        found = read_source(Path(source) if isinstance(source, PathLike) else source)
    given = {key: value for key, value in overrides.items() if value is not None}

    def place(path: KeyPath) -> str:
        key, inner = path[0], path[1:2]
        whole = key in given and not (_is_section(key) and isinstance(given[key], Mapping))
        if whole or (key in given and (not inner or inner[0] in given[key])):
            return f"the keyword argument {key!r}"
        return found.place(path)

    return Config(place, **_merged(found.data, given))


def _merged(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``given`` over it: setting by setting within sections, whole values elsewhere."""
    # A section with all its lines commented out is read as None; it sets nothing.
    merged = {key: value for key, value in base.items() if value is not None or not _is_section(key)}
    for key, value in given.items():
        both = _is_section(key) and isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def _is_section(key: str) -> bool:
    field = Config.model_fields.get(key)
    return field is not None and section_of(field) is not None


def is_due(kept: str | EverySteps | AtSteps, step: int) -> bool:
    """Whether the weights are to be kept after ``step`` steps."""
    if isinstance(kept, EverySteps):
        return step % kept.every_steps == 0
    return isinstance(kept, AtSteps) and step in kept.at_steps
