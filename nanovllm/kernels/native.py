"""The decoder layer's operations in C, for float32 on CPUs: compiled at first use, called through ctypes.

PyTorch's operators leave half of a small model's decode step to overhead and to matmuls made for many rows; a layer is
five calls here, as it is five launches on a GPU. `native.c` says how they work, `reference` what they compute.

The C compiler is that of the machine (`$CC`, else `cc`), as it is for Triton's launchers; a build takes under a second
and is kept in the user's cache. Without a compiler everything runs on PyTorch's operators: `why_not` says why.
The object is linked without an OpenMP library, so that it finds the one PyTorch has loaded and shares its threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
import threading
from pathlib import Path

import torch

from nanovllm.kernels.jit import interpreting

logger = logging.getLogger(__name__)

MAX_GROUP, MAX_DIM = 48, 256  # QUERIES and MAX_DIM of native.c
MIN_FEW, MAX_FEW, MAX_TILE, PADDING = 64, 128, 64, 31  # the same of its linear layers; PADDING is PANEL - 1, at most
_ALL_KEYS = 2**31  # as a window
_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = (
    "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC",
    "-std=gnu11",
)  # fmt: skip
_TIMEOUT_S = 120.0
_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int32
_SIGNATURES = {
    "linear": (_POINTER,) * 4 + (_FLOAT,) + (_POINTER,) * 2 + (_LONG,) * 3 + (_INT,) * 2 + (_LONG,),
    "rope_store": (_POINTER,) * 6 + (_FLOAT,) + (_POINTER,) * 3 + (_LONG,) * 5,
    "attention": (_POINTER,) * 7 + (_LONG,) * 6 + (_FLOAT, _LONG),
    "lanes": (),
}


class NoCompilerError(Exception):
    """The kernels cannot be had on this machine; the message is the reason."""


# ------------------------------------------------------------------------------------------------------------- build


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The kernels, or why there are none."""
    try:
        return build(os.environ.get("CC") or "cc", _FLAGS, cache_folder())
    except NoCompilerError as error:
        logger.warning("the CPU runs PyTorch's operators, which decode at half the speed of C: %s", error)
        return str(error)


def cache_folder() -> Path:
    """Where builds are kept: nanovllm/native in XDG_CACHE_HOME or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "nanovllm" / "native"


def build(compiler: str, flags: tuple[str, ...], folder: Path) -> ctypes.CDLL:
    """Compile native.c, unless `folder` holds the result for this source, these flags, this compiler and this CPU.

    Raises `NoCompilerError` with the reason.
    """
    version = _run([compiler, "--version"])
    key = "\n".join([_SOURCE.read_text(encoding="utf-8"), *flags, version, _cpu()])
    path = folder / f"{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}.so"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as work:
                compiled, linked = os.path.join(work, "native.o"), os.path.join(work, "native.so")
                _run([compiler, *flags, "-c", str(_SOURCE), "-o", compiled])
                _run([compiler, "-shared", compiled, "-o", linked])
                os.replace(linked, path)  # at once: another process may do the same
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NoCompilerError(f"{path} cannot be built or loaded ({error})") from error
    for name, types in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, _INT if name == "lanes" else None
    return library


def _run(command: list[str]) -> str:
    """Output of a compiler; `NoCompilerError` if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoCompilerError(f"no C compiler ({error}); install gcc, or name one with CC=") from error
    if done.returncode:
        raise NoCompilerError(f"the C compiler failed: {' '.join(command)}: {done.stderr.strip()[-400:]}")
    return done.stdout


def _cpu() -> str:
    """What `-march=native` looks at: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


@functools.cache
def why_not() -> tuple[str, ...]:
    """Reasons why these kernels cannot run in this process; () means that they can. Compiles when first asked."""
    if interpreting():
        return ("Triton's interpreter takes their place (TRITON_INTERPRET=1)",)
    loaded = _load()
    return (loaded,) if isinstance(loaded, str) else ()


def why_not_heads(num_heads: int, num_kv_heads: int, head_dim: int) -> list[str]:
    """`why_not`, and why attention cannot take heads of this number and size."""
    reasons = list(why_not())
    if reasons:
        return reasons
    if head_dim % library().lanes() or head_dim > MAX_DIM:
        reasons.append(f"head_dim must be a multiple of {library().lanes()} up to {MAX_DIM}, got {head_dim}")
    if num_heads > MAX_GROUP * num_kv_heads:
        reasons.append(f"at most {MAX_GROUP} query heads may share a KV head, got {num_heads // num_kv_heads}")
    return reasons


def runs(x: torch.Tensor) -> bool:
    """Whether operations on `x` run here: float32 on the CPU, where there is a compiler."""
    return x.dtype is torch.float32 and x.is_cpu and not why_not()


def library() -> ctypes.CDLL:
    """The compiled kernels; `NoCompilerError` where there are none."""
    loaded = _load()
    if isinstance(loaded, str):
        raise NoCompilerError(loaded)
    return loaded


# -------------------------------------------------------------------------------------------------------- operations


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
) -> torch.Tensor:
    """linear(x, weight, bias), after an RMSNorm if there is a norm_weight [K], before a SwiGLU if asked for.

    x: [..., K]; weight: [N, K], for swiglu [2 N, K], gate rows first; bias: one element a row of weight.
    All float32 on the CPU, weight contiguous. Returns [..., N].
    """
    y = x.new_empty((*x.shape[:-1], weight.shape[0] // (2 if swiglu else 1)))
    _linear(y, x.contiguous(), weight, bias, norm_weight, eps, swiglu, add=False)
    return y


def linear_residual_(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
) -> torch.Tensor:
    """residual [M, N] += linear(x [M, K], weight [N, K], bias [N]), in place; returns it. As in `linear`."""
    _linear(residual, x.contiguous(), weight, bias, None, 0.0, False, add=True)
    return residual


def _linear(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None, eps: float, swiglu: bool, add: bool,
) -> None:  # fmt: skip
    k = weight.shape[1]
    m, n, threads = x.numel() // k, y.shape[-1], torch.get_num_threads()
    own = m + PADDING if m <= MIN_FEW else max(m + PADDING, MAX_TILE) if m <= MAX_FEW else MAX_TILE  # rows a thread
    shared = m if m > MIN_FEW and norm_weight is not None else 0
    library().linear(
        y.data_ptr(), x.data_ptr(), weight.data_ptr(), _address(norm_weight), eps, _address(bias),
        _scratch.address((own * threads + shared) * k), m, n, k, swiglu, add, threads,
    )  # fmt: skip


class _Scratch(threading.local):
    """Memory that a call may write, kept for the thread's next one: to have it anew costs as much as a small call."""

    floats = torch.empty(0)

    def address(self, size: int) -> int:
        if self.floats.numel() < size:
            self.floats = torch.empty(size)
        return self.floats.data_ptr()


_scratch = _Scratch()


def qk_norm_rope_store(
    qkv: torch.Tensor,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """See `rope.qk_norm_rope_store`; contiguous tensors, head_dim up to MAX_DIM."""
    _, kv_heads, page, dim = k_cache.shape
    tokens = qkv.shape[0]
    q_heads = qkv.shape[1] // dim - 2 * kv_heads
    q = qkv.new_empty((tokens, q_heads, dim))
    library().rope_store(
        q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), qkv.data_ptr(), _address(q_norm_weight),
        _address(k_norm_weight), eps, cos_sin.data_ptr(), positions.data_ptr(), slot_mapping.data_ptr(),
        tokens, q_heads, kv_heads, dim, page,
    )  # fmt: skip
    return q


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Queries of B sequences against their pages, decodes and chunks alike. All contiguous, the last of their contexts.

    q: [T, Hq, D]; caches: [num_blocks, Hkv, page, D]; block_table: [B, max_blocks], query_start: [B + 1] rows of q,
    context_lens: [B], all int32; window: keys a query sees, itself included. Returns [T, Hq, D].
    """
    _, q_heads, dim = q.shape
    _, kv_heads, page, _ = k_cache.shape
    out = torch.empty_like(q)
    library().attention(
        out.data_ptr(), q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), block_table.data_ptr(),
        query_start.data_ptr(), context_lens.data_ptr(), context_lens.shape[0], block_table.shape[1], q_heads, kv_heads,
        dim, page, scale, _ALL_KEYS if window is None else window,
    )  # fmt: skip
    return out


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
