"""Bringing a block's tensors to the host while the device goes on with the training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Delivery:
    """Copies of one block's tensors, on their way to the host.

    From a CUDA device a stream of its own copies into pinned memory, behind what is computed so far: the training
    thread neither waits nor is waited for. Whoever reads the copies calls :meth:`wait` first. From other devices
    they are made at once.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._events: list[Any] = []
        self._used: dict[torch.device, Any] = {}

    def take(self, tensor: Tensor) -> Tensor:
        """``tensor`` on the host, once :meth:`wait` has returned."""
        if not self._streams.serves(tensor.device):
            return tensor.cpu()
        stream = self._used.get(tensor.device)
        if stream is None:
            stream = self._used[tensor.device] = self._streams.behind(tensor.device)
        with self._streams.on(stream):
            tensor.record_stream(stream)  # its memory is not used again before the copy is made
            return tensor.to("cpu", non_blocking=True)

    def sent(self) -> None:
        """Say that everything was taken."""
        self._events = [stream.record_event(self._streams.event()) for stream in self._used.values()]

    def wait(self) -> None:
        """Return once all copies are there."""
        for event in self._events:
            event.synchronize()


class Streams:
    """One stream for copies on each device.

    Args:
        backend: what makes streams and events; tests give one of their own.
        kind: the type of the devices that it serves.
    """

    def __init__(self, backend: Any = torch.cuda, kind: str = "cuda") -> None:
        self._backend = backend
        self._kind = kind
        self._streams: dict[torch.device, Any] = {}

    def serves(self, device: torch.device) -> bool:
        """Whether copies from ``device`` need not be waited for."""
        return device.type == self._kind

    def behind(self, device: torch.device) -> Any:
        """The device's stream, which goes on when all that was computed there so far is done."""
        if device not in self._streams:
            self._streams[device] = self._backend.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(self._backend.current_stream(device))
        return stream

    def on(self, stream: Any) -> Any:
        """A context in which work goes to ``stream``."""
        return self._backend.stream(stream)

    def event(self) -> Any:
        """An event for which a thread waits asleep."""
        return self._backend.Event(blocking=True)
