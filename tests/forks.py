"""A process that has imported the scripts, from which runs of them are forked: importing takes longer.

python -m tests.forks    # reads one request a line, and answers each with one line
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.errors import run_script

ROOT = Path(__file__).parents[1]
FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT  # a terminal must be read to be that of a session
MODULES = ("mrcl_classification", "evaluate_classification", "tests.utils.test_distributed")


class Forks:
    """Starts processes of the scripts, which end and are killed like any other."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command, pipe = [sys.executable, "-m", "tests.forks"], subprocess.PIPE
        self.server = subprocess.Popen(command, text=True, env=environment, stdin=pipe, stdout=pipe)

    def _ask(self, request: object) -> int:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def start(self, folder: Path, module: str, *flags: str, **environment: str) -> int:
        """Start `main` of a module in `folder`; the process's id. What the process prints is appended to the
        files FOLDER.stdout and FOLDER.stderr, or shown on the terminal TTY, which is that of its session."""
        return self._ask([str(folder), module, flags, environment])

    def wait(self, child: int) -> int:
        """The exit code of a process, when it has ended."""
        return self._ask(child)

    def kill_when(self, condition: Callable[[], bool], child: int, late: float = 0) -> None:
        """Kill a process so many seconds after the condition holds, which must be before the process ends."""
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(late)
        os.kill(child, signal.SIGKILL)
        assert self.wait(child) == -signal.SIGKILL


def fork(folder: str, module: str, flags: list[str], environment: dict[str, str]) -> int:
    """Fork a process that runs `main` of a module; its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(folder)
            os.environ.update(environment)
            os.setsid()
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever started the tests with nohup ignores it
            for number, name in enumerate(("stdout", "stderr"), 1):
                handle = os.open(environment.get("TTY", f"{folder}.{name}"), FLAGS)
                os.dup2(handle, number)
                os.close(handle)
                setattr(sys, name, os.fdopen(number, "w", buffering=1))
            sys.argv = [f"{module}.py", *flags]
            run_script(sys.modules[module].main)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def main() -> None:
    for module in MODULES:
        importlib.import_module(module)
    for line in sys.stdin:
        request: Any = json.loads(line)
        wait = isinstance(request, int)
        print(os.waitstatus_to_exitcode(os.waitpid(request, 0)[1]) if wait else fork(*request), flush=True)


if __name__ == "__main__":
    main()
