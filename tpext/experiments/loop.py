"""What all training loops share."""

from __future__ import annotations

import contextlib
import platform
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import numpy as np
import torch

import tpext
from tpext.experiments.config import ConfigError


class DivergedError(RuntimeError):
    """A loss, gradient or parameter became NaN or infinite."""

    def __init__(self, iteration: int, what: str) -> None:
        super().__init__(f"diverged at iteration {iteration}: {what}")
        self.iteration = iteration


def check_device(name: str) -> None:
    """Raise ConfigError for a device that is not there."""
    if torch.device(name).type == "cuda":
        if not tpext.build_info()["cuda_architectures"]:
            raise ConfigError("device must be cpu: this build of tpext has no CUDA kernels")
        if not torch.cuda.is_available():
            raise ConfigError(f"device must be cpu: torch sees no CUDA device, got {name}")


@contextlib.contextmanager
def torch_state(seed: int, threads: int) -> Iterator[None]:
    """Seed torch and set its threads, for the run only."""
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@contextlib.contextmanager
def catch_interrupts() -> Iterator[list[int]]:
    """Collect a first Ctrl-C in a list, for the loop to stop between two iterations; let a second one stop it at once.

    Only the main thread can, and only where nobody else handles Ctrl-C.
    """
    caught: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield caught
        return

    def handle(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "tpext": str(tpext.build_info()["version"]),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
