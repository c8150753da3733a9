"""Types of the native module.

Tensors are DLPack capsules or objects with ``__dlpack__``, contiguous (``input`` along its last axis), and all on the
device of the leading one: the CPU, or a CUDA device. Outputs must not overlap inputs.

The CPU takes float32 and float64, and a number of threads as ``execution``. CUDA takes bfloat16 and float16 as well in
the scans, ``lengths`` on the device, and ``(stream, regime, workspace)`` as ``execution``: the ``cudaStream_t``;
"auto", "block", "cluster" or "grid" for the scans; zeroed uint8 ``[bytes]`` of the size that ``rnn_plan`` gives, or
None. In regime "step" a scan's entry does the elementwise work of one step, number 0..T-1, or of what follows the
last, number T; ``execution`` is ``(stream, "step", None, number, sums, carried)``, the last two ``[P, S, B, H]``: the
products of ``carried`` with each matrix of a step, and what the next products take, in place; G times as wide the sums
of gates going forward, and what gates going back carry. Kernels are enqueued on the stream, and nothing waits for them.
A build without CUDA raises RuntimeError.
"""

from typing import TypeAlias, TypedDict

Execution: TypeAlias = int | tuple[int, str, object | None] | tuple[int, str, None, int, object, object]

class BuildInfo(TypedDict):
    version: str
    commit: str
    compiler: str
    cpu_capabilities: list[str]
    cuda_architectures: list[str]
    cuda_compiler: str | None

def build_info() -> BuildInfo: ...
def cpu_capability() -> str:
    """The instruction set in use; the environment variable TPEXT_CPU_CAPABILITY overrides the choice at import."""

def usable_processors() -> int:
    """How many threads of this one's affinity mask and the process's quota can run at the same time."""

def quota_processors(membership: str, mount: str, otherwise: int) -> int:
    """What a Linux control group leaves of the processors (csrc/cpu/processors.h)."""

def large_array(shape: list[int], bits: int) -> object | None:
    """A DLPack capsule of an array of floats of 32 or 64 bits in pages of 2 MiB (csrc/cpu/large_memory.h).

    Its contents are what an earlier one left. None where there is no such memory.
    """

def act_inverse(
    target: object, input: object, activation: str, reg: float, output: object, execution: Execution
) -> None:
    """Write ``output [N]``, the minimiser of ``(a(x) - target)^2 + reg (x - input)^2``; on the CPU only.

    ``activation`` is "tanh" or "sigmoid"; ``reg > 0``.
    """

def act_displacement(
    displacement: object, input: object, activation: str, reg: float, output: object, execution: Execution
) -> None:
    """Write ``output [N]``, the minimiser of ``(a(input + u) - a(input) - displacement)^2 + reg u^2``; as above."""

def code_difference(
    preactivation: object,
    change: object,
    output: object,
    indices: object | None,
    activation: str,
    alpha: float,
    kernel: int,
    stride: int,
    padding: int,
    noisy: bool,
    difference: object,
    execution: Execution,
) -> None:
    """Write ``difference [K, P, H, W]`` from ``preactivation [P, H, W]``, ``change [K, P, H, W]``, ``output [P, h, w]``
    and int64 ``indices [P, h, w]``; with ``kernel`` 0 ``h, w`` are ``H, W`` and indices are not looked at.

    ``activation`` is "elu", "relu", "tanh" or "identity".
    """

def counter_normal(
    output: object, seed: int, step: int, stream: int, first_row: int, scale: float, execution: Execution
) -> None:
    """Write ``output [B, N]``; ``seed >= 0``, the other words below 2^32."""

def gated_layer_backward(
    grad_states: object | None,
    input: object,
    states: object,
    h0: object,
    c0: object | None,
    kept: object,
    weight_hh: object,
    feedback: object,
    input_feedback: object | None,
    lengths: object | None,
    reverse: list[bool],
    cell: str,
    inverse: str,
    credit: str,
    target_step: list[float],
    margin: list[float],
    gate_slope: str,
    candidate_slope: str,
    slope_reg: list[float],
    scale: list[float],
    input_scale: list[float],
    disp_h_n: object | None,
    disp_c_n: object | None,
    credit_h_n: object | None,
    credit_c_n: object | None,
    grad_input: object | None,
    grad_weight_ih: object | None,
    grad_weight_hh: object | None,
    grad_bias_ih: object | None,
    grad_bias_hh: object | None,
    disp_h0: object,
    disp_c0: object | None,
    credit_h0: object | None,
    credit_c0: object | None,
    execution: Execution,
) -> None:
    """For the CPU. ``cell`` is "gru", or "lstm", which alone has ``c0`` and the other states of c; ``grad_input`` is
    ``[S, T, B, I]``.
    """

def gated_plan(
    cell: str, way: str, dtype: str, stack: int, batch: int, hidden: int, device: int, regime: str
) -> tuple[str, int, float]:
    """As ``rnn_plan``, of the "forward" pass of a cell or of a target pass with credit "local" or "through_time"."""

def gated_projected_scan(
    x_proj: object,
    bias_n: object | None,
    h0: object,
    c0: object | None,
    weight_hh: object,
    lengths: object | None,
    reverse: list[bool],
    cell: str,
    states: object,
    h_n: object,
    c_n: object | None,
    kept: object | None,
    execution: Execution,
) -> None:
    """For CUDA. ``x_proj [S, T, B, G*H]`` has the input's part of all sums, and both biases; but of the GRU's candidate
    the second is ``bias_n [S, H]``.
    """

def gated_scan(
    input: object,
    h0: object,
    c0: object | None,
    weight_ih: object,
    weight_hh: object,
    bias_ih: object | None,
    bias_hh: object | None,
    lengths: object | None,
    reverse: list[bool],
    cell: str,
    states: object,
    h_n: object,
    c_n: object | None,
    kept: object | None,
    execution: Execution,
) -> None:
    """For the CPU. ``cell`` is "gru" or "lstm", which alone has ``c0`` and ``c_n``."""

def gated_target_scan(
    grad_states: object | None,
    states: object,
    h0: object,
    c0: object | None,
    kept: object,
    weight_hh: object,
    feedback: object,
    lengths: object | None,
    reverse: list[bool],
    cell: str,
    inverse: str,
    credit: str,
    target_step: list[float],
    margin: list[float],
    gate_slope: str,
    candidate_slope: str,
    slope_reg: list[float],
    disp_h_n: object | None,
    disp_c_n: object | None,
    credit_h_n: object | None,
    credit_c_n: object | None,
    delta: object,
    disp_h0: object,
    disp_c0: object | None,
    credit_h0: object | None,
    credit_c0: object | None,
    execution: Execution,
) -> None:
    """For CUDA. Writes ``delta [S, T, B, 4, H]``: the errors of an LSTM's gates; of a GRU those of a, r, z and n, the
    first three for the state, the last three for the input.
    """

def kaczmarz_step(
    displacement: object,
    input: object,
    weight: object,
    dx: str,
    rectify: bool,
    relaxation: float,
    damping: float,
    weight_change: object,
    bias_change: object,
    moved: object,
    threads: int,
) -> None:
    """Write a layer's update for a batch, of at least one number each, on the CPU only.

    ``displacement [B, M]``, ``input [B, N]`` and ``weight [M, N]`` give ``weight_change [M, N]``, ``bias_change [M]``,
    None for a layer without a bias, and ``moved [B, N]``, None for an input that stays. ``dx`` is "mean" or "wnorm";
    with ``rectify`` no number of ``moved`` is negative.
    """

def kaczmarz_train(
    input: object,
    labels: object,
    weights: list[object],
    biases: list[object],
    relaxation: float,
    damping: float,
    dx: str,
    dx_reg: float,
    output: str,
    predictions: object,
) -> None:
    """Update ``weights`` (``[M, N]`` each) and ``biases`` (``[M]`` each, or no one) sample by sample, on the CPU only.

    Writes ``predictions [K]``, the class predicted for each row of ``input [K, N]`` before its update. ``dx`` is
    "mean", "wnorm" or "regularized", ``output`` "clamp", "swap" or "direct".
    """

def probe_difference(
    output: object,
    indices: object | None,
    activation: str,
    alpha: float,
    kernel: int,
    stride: int,
    padding: int,
    sigma: float,
    seed: int,
    step: int,
    stream: int,
    stream_stride: int,
    first_row: int,
    difference: object,
    execution: Execution,
) -> None:
    """Write ``difference [K, B, C, H, W]`` from ``output [B, C, h, w]`` and int64 ``indices [B, C, h, w]``; with
    ``kernel`` 0 ``h, w`` are ``H, W`` and indices are not looked at.
    """

def regularized_inverse(weight: object, reg: list[float], inverse: object, status: object, execution: Execution) -> int:
    """Write ``inverse [..., N, M]`` of ``weight [..., M, N]`` and ``status [batch]``; return how many of it are not 0.

    0: inverted; 1: NaN or infinity in the weight; 2: singular or overflow. ``inverse`` is written for 0 only. On the
    CPU ``status`` may be None, where only their number matters. Batch is the product of the leading sizes.

    On CUDA, where M and N are at most 128, the kernel is only enqueued: the return value is 0 whatever comes of it
    (read ``status`` yourself), an inverse that fails is filled with NaN, and whether a matrix has full rank where there
    is no regularisation is left to the caller (csrc/core/regularized_inverse.h).
    """

def regularized_solve(
    weight: object, rhs: object, reg: float, solution: object, status: object, execution: Execution
) -> int:
    """Write ``solution [..., K, N]`` for ``rhs [..., K, M]``, and ``status``, as ``regularized_inverse`` does.

    On the CPU only.
    """

def rnn_plan(
    products: int, dtype: str, stack: int, batch: int, hidden: int, device: int, regime: str
) -> tuple[str, int, float]:
    """How a scan runs on a CUDA device: its regime, the bytes of zeroed workspace, the cycles predicted for a step.

    Args:
        products: H x H products a step: 2 for a target scan with credit "through_time", else 1.
        dtype: "float32", "float64", "bfloat16" or "float16".
        regime: "auto" to let sizes and device decide, or the one wanted; ValueError where it cannot run such sizes.

    Returns:
        "block", "cluster" or "grid"; or "step", with 0 bytes and cycles: the weights fit on no chip, and the caller
        does a matrix product a step.
    """

def rnn_layer_backward(
    grad_states: object | None,
    disp_n: object | None,
    credit_n: object | None,
    input: object,
    states: object,
    h0: object,
    weight_hh: object,
    feedback: object,
    transposed: bool,
    input_feedback: object | None,
    pre: object | None,
    lengths: object | None,
    reverse: list[bool],
    nonlinearity: str,
    correction: str,
    credit: str,
    target_step: list[float],
    margin: list[float],
    slope: str,
    slope_reg: list[float],
    scale: list[float],
    input_scale: list[float],
    of_displacement: bool,
    grad_input: object | None,
    grad_weight_ih: object | None,
    grad_weight_hh: object | None,
    grad_bias: object | None,
    disp_h0: object,
    credit_h0: object | None,
    execution: Execution,
) -> None:
    """For the CPU. ``feedback`` is P, or if ``transposed`` P'; ``grad_input`` is ``[S, T, B, I]``."""

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
    execution: Execution,
) -> None:
    """On CUDA ``x_proj`` must be given, and ``input``, ``weight_ih`` and ``bias`` None."""

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
    target_step: list[float],
    margin: list[float],
    slope: str,
    slope_reg: list[float],
    delta: object,
    disp_h0: object,
    credit_h0: object | None,
    norms: object | None,
    displacement: object | None,
    displacement_of_state: object | None,
    execution: Execution,
) -> None:
    """On CUDA ``norms`` must be None; ``displacement_of_state`` is written there alone."""

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
    target_step: list[float],
    delta: object,
    disp_h0: object,
    credit_h0: object | None,
    norms: object | None,
    displacement_of_state: object | None,
    execution: Execution,
) -> None:
    """On CUDA ``norms`` must be None; ``displacement_of_state`` is written there alone."""

def rnn_weight_gradients(
    delta: object,
    states: object,
    h0: object,
    input: object,
    lengths: object | None,
    reverse: list[bool],
    scale: list[float],
    grad_weight_ih: object | None,
    grad_weight_hh: object | None,
    grad_bias: object | None,
    execution: Execution,
) -> None:
    """On the CPU alone."""
