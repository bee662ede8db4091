"""`fuse` and `unfuse`: the groups that `detect` proves, computed by one `rms_norm_linear` each.

    norm(x)      returns W (gamma * x / rms(x)) + b for the weights of all its linears at once, [..., N1 + N2 + ...]
    linear_i(y)  returns its own columns of that

and where the linears are gate and up of a module that computes SwiGLU (`gate`):

    norm(x)      returns silu(gate) * up, [..., I]
    mlp(y)       returns down(y)

So nothing is kept between calls, nothing is synchronised, and graphs and `torch.compile` see one operator and views.
A tensor of the norm's output width that reaches somebody unforeseen has the wrong shape and is noticed, where an
un-normalised x in its place would not be. A linear that is called by itself with [..., K] computes what it always did.

Modules stay the same objects; only their class changes. The linears' parameters become slices of one packed weight:
same names and values in `state_dict`, and what is loaded or written into them in place is what the operator reads. No
weight is in memory twice but while its group is packed, one group after the other. Moving, copying or replacing them
in any way undoes the packing, and the next forward packs again. Two things go unnoticed: `parameter.data = other`, and
writing into a Gemma norm's weight other than by `load_state_dict`, for 1 + weight is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.fusion.detect import Group, example_call, observe
from nanovllm.fusion.flow import tensors
from nanovllm.kernels import reference
from nanovllm.kernels.rms_norm_linear_fusion import no_backward, rms_norm_linear

_PACKED = ("packed_weight", "packed_bias", "packed_gamma")


def fuse(model: nn.Module, *args: Any, **kwargs: Any) -> list[Group]:
    """Fuse every group of `model` in place for which that is proven, for inference; returns all groups.

    Arguments and errors as in `detect`. The example call is run again afterwards (so it must not depend on earlier
    ones): groups that change its result beyond rounding, or break it, are restored and get that as their reason.
    A SwiGLU that cannot be taken in stays outside, with `gate_reasons`. Groups that are fused already stay so.
    """
    call = example_call(model, args, kwargs)
    groups, expected = observe(model, call)
    todo = [group for group in groups if not group.reasons and not group.fused]
    if _try(model, todo, call, expected) is None:
        return [replace(group, fused=True) if group in todo else group for group in groups]
    done = {group.norm: group for group in groups}
    for pattern in dict.fromkeys(group.pattern for group in todo):  # which of them is it?
        alike = [group for group in todo if group.pattern == pattern]
        fault = _try(model, alike, call, expected)
        if fault is not None and alike[0].gate is not None:
            alike = [replace(group, gate=None, gate_reasons=(fault,)) for group in alike]
            fault = _try(model, alike, call, expected)
        done |= {g.norm: replace(g, fused=fault is None, reasons=() if fault is None else (fault,)) for g in alike}
    return list(done.values())


def unfuse(model: nn.Module) -> int:
    """Restore what `fuse` replaced, with weights in memory of their own; returns the number of groups."""
    fused = [module for module in model.modules() if isinstance(module, FusedNorm)]
    for norm in fused:
        _restore(norm)
    return len(fused)


class _Member(nn.Module):
    """A module of a fused group: what moves or replaces its parameters makes the group pack again."""

    def _owner(self) -> FusedNorm:
        raise NotImplementedError

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._parameters:
            _unpack(self._owner())
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        owner = self._owner()
        packed = {name: owner._buffers[name] for name in _PACKED}
        _unpack(owner)  # packed tensors are not moved themselves: that would need the memory twice
        super()._apply(fn, recurse)
        owner._buffers.update(packed)
        _refresh(owner)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        _refresh(self._owner())


class FusedNorm(_Member):
    """What a norm becomes: RMSNorm and the linears behind it. x: [..., K] -> [..., N], N the sum of their widths.

    With SwiGLU behind them: x: [..., K] -> [..., N / 2].

    A mixin in front of the norm's own class; parameters, attributes and place stay. It has no backward.
    """

    fused_class: type[nn.Module]  # the norm's own
    fused_group: Group
    fused_linears: tuple[nn.Linear, ...]
    fused_parts: tuple[tuple[nn.Module, str, torch.Tensor | None], ...]  # what was packed, and whose it was
    fused_mlp: tuple[
        nn.Module, ...
    ]  # what computes SwiGLU, if that is part of the group; in a tuple, as it is no child
    packed_weight: torch.Tensor | None
    packed_bias: torch.Tensor | None
    packed_gamma: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N] or, with SwiGLU, [..., N / 2]; raises RuntimeError in training mode."""
        if self.training:
            raise RuntimeError("a fused model cannot be trained: call nanovllm.fusion.unfuse(model) first")
        weight = self.packed_weight
        if weight is None or not _is_current(self):
            weight = _pack(self)
        if torch.is_grad_enabled() and any(part is not None and part.requires_grad for _, _, part in self.fused_parts):
            weight = weight.detach().requires_grad_()  # backward() fails: it must not leave a part without gradient
        form, activation = self.fused_group.form, self.fused_group.activation
        if form is None or torch.is_autocast_enabled(x.device.type):
            y = F.linear(self.fused_class.forward(self, x), weight, self.packed_bias)
            y = y if activation is None else reference.silu_mul(y)
            if weight.requires_grad:
                y.register_hook(no_backward)
            return y
        return rms_norm_linear(x, weight, self.packed_gamma, form.eps, bias=self.packed_bias, activation=activation)

    def _owner(self) -> FusedNorm:
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)  # copies pack for themselves: their parameters are tensors of their own
        state["_buffers"] = {k: None if k in _PACKED else v for k, v in self._buffers.items()}
        return state

    def __reduce__(self) -> tuple[Any, ...]:  # the class was made at run time: pickle needs to know how
        return _bare, (FusedNorm, self.fused_class), self.__getstate__()


class FusedLinear(_Member, nn.Linear):
    """What a linear behind a fused norm becomes: its columns of the packed result."""

    fused_columns: tuple[int, int, int] | None  # first, one past the last, width of the packed result; None: SwiGLU's
    fused_norm: tuple[FusedNorm]  # in a tuple, or it would become a submodule

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """[..., N] -> [..., N_i], a view; [..., K] that did not come from the norm -> [..., N_i] as ever."""
        if self.fused_columns is None or y.shape[-1] != self.fused_columns[2]:
            return F.linear(y, self.weight, self.bias)
        start, stop, width = self.fused_columns
        return y if stop - start == width else y.narrow(-1, start, stop - start)

    def _owner(self) -> FusedNorm:
        return self.fused_norm[0]


class FusedMLP(nn.Module):
    """What a module becomes whose silu(gate) * up is the fused norm's: a mixin in front of its own class."""

    fused_class: type[nn.Module]  # the module's own
    fused_down: str  # its child that reads the product
    fused_width: int

    def __setattr__(self, name: str, value: Any) -> None:
        if self._modules.get(name, value) is not value and name != self.fused_down:
            raise RuntimeError(f"{name} is part of a fused kernel: call nanovllm.fusion.unfuse(model) to replace it")
        super().__setattr__(name, value)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """[..., I] -> down(y); [..., K] that did not come from the norm -> as ever."""
        if y.shape[-1] != self.fused_width:
            return self.fused_class.forward(self, y)
        return self.get_submodule(self.fused_down)(y)

    def __reduce__(self) -> tuple[Any, ...]:
        return _bare, (FusedMLP, self.fused_class), self.__dict__


def _class_for(mixin: type[nn.Module], own: type[nn.Module]) -> type[nn.Module]:
    """A mixin in front of a module's own class; one class for all modules of a kind, or each would be compiled anew."""
    found = next((c for c in mixin.__subclasses__() if getattr(c, "fused_class", None) is own), None)
    return found or type(f"Fused{own.__name__}", (mixin, own), {"fused_class": own, "__module__": __name__})


def _bare(mixin: type[nn.Module], own: type[nn.Module]) -> nn.Module:
    cls = _class_for(mixin, own)
    return cls.__new__(cls)


def _replace(model: nn.Module, group: Group) -> FusedNorm:
    """Turn the modules of a group into fused ones."""
    norm: Any = model.get_submodule(group.norm)
    linears: list[Any] = [model.get_submodule(name) for name in group.linears]
    norm.__class__ = _class_for(FusedNorm, type(norm))
    norm.fused_group = replace(group, fused=True)
    norm.fused_linears, norm.fused_mlp = tuple(linears), ()
    if group.gate is not None:
        mlp: Any = model.get_submodule(group.gate.module)
        mlp.__class__ = _class_for(FusedMLP, type(mlp))
        mlp.fused_down, mlp.fused_width = group.gate.down, group.outputs
        norm.fused_mlp = (mlp,)
    for name in _PACKED:
        norm.register_buffer(name, None, persistent=False)
    start = 0
    for linear, rows in zip(linears, group.rows, strict=True):
        linear.__class__ = FusedLinear
        linear.fused_norm = (norm,)
        linear.fused_columns = None if group.gate is not None else (start, start + rows, group.n)
        start += rows
    _pack(norm)
    return norm


def _restore(norm: FusedNorm) -> None:
    """The inverse of `_replace`."""
    linears, names = norm.fused_linears, ("weight", "bias")
    for linear in linears:
        for parameter in (linear._parameters.get(name) for name in names):
            if parameter is not None and len(linears) > 1:
                parameter.data = parameter.data.clone()
        del linear.fused_norm, linear.fused_columns
        linear.__class__ = nn.Linear
    for mlp in norm.fused_mlp:
        mlp.__class__ = mlp.fused_class  # type: ignore[assignment]
        del mlp.fused_down, mlp.fused_width
    del norm.fused_linears, norm.fused_group, norm.fused_mlp, norm.fused_parts
    for name in _PACKED:
        delattr(norm, name)
        norm._non_persistent_buffers_set.discard(name)
    norm.__class__ = norm.fused_class  # type: ignore[assignment]


@torch.compiler.disable
@torch.no_grad()
def _pack(norm: FusedNorm) -> torch.Tensor:
    """Lay the linears' weights (and biases) one after the other and make their parameters slices of that."""
    _unpack(norm)
    linears, form = norm.fused_linears, norm.fused_group.form
    norm.packed_weight = weight = _joined([linear.weight for linear in linears])
    biases = [linear.bias for linear in linears]
    if any(bias is not None for bias in biases):
        norm.packed_bias = _joined([
            linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears
        ])  # fmt: skip
    if form is not None and form.gamma is not None:
        gamma = getattr(norm, form.gamma)
        # Gemma adds 1 and multiplies in float32; the operator takes gamma in x's dtype: one more rounding of gamma.
        norm.packed_gamma = (1 + gamma.float()).to(gamma.dtype) if form.plus_one else gamma.detach()
    named: list[tuple[nn.Module, str]] = [(linear, name) for linear in linears for name in ("weight", "bias")]
    if form is not None and form.gamma is not None:
        named.append((norm, form.gamma))
    norm.fused_parts = tuple((module, name, getattr(module, name)) for module, name in named)
    return weight


def _is_current(norm: FusedNorm) -> bool:
    """Whether the packed parameters are still those of the modules, which what something computes never is.

    `torch.export` puts tensors of its own in the place of all parameters, and of the packed ones as well.
    """
    parts = norm.fused_parts
    return torch.compiler.is_exporting() or all(module._parameters.get(name) is part for module, name, part in parts)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor of all rows; the parts become its slices, unless something computes them."""
    joined = parts[0].detach()
    if len(parts) > 1:
        joined = torch.cat([part.detach() for part in parts])
        for part, piece in zip(parts, joined.split([len(part) for part in parts]), strict=True):
            if type(part) is nn.Parameter:
                part.data = piece
    return joined


def _unpack(norm: FusedNorm) -> None:
    """Forget the packed tensors; the next forward packs again."""
    for name in _PACKED:
        norm._buffers[name] = None


@torch.no_grad()
def _refresh(norm: FusedNorm) -> None:
    """After a load or a move: keep the packed tensors if the parameters still are their slices, else forget them.

    Keeping them matters: weights loaded in place are what captured CUDA graphs go on reading.
    """
    weight, bias, folded = norm.packed_weight, norm.packed_bias, norm.packed_gamma
    if weight is None:
        return
    form, same = norm.fused_group.form, True
    sizes = [linear.out_features for linear in norm.fused_linears]
    for i, linear in enumerate(norm.fused_linears):
        same = same and _is(linear.weight, weight.split(sizes)[i])
        if bias is not None and linear.bias is not None:
            same = same and _is(linear.bias, bias.split(sizes)[i])
    if form is not None and form.gamma is not None and folded is not None:
        gamma = getattr(norm, form.gamma)
        if form.plus_one and (gamma.dtype, gamma.device) == (folded.dtype, folded.device):
            folded.copy_(1 + gamma.float())
        else:
            same = same and _is(gamma, folded)
    if not same:
        _unpack(norm)


def _is(parameter: torch.Tensor, piece: torch.Tensor) -> bool:
    """Whether a parameter is this very piece of memory."""
    alike = (parameter.dtype, parameter.device, parameter.shape) == (piece.dtype, piece.device, piece.shape)
    return alike and parameter.data_ptr() == piece.data_ptr()


def _try(model: nn.Module, groups: list[Group], call: Callable[[], list[Any]], expected: list[Any]) -> str | None:
    """Fuse groups and compare the model's outputs; on a fault restore them and return it."""
    fused = [_replace(model, group) for group in groups]
    try:
        with torch.no_grad():
            fault = _difference(call(), expected)
    except Exception as error:  # whatever the model raises now is the group's reason
        fault = f"the model fails with it: {error}"
    if fault is not None:
        for norm in fused:
            _restore(norm)
    return fault


def _difference(outputs: list[Any], expected: list[Any]) -> str | None:
    """None if floating-point outputs agree up to what rounding in a deep model may do, else a sentence."""
    pairs = list(zip(tensors(outputs), tensors(expected), strict=True))
    for ours, theirs in pairs:
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"the model's output changes from {theirs.dtype} {list(theirs.shape)} to {list(ours.shape)}"
        if theirs.is_floating_point():
            error = (ours.double() - theirs.double()).square().mean().sqrt()
            scale = theirs.double().square().mean().sqrt()
            limit = 1e-4 if theirs.dtype in (torch.float32, torch.float64) else 0.1
            if not bool(error <= limit * scale):
                return f"the model's output changes by {float(error / scale):.1e} of its size"
    return None
