"""The hooks' lifetime: attached for one block of training code, gone after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from logix_like.capture.selection import TrackedModule

OnCall = Callable[[TrackedModule, Tensor, Tensor], Tensor | None]
"""Told of each call of a tracked module (module, input, output); may return another output."""


class HookSet:
    """Forward hooks on all tracked modules between ``__enter__`` and ``__exit__``.

    Outside the block the model carries nothing of ours: it can be copied, pickled, evaluated and compiled as if
    we were not there.
    """

    def __init__(self, modules: Sequence[TrackedModule], on_call: OnCall) -> None:
        self._modules = modules
        self._on_call = on_call
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> HookSet:
        for tracked in self._modules:
            hook = partial(_forward_hook, self._on_call, tracked)
            self._handles.append(tracked.module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._handles:
            self._handles.pop().remove()


def _forward_hook(
    on_call: OnCall,
    tracked: TrackedModule,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
) -> Tensor | None:
    # Every layer with a rule takes one tensor, by position or by keyword.
    value = args[0] if args else next(iter(kwargs.values()))
    return on_call(tracked, value, output)
