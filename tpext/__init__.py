"""tpext: target propagation for PyTorch on fused CPU and CUDA kernels.

Swap ``torch.nn.RNN`` for :class:`tpext.nn.RNN`, or build on :class:`tpext.nn.MLP` and :class:`tpext.nn.TargetLinear`,
and ``loss.backward()`` is target propagation; ``rule=`` says which kind.
"""

from __future__ import annotations

import importlib.util as _importlib_util

from tpext import _loading

if _loading.is_command_line():
    _loading.arm()

# torch first: the kernels use the OpenMP runtime that it has loaded.
import torch as _torch  # noqa: F401

if _importlib_util.find_spec("tpext._C") is None:
    raise ImportError(
        f"tpext: {__path__[0]} has no compiled module `_C`. In a checkout run `pip install -e .`, or start Python "
        "outside it to use the installed package."
    )

from tpext import _C, diagnostics, feedback, nn, optim, tasks
from tpext.citations import citation
from tpext.ops import SingularError
from tpext.rules import (
    Backprop,
    ConstrainedLeastSquares,
    DifferenceTargetPropagation,
    DifferenceTargets,
    DirectTargets,
    GaussNewtonTargets,
    Kaczmarz,
    LearnedInverse,
    RegularizedInverse,
    RegularizedLeastSquares,
    Targets,
)

__version__: str = _C.build_info()["version"]


def build_info() -> _C.BuildInfo:
    """How the native part of this installation was built.

    Returns:
        A dict with ``version`` and ``commit`` of the source, ``compiler``, ``cpu_capabilities`` (the compiled
        instruction sets, least first), ``cuda_architectures`` (such as ``["sm_80", "sm_90", "compute_90"]``, empty
        without CUDA) and ``cuda_compiler`` (such as "nvcc 13.0.88", None without CUDA).

    >>> sorted(tpext.build_info())
    ['commit', 'compiler', 'cpu_capabilities', 'cuda_architectures', 'cuda_compiler', 'version']
    """
    return _C.build_info()


__all__ = [
    "Backprop",
    "ConstrainedLeastSquares",
    "DifferenceTargetPropagation",
    "DifferenceTargets",
    "DirectTargets",
    "GaussNewtonTargets",
    "Kaczmarz",
    "LearnedInverse",
    "RegularizedInverse",
    "RegularizedLeastSquares",
    "SingularError",
    "Targets",
    "__version__",
    "build_info",
    "citation",
    "diagnostics",
    "feedback",
    "nn",
    "optim",
    "tasks",
]
