"""The hooks' lifetime: attached for one block of training code, gone after it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from logix_like.capture.composite import ModuleCall, random_state
from logix_like.capture.eager import eager
from logix_like.capture.selection import Selection, TrackedComposite, TrackedModule
from logix_like.errors import CaptureError
from logix_like.timing import Stopwatch

OnCall = Callable[[TrackedModule, Tensor, Tensor], Tensor | None]
"""Told of each call of a tracked module (module, input, output); may return another output."""


class OwnHook(partial[Any]):
    """A hook of ours: a copy of it, which a copied or pickled model has, does nothing."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return do_nothing

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return nothing_to_do, ()


def do_nothing(*args: Any, **kwargs: Any) -> None:
    """What a copied model has in the place of our hooks."""


def nothing_to_do() -> Callable[..., None]:
    """What a pickled model makes of our hooks."""
    return do_nothing


class HookSet:
    """Forward hooks on all tracked modules between ``__enter__`` and ``__exit__``.

    Outside the block the model carries nothing of ours: it can be copied, pickled, evaluated and compiled as if
    we were not there. Inside it, what was compiled runs eagerly: hooks in a compiled graph would retrace it, and
    once more without them. The compiled code itself is kept, and used again behind the block.
    """

    def __init__(self, selection: Selection, on_call: OnCall, batch: int, watch: Stopwatch | None = None) -> None:
        parts = {part.name for composite in selection.composites for part in composite.parts.values()}
        self._modules = [tracked for tracked in selection.modules if tracked.name not in parts]
        self._composites = selection.composites
        self._watch = watch or Stopwatch()
        self._on_call = self._watch.timed(on_call)
        self._batch = batch
        self._handles: list[RemovableHandle] = []
        self._stack = ExitStack()

    def __enter__(self) -> HookSet:
        for tracked in self._modules:
            self._attach(tracked.module, OwnHook(_forward_hook, self._on_call, tracked))
        for composite in self._composites:
            replayer = Replayer(composite, self._on_call, self._batch, self._watch)
            self._handles.append(composite.module.register_forward_pre_hook(OwnHook(replayer.before)))
            self._attach(composite.module, OwnHook(replayer.after))
        if "torch._dynamo" in sys.modules:  # nothing can have been compiled before it is imported
            self._stack.enter_context(eager())
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()
        while self._handles:
            self._handles.pop().remove()

    def _attach(self, module: nn.Module, hook: OwnHook) -> None:
        # Before hooks of the user's own, which may give another output than the module's.
        self._handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))


class Replayer:
    """Replays one composite module whenever a gradient reaches its output, telling ``on_call`` of its parts."""

    def __init__(self, composite: TrackedComposite, on_call: OnCall, batch: int, watch: Stopwatch) -> None:
        self._watch = watch
        self._composite = composite
        self._on_call = on_call
        self._batch = batch
        self._states: list[Tensor | None] = []

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note the random state that the call starts from, if it draws numbers."""
        _refuse_transforms(type(module).__name__)
        self._states.append(random_state(module) if self._composite.kind.draws(module) else None)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Wait for the gradient of the call's first output."""
        call = ModuleCall(args, kwargs, self._states.pop())
        first, *others = output if isinstance(output, tuple) else (output,)
        if not torch.is_grad_enabled():
            return None
        replaced = None
        if not first.requires_grad:
            # With frozen weights the graph starts here; a copy, so that in-place layers may follow.
            first = first.detach().requires_grad_().clone()
            replaced = (first, *others) if isinstance(output, tuple) else first
        first.register_hook(self._watch.timed(partial(self._replay, call)))
        for other in others:
            if isinstance(other, Tensor) and other.requires_grad:
                other.register_hook(self._refuse_other)
        return replaced

    def _replay(self, call: ModuleCall, gradient: Tensor) -> None:
        kind = gradient.device.type
        with torch.enable_grad(), torch.autocast(kind, enabled=False):
            output = self._composite.kind.replay(self._composite.module, call, self._batch, self._on_part)
            output.backward(gradient.detach().to(output.dtype))

    def _on_part(self, name: str, value: Tensor, output: Tensor) -> Tensor:
        part = self._composite.parts.get(name)
        if part is not None:
            self._on_call(part, value, output)
        return output

    def _refuse_other(self, gradient: Tensor) -> None:
        raise CaptureError(
            f"the loss uses the attention weights that {type(self._composite.module).__name__} returns "
            f"({', '.join(part.name for part in self._composite.parts.values())}), whose gradient is not captured; "
            "exclude these modules"
        )


def _forward_hook(
    on_call: OnCall,
    tracked: TrackedModule,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
) -> Tensor | None:
    _refuse_transforms(tracked.name)
    # Every layer with a rule takes one tensor, by position or by keyword.
    value = args[0] if args else next(iter(kwargs.values()))
    return on_call(tracked, value, output)


def _refuse_transforms(name: str) -> None:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise CaptureError(
            f"module {name!r} was called inside a transform of torch.func (vmap, grad, jvp, ...), where gradients "
            "pass by the hooks of modules; inside a block call the model itself and loss.backward()"
        )
