"""Ctrl-C that waits for the step in hand, so that what is saved is never half a step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class Interrupt:
    """While this context is open, the first Ctrl-C sets `requested`; a second one raises as usual."""

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._before)

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._before)
