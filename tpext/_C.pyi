"""Types of the native module.

Tensors are DLPack capsules or objects with ``__dlpack__``, on the CPU and contiguous (``input`` along its last axis).
Outputs must not overlap inputs.
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

def regularized_inverse(weight: object, reg: float, inverse: object, status: object, num_threads: int) -> int:
    """Write ``inverse [batch, N, M]`` and ``status [batch]``, and return how many statuses are not 0.

    0: inverted; 1: NaN or infinity in the weight; 2: singular or overflow. ``inverse`` is written for 0 only.
    """

def rnn_scan(
    x_proj: object | None,
    input: object | None,
    weight_ih: object | None,
    bias: object | None,
    h0: object,
    weight_hh: object,
    lengths: object | None,
    reverse: list[bool],
    nonlinearity: str,
    states: object,
    h_n: object | None,
    num_threads: int,
) -> None: ...
def rnn_scan_backward(
    grad_states: object | None,
    grad_h_n: object | None,
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
    grad_states: object | None,
    disp_n: object | None,
    credit_n: object | None,
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
    credit_h0: object | None,
    norms: object | None,
    displacement: object | None,
    num_threads: int,
) -> None: ...
def rnn_learned_target_scan(
    grad_states: object | None,
    disp_n: object | None,
    credit_n: object | None,
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
    credit_h0: object | None,
    norms: object | None,
    num_threads: int,
) -> None: ...
def rnn_weight_gradients(
    delta: object,
    states: object,
    h0: object,
    input: object,
    lengths: object | None,
    reverse: list[bool],
    scale: float,
    grad_weight_ih: object | None,
    grad_weight_hh: object | None,
    grad_bias: object | None,
    num_threads: int,
) -> None: ...
