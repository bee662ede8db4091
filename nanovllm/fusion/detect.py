"""Find the RMSNorm→Linear groups of any `nn.Module` by watching what it does with a norm's output.

A group is a norm and the linears that read its output. It may be fused when

  * the norm computes RMSNorm and nothing else (`probe`),
  * nothing but whole `nn.Linear`s reads what it returned, nothing writes to it, it outlives no call and leaves no
    module other than the norm (`flow`) -- so the final norm of a Hugging Face model stays as it is: the base model
    returns its output, as `last_hidden_state`, to whoever calls it,
  * the linears read nothing else, and none of the modules is special: hooks, subclasses, quantised or tied weights.

If the linears are gate and up of SwiGLU, and the module that calls them does nothing but that and hand the product to a
child (`gate`), then silu(gate) * up can be part of the fused kernel as well; the module's own code is then not run any
more, so it must have one path only.

All this is known of the calls that were watched; code that other arguments would reach has not been seen.
"""

from __future__ import annotations

import dis
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nanovllm.fusion.flow import Flow, Produced
from nanovllm.fusion.gate import Gate
from nanovllm.fusion.probe import RMSNormForm, identify
from nanovllm.kernels.fusion_config import ELEMENT_SIZES

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, slots=True)
class Group:
    """A norm and the linears behind it, by their names in the model."""

    norm: str
    linears: tuple[str, ...]
    k: int  # features the norm runs over
    rows: tuple[int, ...]  # rows of each linear's weight
    bias: bool
    dtype: str
    form: RMSNormForm | None = None  # None: not an RMSNorm
    reasons: tuple[str, ...] = ()  # why it must be left alone; () if it may be fused
    fused: bool = False
    gate: Gate | None = None  # the SwiGLU behind the linears that can be, or is, part of the kernel
    gate_reasons: tuple[str, ...] = ()  # why a SwiGLU that was seen must stay outside

    @property
    def n(self) -> int:
        """Weight rows of all linears together."""
        return sum(self.rows)

    @property
    def activation(self) -> str | None:
        """What the fused operator applies."""
        return "swiglu" if self.gate is not None else None

    @property
    def outputs(self) -> int:
        """Width of the fused operator's result."""
        return self.n // 2 if self.gate is not None else self.n

    @property
    def pattern(self) -> tuple[str, tuple[str, ...]]:
        """Names with `*` for numbers: equal in all layers."""
        return re.sub(r"\b\d+\b", "*", self.norm), tuple(re.sub(r"\b\d+\b", "*", name) for name in self.linears)

    def bytes_saved(self, m: int = 1) -> int:
        """Memory traffic for m rows that fusion avoids in theory.

        The normalised rows, written once and read by each linear; with SwiGLU gate, silu(gate) and up, each written and
        read once.
        """
        elements = (1 + len(self.linears)) * self.k + (6 * self.outputs if self.gate is not None else 0)
        return elements * m * ELEMENT_SIZES.get(self.dtype, 0)


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
    # Spread over the vocabulary: its first tokens are often special ones, which a model has hardly seen in training and
    # answers with noise (SmolLM2 in bfloat16: another rounding, and its logits change by half their size; here by 2 %).
    ids = (torch.arange(1, 13, device=embedding.weight.device) * 7919 % embedding.num_embeddings).reshape(2, 6)

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
    gate, gate_reasons = _gate(calls, linears, modules, hooked)
    linears = linears if gate is None else gate.linears
    k = first.shape[-1]
    found: list[str] = list(dict.fromkeys(problem for c in calls for problem in c.problems))
    patched = _special(norm, name, hooked)
    form = patched or identify(norm, k, first.dtype, first.device)
    if not isinstance(form, RMSNormForm):
        own = list(norm.parameters(recurse=False))
        if "norm" not in type(norm).__name__.lower() and not any(p.shape == (k,) for p in own):
            return None  # an activation, a dropout, ...
        found.insert(0, f"{name} {form}")
    if any(set(c.linears) != set(linears) for c in calls):
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
    if gate is None and sum(rows) == k:
        found.append(f"its linears' {k} outputs are as wide as its input: rows no norm made would not be noticed")
    bias = any(getattr(layer, "bias", None) is not None for layer in layers)
    proven = form if isinstance(form, RMSNormForm) else None
    return Group(
        name, linears, k, rows, bias, dtype, proven, tuple(found), gate=gate, gate_reasons=gate_reasons
    )  # fmt: skip


def _gate(
    calls: list[Produced], linears: tuple[str, ...], modules: dict[str, nn.Module], hooked: set[str]
) -> tuple[Gate | None, tuple[str, ...]]:
    """The SwiGLU that all calls' linears belong to, or None and why one that was seen cannot be part of the kernel."""
    seen = [[gate for gate in c.gates if isinstance(gate, Gate)] for c in calls]
    reasons = tuple(dict.fromkeys(reason for c in calls for reason in c.gates if isinstance(reason, str)))
    gate = next((gate for gates in seen for gate in gates), None)
    if gate is None or any(gates != [gate] for gates in seen):
        return None, reasons or (() if gate is None else (f"{gate.module} does not do the same in every call",))
    if set(gate.linears) != set(linears):
        return None, (f"the norm feeds other linears beside {', '.join(gate.linears)}",)
    width = sum(getattr(modules[linear], "out_features", 0) for linear in linears) // 2
    if width == getattr(modules[linears[0]], "in_features", 0):
        return None, ("its result is as wide as its input, so that rows no norm made would not be noticed",)
    down = f"{gate.module}.{gate.down}".lstrip(".")
    for name in (n for n in modules if n == gate.module or n.startswith(f"{gate.module}.") or not gate.module):
        if name == down or name.startswith(f"{down}."):
            continue
        if (special := _special(modules[name], name, hooked)) is not None:
            return None, (f"{name or 'the model'} {special}",)
    if _branches(type(modules[gate.module])):
        return None, (f"the code of {gate.module} branches: only the path that was taken is known",)
    return gate, ()


def _branches(module: type[nn.Module]) -> bool:
    """Whether a class's `forward` has more than one path: any jump in its code, or code that cannot be read."""
    code = getattr(module.forward, "__code__", None)
    jumps = {*dis.hasjrel, *dis.hasjabs}
    return code is None or any(step.opcode in jumps for step in dis.get_instructions(code))


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
