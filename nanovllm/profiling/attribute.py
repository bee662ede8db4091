"""Which layer and which part of it a kernel belongs to.

A CUDA graph's replay carries no names of modules, and an eager step would pay for them. So the same step is run once
more, operation by operation, with a range around every module (`trace.labelled`): it launches the same kernels in the
same order, and a kernel's place there is its place in the graph. Kernels' own names do not matter for that.

A trace without such a step still shows layers: a decoder of L layers launches the same short sequence of kernels L
times, and inside a layer the linears are known by their order around the attention.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from nanovllm.profiling.trace import Labelled

# In the order of a forward pass; a kernel that does two jobs counts as its linear or its attention.
ROLES = (
    "prepare", "norm", "qkv", "rope", "attention", "o_proj", "gate_up", "activation", "down", "layer",
    "final norm", "head", "sample", "copy",
)  # fmt: skip

# A module's or a part's name -> its role.
_MODULES = {
    "qkv_proj": "qkv", "rope": "rope", "attention": "attention", "self_attn": "attention", "o_proj": "o_proj",
    "gate_up_proj": "gate_up", "act": "activation", "down_proj": "down", "input_layernorm": "norm",
    "post_attention_layernorm": "norm", "norm": "final norm", "embed_tokens": "prepare", "rotary": "prepare",
    "lm_head": "head",
}  # fmt: skip
_LAYER = re.compile(r"layers\.(\d+)")

# What a name says about a kernel, first match wins. "linear" is resolved by its place in the layer.
_KINDS = (
    ("attention", r"attention|attn|fmha|flash|_decode_kernel|_prefill_kernel|_merge_kernel"),
    (
        "linear",
        r"gemv|gemm|direct_kernel|tile_kernel|panel_kernel|nvjet|cutlass|xmma|cublas|splitk|split_k|linear|matmul|addmm",
    ),
    ("rope", r"rope|rotary"),
    ("activation", r"silu|swiglu"),
    ("norm", r"norm"),
)
_PATTERNS = [(kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _KINDS]
_TAIL = re.compile(r"reduce", re.IGNORECASE)  # the second kernel of a split linear


@dataclass(frozen=True, slots=True)
class Place:
    """Where a kernel belongs; `layer` is None outside the layers."""

    layer: int | None
    role: str


def label_places(labelled: Sequence[Labelled]) -> list[Place]:
    """The place of every kernel of the labelled step.

    What no module launched belongs to the end that it stands at: "prepare" before the layers, "final norm" (it gathers
    rows) between them and the head, "sample" behind the head; inside a layer, to the kernel before it.
    """
    places: list[Place] = []
    behind = "prepare"
    for kernel in labelled:
        place = _place(kernel)
        if place is None and places and places[-1].layer is not None and _layer(kernel) == places[-1].layer:
            place = places[-1]
        if place is None:
            place = Place(None, behind)
        elif place.layer is not None:
            behind = "final norm"
        elif place.role == "head":
            behind = "sample"
        places.append(place)
    return places


def _place(kernel: Labelled) -> Place | None:
    if any(name.endswith("lm_head") for name in kernel.ranges):
        return Place(None, "head")  # whatever it is made of
    for name in reversed(kernel.ranges):
        role = _MODULES.get(name.rsplit(".", 1)[-1])
        if role is not None:
            layer = _layer(kernel)
            # A linear that was not fused with what follows or precedes it launches that as well.
            other = kind_of(kernel.name)
            return Place(layer, other if other in ("norm", "activation") and layer is not None else role)
    return None


def _layer(kernel: Labelled) -> int | None:
    found = _LAYER.search(" ".join(kernel.ranges))
    return int(found[1]) if found else None


def align(names: Sequence[str], labelled: Sequence[Labelled]) -> list[Place]:
    """Places of a step's kernels from those of the labelled step, which should have launched the same ones.

    A kernel that has no counterpart (say, another batch size split a linear in two) joins the kernel before it.
    """
    known = [kernel.name for kernel in labelled]
    places = label_places(labelled)
    if list(names) == known:
        return places
    found: list[Place | None] = [None] * len(names)
    for kind, a, b, c, d in SequenceMatcher(None, names, known, autojunk=False).get_opcodes():
        if kind in ("equal", "replace"):
            found[a:b] = [places[min(c + i, d - 1)] for i in range(b - a)]
    result: list[Place] = []
    for place in found:
        result.append(place or (result[-1] if result else Place(None, "prepare")))
    return result


@dataclass(frozen=True, slots=True)
class Repeat:
    """`count` repetitions of `period` kernels from index `start` on, the first of them being layer `first_layer`."""

    start: int
    period: int
    count: int
    first_layer: int = 0


def find_layers(names: Sequence[str], num_layers: int) -> Repeat | None:
    """The longest sequence that repeats `num_layers` times in a step's kernel names, at its earliest start.

    A first or last layer may differ (say, its norm is fused with the embedding): then the other L - 1 must repeat.
    None when nothing does. A repetition must hold a linear or an attention, so that stray copies are no layers.
    """
    found = _repeat(names, num_layers)
    if found is None and num_layers > 2:
        found = _repeat(names, num_layers - 1)
        if found is not None:
            pattern = set(names[found.start : found.start + found.period])
            before = sum(name in pattern for name in names[: found.start])
            after = sum(name in pattern for name in names[found.start + found.period * found.count :])
            found = Repeat(found.start, found.period, found.count, first_layer=int(before >= after))
    return found


def _repeat(names: Sequence[str], count: int) -> Repeat | None:
    if count < 2:
        return None
    for period in range(len(names) // count, 0, -1):
        needed, run = period * (count - 1), 0
        for i in range(len(names) - period):
            run = run + 1 if names[i] == names[i + period] else 0
            if run == needed:
                start = i - needed + 1
                if any(kind_of(name) in ("linear", "attention") for name in names[start : start + period]):
                    return Repeat(start, period, count)
                break
    return None


def kind_of(name: str) -> str:
    """What a kernel's name says: linear, attention, rope, activation, norm or other."""
    return next((kind for kind, pattern in _PATTERNS if pattern.search(name)), "other")


def layer_roles(names: Sequence[str]) -> list[str]:
    """The role of each kernel of one layer. A layer in one kernel is "layer"; what nobody knows joins its neighbour."""
    kinds = [kind_of(name) for name in names]
    if len(names) == 1:
        return ["layer"]
    roles: list[str] = []
    after = ["o_proj", "gate_up", "down"]
    attended, used = False, 0
    for name, kind in zip(names, kinds, strict=True):
        if kind == "attention":
            attended, role = True, "attention"
        elif kind == "linear":
            split = bool(roles) and _TAIL.search(name) is not None and roles[-1] in ("qkv", *after)
            if split:
                role = roles[-1]
            elif not attended:
                role = "qkv"
            else:
                role = after[min(used, 2)]
                used += 1
        elif kind == "other":
            role = roles[-1] if roles else "norm"
        else:
            role = kind
        roles.append(role)
    return roles


def attribute(names: Sequence[str], num_layers: int, labelled: Sequence[Labelled] = ()) -> list[Place]:
    """The place of every kernel of one step, given their names in order of start and the labelled twin, if any.

    Without that, all before the layers is "prepare"; behind them a norm is "final norm", the first linear "head", the
    rest "sample".
    Without a repetition (`find_layers`) no kernel has a layer and the role is what its name says.
    """
    if any(kernel.ranges for kernel in labelled):
        return align(names, labelled)
    repeat = find_layers(names, num_layers)
    if repeat is None:
        kinds = [kind_of(name) for name in names]
        return [Place(None, "layer" if kind in ("linear", "other") else kind) for kind in kinds]
    pattern = layer_roles(names[repeat.start : repeat.start + repeat.period])
    end = repeat.start + repeat.period * repeat.count
    places = [Place(None, "prepare")] * repeat.start
    # A first layer without a norm of its own turns the pattern round: what ends it is the norm of the next layer.
    early = pattern[0] == "qkv" and pattern[-1] == "norm"
    for i in range(end - repeat.start):
        layer, role = repeat.first_layer + i // repeat.period, pattern[i % repeat.period]
        if early and i % repeat.period == repeat.period - 1:
            last = layer == num_layers - 1
            places.append(Place(None, "final norm") if last else Place(layer + 1, role))
        else:
            places.append(Place(layer, role))
    if repeat.count < num_layers:
        first = repeat.first_layer == 1
        known = set(names[repeat.start : repeat.start + repeat.period])
        edge = _edge_layer(names[: repeat.start] if first else names[end:], repeat.period, first, known)
        if first:
            places[repeat.start - len(edge) : repeat.start] = [Place(0, role) for role in edge]
        else:
            places += [Place(num_layers - 1, role) for role in edge]
            end += len(edge)
    return places + _behind(names[end:])


def _edge_layer(names: Sequence[str], period: int, first: bool, known: set[str]) -> list[str]:
    """Roles of the one layer that differs from the others: its kernels begin (or end) with one the others know."""
    taken = list(names[-period:] if first else names[:period])
    while taken and taken[0 if first else -1] not in known:
        taken.pop(0 if first else -1)
    return layer_roles(taken) if taken else []


def _behind(names: Sequence[str]) -> list[Place]:
    places: list[Place] = []
    head = False
    for name in names:
        kind = kind_of(name)
        if not head and kind == "linear":
            head = True
            places.append(Place(None, "head"))
        elif head and _TAIL.search(name) and places[-1].role == "head" and kind == "linear":
            places.append(Place(None, "head"))
        else:
            places.append(Place(None, "final norm" if kind == "norm" and not head else "sample"))
    return places
