"""Which modules of a model are tracked, and which block each of their parameters belongs to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from logix_like.capture.composite import Composite, composite_for, parts_of
from logix_like.capture.layers import RULES, Rule, type_name
from logix_like.errors import ConfigError, ModelMismatchError, UnsupportedModuleError
from logix_like.layout import Layout
from logix_like.wrapping import named_modules, require_own_weights


@dataclass(frozen=True, eq=False)
class Use:
    """One module's part in one block; the same only as itself, so that it is a cheap key."""

    block: str
    """Name of the block: the first module that uses the parameter."""
    weight: bool
    """Whether the weight is part of it."""
    bias: bool
    """Whether a bias is."""
    transposed: bool = False
    """Whether this module's weight is the transpose of the block owner's (an embedding and a linear head)."""


@dataclass(frozen=True)
class TrackedModule:
    """A module whose calls are captured."""

    name: str
    module: nn.Module
    rule: Rule
    uses: tuple[Use, ...]
    batch_dim: int = 0
    """Dimension of the module's input and output that counts the samples."""

    def matrix(self, value: Callable[[nn.Parameter], Tensor | None]) -> Tensor | None:
        """``[d_out, d_in]``: what ``value`` tells of the weight and the bias, in their shapes, as the block has it.

        None where it tells nothing of one, or where the block is another module's.
        """
        use = self.uses[-1]
        if use.block != self.name or use.transposed:
            return None
        columns = []
        for part, wanted in (("weight", use.weight), ("bias", use.bias)):
            if not wanted:
                continue
            parameter = self.module._parameters.get(part)
            told = None if parameter is None else value(parameter)
            if told is None:
                return None
            columns.append(told.reshape(-1, 1) if part == "bias" else self.rule.matrix(self.module, told))
        return torch.cat(columns, 1) if columns else None


@dataclass(frozen=True)
class TrackedComposite:
    """A module that uses several tracked weights in one call."""

    module: nn.Module
    kind: Composite
    parts: Mapping[str, TrackedModule]
    """Its tracked weights by their names below the module's; they are never called themselves."""


@dataclass(frozen=True)
class BlockShape:
    """A block before its rank is known."""

    name: str
    kind: str
    shape: tuple[int, int]
    """``(d_out, d_in)`` with the bias column."""
    bias: bool
    """Whether the last column belongs to a bias."""
    tied: tuple[str, ...]
    parameters: int


@dataclass(frozen=True)
class Selection:
    """What is tracked of a model."""

    modules: tuple[TrackedModule, ...]
    blocks: tuple[BlockShape, ...]
    skipped: Mapping[str, str]
    """Modules that have parameters of a tracked type and are left out all the same, with the reason."""
    covered: int
    """Parameters that the blocks stand for."""
    parameters: int
    """Trainable parameters of the model."""
    composites: tuple[TrackedComposite, ...] = ()
    """Modules among whose weights are some of ``modules``, which are captured by replaying these modules."""


def select_modules(
    model: nn.Module,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    types: Sequence[str] = tuple(RULES),
    batch_dim: Mapping[str, int] | None = None,
    frozen: bool = False,
    meta: bool = False,
) -> Selection:
    """Choose modules by type, by ``include`` and ``exclude`` globs on their qualified names.

    A module named exactly (without wildcards) is tracked whatever its type. ``frozen`` modules are those with no
    trainable parameter; they are left out unless asked for. With ``meta``, modules whose weights are on the meta device
    are chosen, too: enough to plan with, not to log.

    Raises:
        UnsupportedModuleError: a module named exactly has no rule, or cannot be captured.
        ConfigError: a type has no rule, a pattern fits nothing, or nothing is left to track.
    """
    require_model(model)
    unknown = [name for name in types if name not in RULES]
    if unknown:
        raise ConfigError(f"modules.types: {unknown[0]!r} has no rule; rules exist for {', '.join(RULES)}")
    skipped: dict[str, str] = {}
    chosen: list[tuple[str, nn.Module, Rule]] = []
    uncalled = _uncalled_parts(model)
    candidates = trackable(model)
    for name, module in candidates.items():
        exact = name in include and not _is_glob(name)
        if (not exact and not _fits(name, include)) or _fits(name, exclude):
            continue
        kind = type_name(module)
        if kind not in types and not exact:
            if (why := _why_passed_over(module, kind, types, uncalled.get(name))) is not None:
                skipped[name or "the model itself"] = why
            continue
        reason = uncalled.get(name) or _reason_against(module, kind, frozen or exact, meta)
        if reason is None:
            assert kind is not None
            chosen.append((name, module, RULES[kind]))
        elif exact:
            of = f"{name!r} ({type(module).__name__})"
            raise UnsupportedModuleError(f"module {of} cannot be tracked: {reason}; rules exist for {', '.join(RULES)}")
        elif next(module.parameters(), None) is not None:
            skipped[name] = reason
    _check_patterns(list(candidates), include, "include")
    _check_patterns(list(candidates), list(batch_dim or ()), "batch_dim")
    _warn_of_patterns(list(candidates), exclude)
    if not chosen:
        raise ConfigError(
            f"no module to track: of the types {', '.join(types)} none has trainable parameters under "
            f"include={list(include)}, exclude={list(exclude)}; {_instead(candidates, skipped)}"
        )
    chosen = _with_partners(candidates, chosen, exclude, skipped)
    selection = _assemble(model, chosen, skipped, batch_dim or {})
    return replace(selection, composites=tuple(_composites(model, selection.modules)))


def _with_partners(
    candidates: Mapping[str, nn.Module],
    chosen: Sequence[tuple[str, nn.Module, Rule]],
    exclude: Sequence[str],
    skipped: dict[str, str],
) -> list[tuple[str, nn.Module, Rule]]:
    """``chosen`` and, whatever their type, the modules that share a weight with one of them.

    Without them a row would hold only a part of the weight's gradient, that of one of its uses.
    """
    rules = {name: rule for name, _, rule in chosen}
    owners = {id(module.weight): name for name, module, _ in chosen}
    for name, module in candidates.items():
        owner = owners.get(id(module._parameters.get("weight")))
        kind = type_name(module)
        if owner is None or name in rules:
            continue
        if kind is None or _fits(name, exclude) or RULES[kind].check(module):
            skipped[name] = f"it shares its weight with {owner!r}, whose rows lack its part of the gradient"
        else:
            rules[name] = RULES[kind]
    return [(name, module, rules[name]) for name, module in candidates.items() if name in rules]


def require_model(model: object) -> None:
    """Raise :class:`ConfigError` for what is no model, or one whose layers do not hold their weights."""
    if not isinstance(model, nn.Module):
        found = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ConfigError(f"the model is {found}; a torch.nn.Module is needed")
    require_own_weights(model)


def select_stored(model: nn.Module, layout: Layout, *, batch_dim: Mapping[str, int] | None = None) -> Selection:
    """The modules of a store's (or a curvature's) layout, with the parts (weight, bias) it has, trainable now or not.

    Raises:
        ModelMismatchError: a module is missing or is of a kind without a rule (names the first).
    """
    require_model(model)
    candidates = trackable(model)
    parts: dict[str, tuple[bool, bool]] = {}
    for name in dict.fromkeys(name for block in layout for name in (block.name, *block.tied)):
        module = candidates.get(name)
        kind = None if module is None else type_name(module)
        if module is None or kind is None:
            listed = ", ".join(sorted(set(candidates) - {""})[:8])
            raise ModelMismatchError(
                f"module {name!r}, which was tracked, is not in this model ({type(model).__name__}), or can not be "
                f"tracked; its modules are {listed} ...: load the model that it was"
            )
        parts[name] = _stored_parts(name, module, RULES[kind], layout)
    ordered = [(n, m, RULES[type_name(m) or ""]) for n, m in candidates.items() if n in parts]
    selection = _assemble(model, ordered, {}, batch_dim or {}, parts)
    return replace(selection, composites=tuple(_composites(model, selection.modules)))


def _stored_parts(name: str, module: nn.Module, rule: Rule, layout: Layout) -> tuple[bool, bool]:
    """Whether a store's row has ``name``'s weight, and its bias."""
    tied = any(name in block.tied for block in layout)
    own = layout[name] if name in layout.names else None
    weight = tied or (own is not None and own.kind != "bias")
    if own is None:
        return weight, False
    own_weight = own.kind != "bias"
    has_bias = getattr(module, "bias", None) is not None
    return weight, has_bias and own.shape[1] == rule.shape(module)[1] * own_weight + 1


def trackable(model: nn.Module) -> dict[str, nn.Module]:
    """All that can be tracked by its name: modules, and weights of composite modules as layers of their own."""
    found: dict[str, nn.Module] = {}
    for name, module in named_modules(model):
        found.setdefault(name, module)
        for part, stand_in in parts_of(name, module):
            found.setdefault(part, stand_in)
    return found


def _composites(model: nn.Module, modules: Sequence[TrackedModule]) -> Iterator[TrackedComposite]:
    tracked = {module.name: module for module in modules}
    for name, module in named_modules(model):
        kind, below = composite_for(module), f"{name}." if name else ""
        parts = {part.removeprefix(below): tracked[part] for part, _ in parts_of(name, module) if part in tracked}
        if kind is not None and parts:
            yield TrackedComposite(module, kind, parts)


def _assemble(
    model: nn.Module,
    chosen: Sequence[tuple[str, nn.Module, Rule]],
    skipped: Mapping[str, str],
    batch_dim: Mapping[str, int],
    parts: Mapping[str, tuple[bool, bool]] | None = None,
) -> Selection:
    """Blocks and uses of the chosen modules; ``parts`` says what of each counts, else what is trained does."""
    owners: dict[int, tuple[str, Rule]] = {}
    blocks: dict[str, BlockShape] = {}
    modules, seen_biases = [], dict[int, str]()
    for name, module, rule in chosen:
        weight, bias = module.weight, getattr(module, "bias", None)
        if parts is None:
            # A module chosen though all of it is frozen is tracked whole; else only what is trained.
            all_frozen = not any(p.requires_grad for p in module.parameters(recurse=False))
            has_weight = weight.requires_grad or all_frozen
            has_bias = bias is not None and (bias.requires_grad or all_frozen)
        else:
            has_weight, has_bias = parts[name]
        if has_bias and seen_biases.setdefault(id(bias), name) != name:
            raise UnsupportedModuleError(
                f"modules {seen_biases[id(bias)]!r} and {name!r} share one bias; exclude one of them"
            )
        owner = owners.setdefault(id(weight), (name, rule)) if has_weight else (name, rule)
        uses = []
        if owner[0] != name:
            transposed = rule.transposed != owner[1].transposed
            uses.append(Use(owner[0], weight=True, bias=False, transposed=transposed))
            shared = blocks[owner[0]]
            blocks[owner[0]] = BlockShape(**{**vars(shared), "tied": (*shared.tied, name)})
        if owner[0] == name or has_bias:
            own_weight = has_weight and owner[0] == name
            uses.append(Use(name, weight=own_weight, bias=has_bias))
            d_out, d_in = rule.shape(module)
            columns = d_in * own_weight + has_bias
            kind = rule.kind if own_weight else "bias"
            blocks[name] = BlockShape(name, kind, (d_out, columns), has_bias, (), d_out * columns)
        modules.append(TrackedModule(name, module, rule, tuple(uses), _dim_for(name, batch_dim)))
    covered = sum(block.parameters for block in blocks.values())
    total = sum(p.numel() for p in model.parameters() if p.requires_grad) or sum(p.numel() for p in model.parameters())
    return Selection(tuple(modules), tuple(blocks.values()), skipped, covered, max(total, covered))


def _reason_against(module: nn.Module, kind: str | None, frozen: bool, meta: bool) -> str | None:
    if kind is None:
        return "its type has no rule"
    parameters = list(module.parameters(recurse=False))
    if not parameters or module._parameters.get("weight") is None:
        return "its weight is not a plain parameter"
    if any(isinstance(p, UninitializedParameter) for p in parameters):
        return "its shape is not known before the model has run once"
    if parameters[0].is_meta and not meta:
        return "its weights are on the meta device: load them first"
    if not frozen and not any(p.requires_grad for p in parameters):
        return "its parameters are frozen (requires_grad=False)"
    return RULES[kind].check(module)


def _uncalled_parts(model: nn.Module) -> dict[str, str]:
    """Modules inside composites that cannot be replayed, whose weights are used without calling them."""
    return {
        ".".join(filter(None, (name, part))): reason
        for name, module in named_modules(model)
        if (kind := composite_for(module)) is not None and (reason := kind.reason_against(module)) is not None
        for part, _ in module.named_modules()
    }


def _why_passed_over(module: nn.Module, kind: str | None, types: Sequence[str], uncalled: str | None) -> str | None:
    """Why a module of no tracked type is left out, where that is not simply as the types say."""
    if kind is None and _looks_tracked(module, types):
        return f"{type(module).__name__} overrides the forward pass of its parent"
    if uncalled is not None and "Linear" in types and next(module.parameters(recurse=False), None) is not None:
        return uncalled
    if kind is None and composite_for(module) is None and _is_trained(module):
        return f"{type(module).__name__} has no rule"
    return None


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _instead(candidates: Mapping[str, nn.Module], skipped: Mapping[str, str]) -> str:
    """What there is where nothing is tracked, and how to track it."""
    trained = {name: type(module).__name__ for name, module in candidates.items() if _is_trained(module)}
    if trained:
        listed = {name: skipped.get(name, kind) for name, kind in trained.items()}
        return (
            f"what is trained is {_some(listed)}: name these in modules.include, or their types in modules.types, "
            f"where there are rules ({', '.join(RULES)})"
        )
    left_out = f"left out: {_some(skipped)} " if skipped else ""
    return f"{left_out}(a frozen model is tracked with modules.frozen=true)"


def _looks_tracked(module: nn.Module, types: Sequence[str]) -> bool:
    return any(isinstance(module, getattr(nn, name)) for name in types if hasattr(nn, name))


def _check_patterns(names: Sequence[str], patterns: Sequence[str], setting: str) -> None:
    for pattern in _idle(names, patterns):
        raise ConfigError(f"modules.{setting}: {pattern!r} fits no module of the model; its modules are {_some(names)}")


def _warn_of_patterns(names: Sequence[str], exclude: Sequence[str]) -> None:
    # One config may serve several models: "*head" says "if there is any", a whole path does not.
    for pattern in _idle(names, [pattern for pattern in exclude if not pattern.startswith("*")]):
        warnings.warn(
            f"modules.exclude: {pattern!r} fits no module of the model, so nothing is left out by it; its modules are "
            f"{_some(names)}",
            RuntimeWarning,
            stacklevel=5,
        )


def _idle(names: Sequence[str], patterns: Sequence[str]) -> Iterator[str]:
    """Patterns that fit none of the names."""
    yield from (pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names))


def _dim_for(name: str, batch_dim: Mapping[str, int]) -> int:
    return next((dim for pattern, dim in batch_dim.items() if fnmatchcase(name, pattern)), 0)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_glob(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


def _some(names: Mapping[str, str] | Sequence[str], most: int = 8) -> str:
    listed = list(_described(names))
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _described(names: Mapping[str, str] | Sequence[str]) -> Iterator[str]:
    if isinstance(names, Mapping):
        yield from (f"{name!r} ({reason})" for name, reason in names.items())
    else:
        yield from (repr(name) for name in names if name)
