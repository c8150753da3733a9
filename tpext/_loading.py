"""Ctrl-C while the command line loads: torch takes seconds, and an interrupt inside its import is a long traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

_PROGRAMS = ("tpext", "-m")
"""What ``sys.argv[0]`` ends in while the package is imported by the script ``tpext``, or for ``python -m tpext``."""


def _stop(number: int, frame: FrameType | None) -> None:
    os.write(2, b"tpext: interrupted\n")
    os._exit(130)


def is_command_line() -> bool:
    """Whether it is the command line that imports the package, with Ctrl-C as Python has it."""
    return (
        os.path.basename(next(iter(sys.argv), "")) in _PROGRAMS
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )


def arm() -> None:
    """Let Ctrl-C end the process with one line."""
    signal.signal(signal.SIGINT, _stop)


def disarm() -> None:
    """Make Ctrl-C a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
