"""Ctrl-C and SIGTERM that wait for the step in hand, so that what is saved is never half a step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from utils.distributed import Group

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # a terminal sends the one, `kill` and Slurm the other


class Interrupt:
    """While this context is open, the first of these signals is noted; a second one acts as usual.

    Args:
        patient: note all of them and let none act. A launcher passes on what its terminal got, so
            that its processes get one Ctrl-C twice.

    Attributes:
        signal: number of the first signal, None before it.
    """

    def __init__(self, patient: bool = False) -> None:
        self.signal: int | None = None
        self._patient = patient

    @property
    def requested(self) -> bool:
        """Whether a signal asks to stop."""
        return self.signal is not None

    def agree(self, group: Group) -> bool:
        """Whether a signal asks any of the processes to stop, which all of them then do."""
        self.signal = group.largest(self.signal or 0) or None
        return self.requested

    @property
    def exit_code(self) -> int:
        """What a process that a signal has ended leaves by convention: 130 or 143; 0 without one."""
        return 0 if self.signal is None else 128 + self.signal

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
        if not self._patient:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()
