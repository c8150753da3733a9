"""Entry point of the command line. It loads nothing heavy until it knows that the extra is installed."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from tpext import _loading

EXTRA_MODULES = ("tyro", "rich", "matplotlib", "pandas", "joblib", "yaml", "tomli", "pooch", "tensorboard")
"""What the command line needs besides the core; ``pip install "tpext[experiments]"`` brings it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``tpext`` with the given arguments (those of the process by default) and return its exit status."""
    _prepare_output()
    try:
        from tpext.experiments import commands

        _loading.disarm()
        return commands.run(sys.argv[1:] if arguments is None else arguments)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA_MODULES:
            raise
        print(
            f'tpext: {missing} is not installed; the command line needs: pip install "tpext[experiments]"',
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:  # while the modules load
        print("tpext: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader went away (`tpext tasks | head`). Nothing is left to say, the interpreter's own flush included.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _prepare_output() -> None:
    """Let neither environment nor terminal keep the commands from drawing and printing."""
    # They draw files only. A notebook names a backend for all its children, some of which lack that module.
    os.environ["MPLBACKEND"] = "agg"
    for name in ("COLUMNS", "LINES"):
        # rich takes zero at its word
        if not os.environ.get(name, "0").strip("0"):
            os.environ.pop(name, None)
    for stream in (sys.stdout, sys.stderr):
        # names of folders may hold what the encoding lacks
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
