"""Ctrl-C, SIGTERM and SIGHUP that wait for the step in hand, so that what is saved is never half a step."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable
from types import FrameType

from utils.distributed import Group

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # a terminal sends the one, `kill` and Slurm the other
# What a terminal that is closed sends, a broken SSH connection say.
HANGUP = () if sys.platform == "win32" else (signal.SIGHUP,)


class Interrupt:
    """While this context is open, the first of these signals is noted; a second one acts as usual.

    A second SIGHUP does not act: the kernel and the shell both send one when a terminal is closed. A SIGHUP
    that was ignored before, as `nohup` has it, stays ignored.

    Args:
        patient: let no second signal act. A launcher passes on what its terminal got, so that its processes
            get one Ctrl-C twice.

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
        """What a process that a signal has ended leaves by convention: 129, 130 or 143; 0 without one."""
        return 0 if self.signal is None else 128 + self.signal

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        if not self._patient and number in SIGNALS:
            self._restore(SIGNALS)

    def _restore(self, numbers: Iterable[signal.Signals]) -> None:
        for number in numbers:
            signal.signal(number, self._before[number])

    def __enter__(self) -> Interrupt:
        heard = [number for number in HANGUP if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in (*SIGNALS, *heard)}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore(self._before)
