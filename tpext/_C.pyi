"""Types of the native module.

Tensors are DLPack capsules or objects with ``__dlpack__``, on the CPU and contiguous. Outputs must not overlap inputs.
"""

from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    commit: str
    compiler: str
    cpu_capabilities: list[str]
    cuda_architectures: list[str]

def build_info() -> BuildInfo: ...
def cpu_capability() -> str:
    """The instruction set in use; the environment variable TPEXT_CPU_CAPABILITY overrides the choice at import."""

def rnn_scan(
    x_proj: object,
    h0: object,
    weight_hh: object,
    lengths: object | None,
    reverse: list[bool],
    nonlinearity: str,
    states: object,
    num_threads: int,
) -> None: ...
def rnn_scan_backward(
    grad_states: object,
    states: object,
    weight_hh: object,
    lengths: object | None,
    reverse: list[bool],
    nonlinearity: str,
    grad_x_proj: object,
    grad_h0: object,
    num_threads: int,
) -> None: ...
def rnn_target_scan(
    grad_states: object,
    states: object,
    h0: object,
    weight_hh: object,
    inverse: object,
    x_proj: object | None,
    lengths: object | None,
    reverse: list[bool],
    nonlinearity: str,
    correction: str,
    credit: str,
    target_step: float,
    clip: float,
    delta: object,
    disp_h0: object,
    norms: object | None,
    displacement: object | None,
    num_threads: int,
) -> None: ...
def rnn_learned_target_scan(
    grad_states: object,
    states: object,
    weight_hh: object,
    reverse_weight: object,
    reverse_pre: object,
    lengths: object | None,
    reverse: list[bool],
    nonlinearity: str,
    credit: str,
    target_step: float,
    delta: object,
    disp_h0: object,
    norms: object | None,
    num_threads: int,
) -> None: ...
