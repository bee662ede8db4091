"""Is this module an RMSNorm? Asked of what it computes, not of what it is called.

A copy of the module gets random weights and rows that tell the formulas apart: a mean that is not zero (LayerNorm),
outlier channels, rows so small that eps rules, a row of zeros. What it returns must be, within fp32 rounding,

    y = x / sqrt(mean(x^2) + eps) * g        g = 1, weight, or 1 + weight (Gemma)

A probe is no proof for every input: a module that behaves differently above some magnitude would pass. `fuse` also
compares the whole model's outputs before and after.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from nanovllm.kernels.rms_norm_linear_fusion import why_not

TOLERANCE = 2e-5  # relative to an element, in float32: a thousand times below what a wrong formula shows
_SMALL = (1e-5, 1e-3)  # root mean squares of rows in which an eps between 1e-12 and 1e-3 can be seen


@dataclass(frozen=True, slots=True)
class RMSNormForm:
    """What a module that passed is made of. `gamma`: its parameter's name, None if it has none."""

    eps: float
    gamma: str | None
    plus_one: bool  # the scale is 1 + gamma


def identify(norm: nn.Module, width: int, dtype: torch.dtype, device: torch.device) -> RMSNormForm | str:
    """The form of an RMSNorm over `width` features, or why it is none, as a clause that follows its name.

    dtype, device: of the rows the module normalises. The module is called, without gradients, and not changed.
    """
    if isinstance(norm, nn.LayerNorm):
        return _subtracts_mean()
    parameters = dict(norm.named_parameters(recurse=False))
    if len(parameters) > 1:
        return f"has parameters {', '.join(parameters)}: an RMSNorm has one at most"
    if any(p.shape != (width,) for p in parameters.values()):
        return f"has a parameter of shape {list(next(iter(parameters.values())).shape)} instead of [{width}]"
    gamma = next(iter(parameters), None)
    try:
        twin = copy.deepcopy(norm).float()
        with torch.no_grad():
            form = _form(twin, gamma, _rows(width, device), norm)
            if isinstance(form, str) or _agrees(norm, form, _rows(width, device)[2:5].to(dtype), dtype):
                return form
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return f"cannot be probed: {error}"
    return f"computes something else in {dtype} than in torch.float32"


def _rows(width: int, device: torch.device) -> torch.Tensor:
    """Probe rows [8, width]: two small ones, five of ordinary size with means and outliers, one of zeros."""
    generator = torch.Generator().manual_seed(20)
    rows = torch.randn(8, width, generator=generator)
    rows[:2] *= torch.tensor(_SMALL)[:, None] / rows[:2].square().mean(1, keepdim=True).sqrt()
    rows[2] *= 1e-3
    rows[3:7] += 0.7
    rows[5, :: max(1, width // 3)] *= 50
    rows[6] *= 30
    rows[7] = 0
    return rows.to(device)


def _formula(x: torch.Tensor, scale: torch.Tensor | float, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * scale


def _form(twin: nn.Module, gamma: str | None, rows: torch.Tensor, norm: nn.Module) -> RMSNormForm | str:
    """Compare the fp32 twin, with random weights, to each formula."""
    weight: torch.Tensor | None = None
    if gamma is not None:
        generator = torch.Generator().manual_seed(21)
        weight = (0.75 + 0.5 * torch.rand(rows.shape[1], generator=generator)).to(rows.device)
        dict(twin.named_parameters())[gamma].copy_(weight)
    y = twin(rows[None])[0]
    if not isinstance(y, torch.Tensor) or y.shape != rows.shape:
        return "does not return one tensor of its input's shape"
    scales: list[tuple[torch.Tensor | float, bool]] = [(1.0, False)]
    if weight is not None:
        scales = [(weight.double(), False), (1 + weight.double(), True)]
    for scale, plus_one in scales:
        eps = _eps(rows[0].double() * scale, y[0].double(), rows[0].double(), norm)
        if eps >= 0 and _close(y, _formula(rows, scale, eps), TOLERANCE):
            return RMSNormForm(eps, gamma, plus_one)
        centred = rows[3:6].double() - rows[3:6].double().mean(-1, keepdim=True)
        if _close(y[3:6], _formula(centred, scale, max(eps, 0.0)), 1e-3):
            return _subtracts_mean()
    return "does not compute x / sqrt(mean(x^2) + eps), scaled by its weight or by 1 + its weight"


def _subtracts_mean() -> str:
    nothing = torch.empty(0)
    return f"is no RMSNorm: {why_not(nothing, nothing, None, 0.0, subtracts_mean=True)[0]}"


def _eps(scaled: torch.Tensor, y: torch.Tensor, x: torch.Tensor, norm: nn.Module) -> float:
    """The eps under the square root, solved from one small row, y = scaled / sqrt(mean(x^2) + eps).

    The number that the module keeps as an attribute if there is one as close; otherwise five digits of the estimate.
    """
    inverse = float((y * scaled).sum() / (scaled * scaled).sum())
    if not inverse > 0:
        return -1.0
    estimate = inverse**-2 - float(x.square().mean())
    kept = [v for v in vars(norm).values() if isinstance(v, float) and abs(v - estimate) <= 1e-3 * estimate]
    if kept:
        return min(kept, key=lambda value: abs(value - estimate))
    return float(f"{estimate:.5g}")


def _agrees(norm: nn.Module, form: RMSNormForm, rows: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the module itself, in the model's dtype, does the same: an eps may depend on the dtype."""
    scale: torch.Tensor | float = 1.0
    if form.gamma is not None:
        scale = norm.get_parameter(form.gamma).double() + form.plus_one
    return _close(norm(rows[None])[0], _formula(rows, scale, form.eps), max(TOLERANCE, 3 * torch.finfo(dtype).eps))


def _close(y: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return bool(((y.double() - expected).abs() <= tolerance * expected.abs()).all())
