"""RMSNorm and the linear layer behind it in one kernel. The star of this engine.

Formula, for a row x of K elements, with W [N, K]:

    y = W (gamma * x / rms(x)) + b + residual          rms(x) = sqrt(mean(x^2) + eps)
      = (1 / rms(x)) * W (gamma * x) + b + residual

The scale 1 / rms(x) is one number a row and commutes with the product. So the kernel multiplies the row as it is, sums
its squares from the same values on the way, and scales the result at the end ("deferred"): the weight's bytes can be
on their way before anything is known about x, and the normalised x never exists in memory. With `activation="swiglu"`
W is packed [2 N, K], gate rows first, and y = silu(gate) * up + residual. The algebra is FlashNorm's (arXiv
2407.09577), the operator Mirage's first example (arXiv 2405.05751).

Cast order: products, squares, bias, activation and residual in float32; one rounding, of the result. Panel and tile
also round gamma * x to x's dtype, for tensor cores take their operands in it; float16 cannot hold gamma * x of an
outlier channel, so there the row is scaled before (`FIRST`). The norm of a pair rounds as PyTorch's does, the
normalised row and its product with gamma; the rest is the tile's. Float32 is IEEE: no TF32.
PyTorch rounds the normalised row, its product with gamma and the output of every operator: the reference body does so
too, is slightly less exact, and not equal bit for bit.

Grid: a program owns a block of weight rows and the whole K, hence one pass over the weight and no reduction between
programs: results reproduce.

    gemv      1 to 4 rows   (N / block_n,)                 rows of the weight in the registers of a warp, CUDA cores
    panel     to 16         (N / block_n,)                 a tile of it in registers, tensor cores; warps split K
    tile      to about 32   (N / block_n, M / block_m)     the weight as the left operand of tensor-core products
    pair      to about 64   the norm, then a tile's grid   a norm kernel, and a tile that starts meanwhile
    unfused   more          norm kernel, then cuBLAS: the GEMM is bound by arithmetic, and cuBLAS is better at that

Which one, and its block sizes, is data: `fusion_config`, `fusion_table`. Traffic in bytes: `Problem.bytes_moved`; for
one row the weight is all of it (Qwen3-0.6B's QKV: 8.4 MB of weight, 10 KB of x and y). What fusion saves there is not
traffic but a kernel and the gap behind it: 1.4 us of norm beside 2.8 us in which an H100 reads that weight.

Not known here: modules, models, the engine. Which norms and linears of a model may be fused is `nanovllm.fusion`'s
question.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from nanovllm.kernels import reference
from nanovllm.kernels import rms_norm_linear_kernels as kernels
from nanovllm.kernels.activation import rms_silu_mul, silu_mul
from nanovllm.kernels.fusion_config import ELEMENT_SIZES, FusionConfig, Problem
from nanovllm.kernels.fusion_table import choose
from nanovllm.kernels.jit import gpu_of, triton_installed, use_triton
from nanovllm.kernels.launch_config import cdiv
from nanovllm.kernels.norm import rms_norm

ACTIVATIONS = (None, "swiglu")


def rms_norm_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: float,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    config: FusionConfig | None = None,
    weights_ready: bool = False,
) -> torch.Tensor:
    """`linear(rms_norm(x, norm_weight, eps), weight, bias)`, then the activation, then `+ residual`.

    x: [..., K], rows may be strided; weight: [N, K], or packed [2 N, K] (gate rows first) for activation="swiglu";
    norm_weight: [K], None if it is ones or has been folded into the weight; bias: one element a weight row;
    residual: [..., N], added to the output. All of one dtype (float32, bfloat16, float16) and on one device.
    config: None takes the measured or the guessed one of this GPU; one that is given wins, and raises ValueError if it
    cannot run. The reference body, which CPU tensors take, has no use for it.
    weights_ready: a promise that weight, norm_weight and bias were in memory before the kernel queued in front of this
    one began, as a model's are when it generates. On Hopper the kernel is then launched as a programmatic dependent: it
    reads its weights while the kernel in front still runs. x and residual may be what that kernel writes. (A config
    that says "pdl" or "late" makes the same promise.) A dependent in front began early itself: in a row of them, what
    counts is the kernel in front of the first.
    Returns [..., N], contiguous; it has no backward.
    Raises ValueError for shapes, dtypes or devices that do not match, a negative eps, an unknown activation.
    """
    text = None if config is None else str(config)
    return torch.ops.nanovllm.rms_norm_linear(
        x, weight, norm_weight, eps, bias, residual, activation, text, weights_ready
    )


def why_not(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: float,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    config: FusionConfig | None = None,
    weights_ready: bool = False,
    subtracts_mean: bool = False,
) -> list[str]:
    """Reasons why this call would not run a kernel of this module, a pair's two included; [] means that it would.

    Arguments as in `rms_norm_linear`, and its ValueError becomes a reason. `subtracts_mean`: the norm is a LayerNorm.
    Only metadata is read: meta tensors do, except that they are "not on a CUDA device".
    """
    if subtracts_mean:
        return ["the norm subtracts the mean: it is a LayerNorm, and only RMSNorm commutes with the linear layer"]
    try:
        _check(x, weight, norm_weight, eps, bias, residual, activation)
    except ValueError as error:
        return [str(error)]
    reasons = _unsupported(x, weight, norm_weight, bias, residual)
    if x.is_cuda and not triton_installed():
        reasons.append("Triton is not installed")
    elif not x.is_cuda and not use_triton(x):
        reasons.append(f"x is on {x.device}: the kernels need a CUDA device")
    problem = _problem(x, weight, activation)
    if not reasons and problem.m * problem.n:
        try:
            chosen = _config(problem, x.device, None if config is None else str(config), weights_ready)
        except ValueError as error:
            return [str(error)]
        if chosen.variant == "unfused":
            reasons.append(f"norm and GEMM one after the other are as fast or faster for {problem}")
    return reasons


def _unsupported(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> list[str]:
    """What no kernel here can read, though PyTorch can."""
    reasons = []
    if dtype_name(x.dtype) not in ELEMENT_SIZES:
        reasons.append(f"dtype {x.dtype} is none of {', '.join(ELEMENT_SIZES)}")
    named = {"x": x, "weight": weight, "norm_weight": norm_weight, "bias": bias, "residual": residual}
    for name, tensor in named.items():
        if tensor is not None and tensor.numel() and tensor.stride(-1) != 1:
            reasons.append(f"{name} is not contiguous in its last dimension: strides {tensor.stride()}")
    return reasons


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: float,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str | None,
) -> None:
    """Raise the one ValueError of arguments that do not belong together."""
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor, got {x.dtype}")
    if x.dim() < 1 or weight.dim() != 2:
        raise ValueError(f"x must be [..., K] and weight [N, K], got {_shape(x)} and {_shape(weight)}")
    rows, width = weight.shape
    if x.shape[-1] != width or not width:
        raise ValueError(f"x {_shape(x)} and weight {_shape(weight)} must share their last dimension K, at least 1")
    if not eps >= 0:
        raise ValueError(f"eps must be 0 or positive, got {eps}")
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation must be None or "swiglu", got {activation!r}')
    if activation == "swiglu" and rows % 2:
        raise ValueError(f"swiglu needs a packed weight [2 N, K], got {rows} rows in {_shape(weight)}")
    outputs = rows // 2 if activation == "swiglu" else rows
    expected = (
        ("weight", weight, (rows, width)),
        ("norm_weight", norm_weight, (width,)),
        ("bias", bias, (rows,)),
        ("residual", residual, (*x.shape[:-1], outputs)),
    )
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{name} must have shape {list(shape)} to match x {_shape(x)} and weight {_shape(weight)}, "
                f"got {_shape(tensor)}"
            )
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device} but x is {x.dtype} on {x.device}: "
                "convert one to match the other"
            )


def _shape(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)


def dtype_name(dtype: torch.dtype) -> str:
    """As configurations and tables write it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _problem(x: torch.Tensor, weight: torch.Tensor, activation: str | None) -> Problem:
    rows, width = weight.shape
    swiglu = activation == "swiglu"
    return Problem(x.numel() // width, rows // 2 if swiglu else rows, width, dtype_name(x.dtype), swiglu)


@functools.cache
def _device_name(device: torch.device) -> str:
    """What tables are named after."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def _config(problem: Problem, device: torch.device, text: str | None, weights_ready: bool) -> FusionConfig:
    """The configuration to run: the caller's, which must fit, or the policy's."""
    if text is None:
        return choose(problem, _device_name(device), gpu_of(device), dependent=weights_ready)
    config = FusionConfig.parse(text)
    if faults := config.faults(problem, gpu_of(device)):
        raise ValueError(f"config {config} cannot run {problem}: {'; '.join(faults)}")
    return config


def _unfused(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: float,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str | None,
) -> torch.Tensor:
    """The parts one after the other, each the fastest there is: what the fused kernels have to beat.

    With gamma folded into the weight and SwiGLU behind it, 1 / rms waits for the activation's kernel: no norm in front.
    float16 cannot hold the product of a row that has not been normalised.
    """
    if norm_weight is None and activation == "swiglu" and x.dtype != torch.float16:
        y = rms_silu_mul(F.linear(x, weight), x, eps, bias)
        return y if residual is None else y.add_(residual)
    y = F.linear(rms_norm(x, norm_weight, eps), weight, bias)
    if activation == "swiglu":
        y = silu_mul(y)
    return y if residual is None else y.add_(residual)


def launch(
    problem: Problem,
    config: FusionConfig,
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: float,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    norm: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run one fused kernel on arguments that have been checked; the operator without its questions.

    norm=False leaves the norm out (`linear_residual`): a pair is then its tile alone. out: [..., N] contiguous; it may
    be `residual`, since a program reads just the elements that it writes.
    """
    y = torch.empty((*x.shape[:-1], problem.n), dtype=x.dtype, device=x.device) if out is None else out
    pdl = config.launch_pdl
    if config.variant == "pair" and norm:
        # The norm writes no weights, and waits for whatever does: the tile behind it may always be its dependent.
        dependent = gpu_of(x.device).pdl
        x = rms_norm(x, norm_weight, eps, trigger=dependent, pdl=pdl)
        norm_weight, norm, pdl = None, False, dependent
    rows = x.reshape(problem.m, problem.k)
    stream = None if residual is None else residual.reshape(problem.m, problem.n)
    tensors = (rows, weight, norm_weight, bias, stream, y)
    strides = (rows.stride(0), weight.stride(0), 0 if stream is None else stream.stride(0))
    blocks = cdiv(problem.weight_rows, config.block_n)
    shared = {
        "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "NORM": norm, "SWIGLU": problem.swiglu,
        "PDL": pdl, "num_warps": config.num_warps,
    }  # fmt: skip
    if pdl:
        shared["launch_pdl"] = True
    if config.variant == "gemv":
        kernels.gemv_kernel[(blocks,)](
            *tensors, problem.n, *strides, eps, M=problem.m, K=problem.k, WARPS=config.num_warps,
            AHEAD=config.chunks_ahead(problem), LATE=config.late_trigger, **shared,
        )  # fmt: skip
    elif config.variant == "panel":
        kernels.panel_kernel[(blocks,)](
            *tensors, problem.m, problem.n, *strides, eps, K=problem.k, BLOCK_M=config.block_m, WARPS=config.num_warps,
            LATE=config.late_trigger, FIRST=norm and x.dtype == torch.float16, **shared,
        )  # fmt: skip
    else:
        columns, pieces = _prefetch(problem, config, weight)
        kernels.tile_kernel[(blocks, cdiv(problem.m, config.block_m))](
            *tensors, problem.m, problem.n, problem.k, *strides, eps,
            BLOCK_M=config.block_m, EVEN_K=problem.k % config.block_k == 0, FIRST=x.dtype == torch.float16,
            PREFETCH=columns, SEGMENTS=pieces, num_stages=config.num_stages, **shared,
        )  # fmt: skip
    return y


def _prefetch(problem: Problem, config: FusionConfig, weight: torch.Tensor) -> tuple[int, int]:
    """Columns of its weight rows that a dependent tile brings to the L2 cache while it waits, and in how many pieces.

    As many as the loop has on their way when it begins: more of them would come from memory only to be read again from
    the cache (Qwen3-1.7B's QKV, 32 rows, H100: all of them 13.0 us, these 9.9). None, (0, 1), where addresses are not
    aligned, and for the tile of a pair that is no dependent itself: that one waits for a norm only (9.2 us, with them
    10.0).
    """
    if not config.launch_pdl:
        return 0, 1
    columns = min(problem.k, config.block_k * max(1, config.num_stages - 1))
    pieces = max(1, 32 * config.num_warps // config.block_n)  # one a thread
    aligned = weight.data_ptr() % 16 == 0 and weight.stride(0) * problem.element_size % 16 == 0
    return (columns, pieces) if aligned and columns * problem.element_size % (16 * pieces) == 0 else (0, 1)


def _operator(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: float,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str | None,
    config: str | None,
    weights_ready: bool = False,
) -> torch.Tensor:
    """What `torch.ops.nanovllm.rms_norm_linear` does: check, choose a body, run it."""
    _check(x, weight, norm_weight, eps, bias, residual, activation)
    problem = _problem(x, weight, activation)
    if not problem.m * problem.n:
        return x.new_empty((*x.shape[:-1], problem.n))
    reasons = _unsupported(x, weight, norm_weight, bias, residual)
    if reasons and use_triton(x) and config not in (None, "unfused"):
        raise ValueError(f"config {config} cannot run {problem}: {'; '.join(reasons)}")
    if reasons or not use_triton(x):
        return reference.rms_norm_linear(x, weight, norm_weight, eps, bias, residual, activation)
    chosen = _config(problem, x.device, config, weights_ready)
    if chosen.variant == "unfused":
        return _unfused(x, weight, norm_weight, eps, bias, residual, activation)
    return launch(problem, chosen, x, weight, norm_weight, eps, bias, residual)


def _operator_shape(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: float,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str | None,
    config: str | None,
    weights_ready: bool = False,
) -> torch.Tensor:
    """The result's shape, dtype and device; raises what the operator would."""
    _check(x, weight, norm_weight, eps, bias, residual, activation)
    rows = weight.shape[0]
    return x.new_empty((*x.shape[:-1], rows // 2 if activation == "swiglu" else rows))


def no_backward(context: Any, *gradients: torch.Tensor) -> None:
    """Training would need kernels that do not exist: say so where a gradient would silently be missing."""
    raise NotImplementedError("rms_norm_linear has no backward: use torch.no_grad(), and train the unfused model")


# The operator as PyTorch sees it: `torch.compile` and `torch.export` take it whole, CUDA graphs capture its launches.
# `torch.library.custom_op` would say the same in fewer lines and cost 15 us more of host time a call.
_LIBRARY = torch.library.Library("nanovllm", "FRAGMENT")
_LIBRARY.define(
    "rms_norm_linear(Tensor x, Tensor weight, Tensor? norm_weight, float eps, Tensor? bias, Tensor? residual, "
    "str? activation, str? config, bool weights_ready=False) -> Tensor"
)
_LIBRARY.impl("rms_norm_linear", _operator, "CompositeExplicitAutograd")
torch.library.register_fake("nanovllm::rms_norm_linear", _operator_shape, lib=_LIBRARY)
torch.library.register_autograd("nanovllm::rms_norm_linear", no_backward, lib=_LIBRARY)
