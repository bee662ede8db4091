"""`@jit`: `triton.jit`, postponed to the first launch. And the one rule that says when a launch happens.

Why postponed: `import nanovllm.kernels` must work where Triton is not installed (Windows, macOS), and importing
Triton costs half a second that a CPU engine has no use for. A decorated function keeps its place in its module;
the first launch imports Triton, puts `triton.language` into that module as `tl` and replaces every decorated
function there by the real `JITFunction`, so later launches pay nothing.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from nanovllm.kernels.compile_ahead import kernel_class
from nanovllm.kernels.launch_config import Gpu

logger = logging.getLogger(__name__)


class LazyKernel:
    """A function that becomes a Triton kernel when it is first launched as `kernel[grid](...)`."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self.function = function
        self.options = options
        self.__doc__ = function.__doc__

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        module = self.function.__globals__
        _materialise(module)
        return module[self.function.__name__][grid]


def jit(*, do_not_specialize: tuple[str, ...] = (), unaligned: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Decorate a Triton kernel or device function.

    `do_not_specialize`: integers that must not trigger a recompilation when they become 1 or a multiple of 16.
    `unaligned`: pointers whose alignment must not do so either, such as `context_lens[n:]`.
    """
    options = {"do_not_specialize": list(do_not_specialize), "do_not_specialize_on_alignment": list(unaligned)}
    return lambda function: LazyKernel(function, options)


def _materialise(module: dict[str, Any]) -> None:
    """Turn every `LazyKernel` among a module's globals into a Triton function."""
    import triton
    import triton.language as tl

    module["tl"] = tl
    for name, kernel in list(module.items()):
        if isinstance(kernel, LazyKernel):
            function, home = kernel.function, kernel.function.__globals__
            if home is not module:  # a helper from another module, with helpers of its own there
                _materialise(home)
                module[name] = home[function.__name__]
                continue
            # Annotations are strings (PEP 563); the interpreter compares them with the type's own name.
            function.__annotations__ = {
                argument: tl.constexpr if "constexpr" in str(annotation) else annotation
                for argument, annotation in function.__annotations__.items()
            }
            module[name] = (triton.jit if interpreting() else kernel_class())(function, **kernel.options)


def interpreting() -> bool:
    """Whether Triton's interpreter is on, so that kernels run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_installed() -> bool:
    """Whether the package is there; does not import it."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _warn_without_triton() -> None:
    logger.warning("Triton is not installed: CUDA tensors take the slower PyTorch bodies of nanovllm.kernels")


def use_triton(x: torch.Tensor) -> bool:
    """Whether an operation on `x` runs its Triton kernel (True) or its reference body (False).

    CUDA tensors run the kernel; CPU tensors do so only under TRITON_INTERPRET=1, which cannot do bfloat16: its
    results there are silently wrong, so that combination raises `ValueError`.
    """
    if x.is_cuda:
        if triton_installed():
            return True
        _warn_without_triton()
        return False
    if not interpreting():
        return False
    if x.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter computes bfloat16 wrongly: use float16, or unset TRITON_INTERPRET")
    return True


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """What launch policies know of a device; for the interpreter a tiny GPU, so that split-KV paths are exercised."""
    if device.type != "cuda":
        return Gpu(num_sms=4, shared_memory=99 * 1024)
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks a field
    pdl = properties.major >= 9 and triton_installed() and _triton_knows_pdl()
    return Gpu(properties.multi_processor_count, properties.shared_memory_per_block_optin, pdl)


def _triton_knows_pdl() -> bool:
    import triton.language as tl

    return hasattr(tl.extra.cuda, "gdc_wait")


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    return gpu_of(device).num_sms


def require_unit_stride(**tensors: torch.Tensor | None) -> None:
    """Raise `ValueError` for a tensor whose last dimension is not contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}")
