"""Find the RMSNorm→Linear groups of any `nn.Module` by watching what it does with a norm's output.

A group is a norm and the linears that read its output. It may be fused when

  * the norm computes RMSNorm and nothing else (`probe`),
  * nothing but whole `nn.Linear`s reads what it returned, nothing writes to it, it outlives no call and leaves no
    module other than the norm (`flow`) -- so the final norm of a Hugging Face model stays as it is: the base model
    returns its output, as `last_hidden_state`, to whoever calls it,
  * the linears read nothing else, and none of the modules is special: hooks, subclasses, quantised or tied weights.

All this is known of the calls that were watched; code that other arguments would reach has not been seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nanovllm.fusion.flow import Flow, Produced
from nanovllm.fusion.probe import RMSNormForm, identify
from nanovllm.kernels.fusion_config import ELEMENT_SIZES

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, slots=True)
class Group:
    """A norm and the linears behind it, by their names in the model."""

    norm: str
    linears: tuple[str, ...]
    k: int  # features the norm runs over
    rows: tuple[int, ...]  # output features of each linear
    bias: bool
    dtype: str
    form: RMSNormForm | None = None  # None: not an RMSNorm
    reasons: tuple[str, ...] = ()  # why it must be left alone; () if it may be fused
    fused: bool = False

    @property
    def n(self) -> int:
        """Output features of all linears together."""
        return sum(self.rows)

    @property
    def pattern(self) -> tuple[str, tuple[str, ...]]:
        """Names with `*` for numbers: equal in all layers."""
        return re.sub(r"\b\d+\b", "*", self.norm), tuple(re.sub(r"\b\d+\b", "*", name) for name in self.linears)

    def bytes_saved(self, m: int = 1) -> int:
        """Memory traffic for m rows that fusion avoids in theory: the normalised rows, written once, read by each."""
        return (1 + len(self.linears)) * m * self.k * ELEMENT_SIZES.get(self.dtype, 0)


def detect(model: nn.Module, *args: Any, **kwargs: Any) -> list[Group]:
    """All groups of `model`, fused or not, in the order in which it runs them; their `reasons` tell what forbids it.

    args, kwargs: an example call, `model(*args, **kwargs)`. Without them a model with an embedding is called with a
    few token ids [2, 6], and once more with one token if it returned `past_key_values`. Runs without gradients.
    Raises ValueError for a model in training mode, a compiled one, and one that needs an example call.
    """
    return observe(model, example_call(model, args, kwargs))[0]


def example_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], list[Any]]:
    """A function that runs the model on the examples and returns its outputs; ValueError if there can be none."""
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode: call model.eval() before fusing it for inference")
    compiled = hasattr(model, "_orig_mod") or any(m._compiled_call_impl is not None for m in model.modules())
    if compiled:
        raise ValueError("the model is already compiled: fuse it first, compile it afterwards")
    if args or kwargs:
        return lambda: [model(*args, **kwargs)]
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if embedding is None:
        raise ValueError("the model has no token embedding: give an example call, such as fuse(model, x)")
    ids = (torch.arange(12, device=embedding.weight.device) + 1) % embedding.num_embeddings
    ids = ids.reshape(2, 6)

    def call() -> list[Any]:
        try:
            outputs = [model(ids)]
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(f"the model does not run on token ids alone ({error}): give an example call") from error
        past = getattr(outputs[0], "past_key_values", None)
        if past is not None:
            outputs.append(model(ids[:, :1], past_key_values=past))
        return outputs

    return call


def observe(model: nn.Module, call: Callable[[], list[Any]]) -> tuple[list[Group], list[Any]]:
    """The groups and the outputs of the call that showed them."""
    modules = dict(model.named_modules())
    hooked = {name for name, module in modules.items() if any(getattr(module, hook, None) for hook in HOOKS)}
    shared = _shared_weights(model)
    flow = Flow(model)
    with torch.no_grad(), flow:
        outputs = call()
        flow.end_of_call()
    groups = [_now(group, modules) for module in modules.values() if (group := vars(module).get("fused_group"))]
    seen: dict[str, list[Produced]] = {}
    for produced in flow.produced:
        seen.setdefault(produced.module, []).append(produced)
    for name, calls in seen.items():
        if any(c.linears for c in calls) and not isinstance(modules[name], nn.Linear):
            group = _group(name, calls, modules, flow, hooked, shared)
            groups += [] if group is None else [group]
    order = {name: i for i, name in enumerate(modules)}
    first_call = {name: i for i, name in enumerate(flow.called)}
    groups.sort(key=lambda g: (first_call.get(g.norm, len(order)), order[g.norm]))
    return groups, outputs


def _now(group: Group, modules: dict[str, nn.Module]) -> Group:
    """A group that is fused already, in the dtype that it has by now."""
    return replace(group, dtype=str(modules[group.linears[0]].weight.dtype).removeprefix("torch."))


def _group(
    name: str,
    calls: list[Produced],
    modules: dict[str, nn.Module],
    flow: Flow,
    hooked: set[str],
    shared: dict[str, str],
) -> Group | None:
    """What is known of one producer whose output went into linears; None if it is no norm in any sense."""
    norm, first = modules[name], calls[0]
    if "fused_group" in vars(norm):
        return None
    linears = tuple(dict.fromkeys(linear for c in calls for linear in c.linears))
    k = first.shape[-1]
    found: list[str] = list(dict.fromkeys(problem for c in calls for problem in c.problems))
    patched = _special(norm, name, hooked)
    form = patched or identify(norm, k, first.dtype, first.device)
    if not isinstance(form, RMSNormForm):
        own = list(norm.parameters(recurse=False))
        if "norm" not in type(norm).__name__.lower() and not any(p.shape == (k,) for p in own):
            return None  # an activation, a dropout, ...
        found.insert(0, f"{name} {form}")
    if any(tuple(c.linears) != linears for c in calls):
        found.append("its calls go into different linears")
    layers = [modules[linear] for linear in linears]
    for linear, layer in zip(linears, layers, strict=True):
        found += _linear_reasons(linear, layer, first, hooked, shared if len(linears) > 1 else {})
        if any(source is None or source.module != name for source in flow.sources[linear]):
            found.append(f"{linear} also reads something else")
    gamma = norm.get_parameter(form.gamma) if isinstance(form, RMSNormForm) and form.gamma else None
    if gamma is not None and (gamma.dtype, gamma.device) != (first.dtype, first.device):
        found.append(f"the norm's weight is {gamma.dtype} on {gamma.device}, its input {first.dtype} on {first.device}")
    dtype = str(first.dtype).removeprefix("torch.")
    if dtype not in ELEMENT_SIZES:
        found.append(f"dtype {first.dtype} is none of {', '.join(ELEMENT_SIZES)}")
    rows = tuple(int(getattr(layer, "out_features", 0)) for layer in layers)
    bias = any(getattr(layer, "bias", None) is not None for layer in layers)
    return Group(
        name, linears, k, rows, bias, dtype, form if isinstance(form, RMSNormForm) else None, tuple(found)
    )  # fmt: skip


def _special(module: nn.Module, name: str, hooked: set[str]) -> str | None:
    """Why a module's call is not simply its class's `forward`, as a clause that follows its name."""
    if name in hooked:
        return "has hooks"
    if "forward" in vars(module):
        return "has a patched forward"
    return None


def _linear_reasons(
    name: str, layer: nn.Module, source: Produced, hooked: set[str], shared: dict[str, str]
) -> list[str]:
    """Why this linear cannot be part of a fused group; `shared`: parameters that another module uses as well."""
    if type(layer) is not nn.Linear:
        return [f"{name} is a {type(layer).__name__}, not a plain nn.Linear"]
    if (special := _special(layer, name, hooked)) is not None:
        return [f"{name} {special}"]
    found = []
    for key in ("weight", "bias"):
        tensor = layer._parameters.get(key)
        if tensor is None:
            if key == "weight":
                found.append(f"{name}.weight is not a parameter: something computes it")
            continue
        if type(tensor) is not nn.Parameter or type(tensor.data) is not torch.Tensor:
            found.append(f"{name}.{key} is a {type(tensor.data).__name__}, not a plain tensor")
        if (tensor.dtype, tensor.device) != (source.dtype, source.device):
            found.append(f"{name}.{key} is {tensor.dtype} on {tensor.device}, its input {source.dtype}")
        if not tensor.is_contiguous():
            found.append(f"{name}.{key} is not contiguous: strides {tensor.stride()}")
        if (other := shared.get(f"{name}.{key}")) is not None:
            found.append(f"{name}.{key} shares its memory with {other}: packing would part them")
    return found


def _shared_weights(model: nn.Module) -> dict[str, str]:
    """Parameter name -> another parameter or buffer in the same storage."""
    owners: dict[int, list[str]] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if type(tensor.data) is torch.Tensor and tensor.layout is torch.strided:
            owners.setdefault(tensor.untyped_storage()._cdata, []).append(name)
    return {name: next(o for o in names if o != name) for names in owners.values() if len(names) > 1 for name in names}
