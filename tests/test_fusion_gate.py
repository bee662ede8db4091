"""SwiGLU in `nanovllm.fusion`: which modules are `down(silu(gate) * up)` and nothing else, and what fusing does.

The norm, its linears and the machinery around them are `test_integration`'s business.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from test_integration import EXTRA, RMSNorm, logits, tiny
from torch import nn

from nanovllm.fusion import apply, detect, fuse, report, unfuse
from nanovllm.kernels import rms_norm_linear_fusion

WIDTH, INNER = 16, 24


class MLP(nn.Module):
    """As everybody writes it; subclasses and changes spoil it."""

    def __init__(self, up: int = INNER, inner: int = INNER) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, inner), nn.Linear(WIDTH, up), nn.Linear(inner, WIDTH)
        self.act = nn.SiLU()

    def forward(self, y: torch.Tensor) -> Any:
        return self.down(self.act(self.gate(y)) * self.up(y))


class Packed(MLP):
    """One linear for both halves."""

    def __init__(self) -> None:
        super().__init__()
        del self.gate, self.up
        self.both = nn.Linear(WIDTH, 2 * INNER)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        gate, up = self.both(y).chunk(2, dim=-1)
        return self.down(up * F.silu(gate))


class Block(nn.Module):
    """A norm, then what `mlp` makes of it."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = RMSNorm(WIDTH), mlp

    def forward(self, x: torch.Tensor) -> Any:
        return self.mlp(self.norm(x))


def mlp(forward: Callable[..., Any], change: Callable[[Any], object] | None = None, **sizes: int) -> MLP:
    """An MLP with this forward; `change` then does something to it."""
    made = type("Spoilt", (MLP,), {"forward": forward})(**sizes)
    if change is not None:
        change(made)
    return made


def example() -> torch.Tensor:
    return torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def activations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, tuple[int, ...]]]:
    """(activation, shape of the weight) of every call of the fused operator."""
    calls: list[tuple[str | None, tuple[int, ...]]] = []
    real = apply.rms_norm_linear

    def counted(x: torch.Tensor, weight: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        calls.append((named["activation"], tuple(weight.shape)))
        return real(x, weight, *args, **named)

    monkeypatch.setattr(apply, "rms_norm_linear", counted)
    return calls


# --------------------------------------------------------------------------------------------- Hugging Face models


@pytest.mark.parametrize("family", ["llama", "llama_bias", "mistral", "qwen2", "qwen3", "phi3", "gemma"])
def test_one_call_a_layer_does_norm_gate_up_and_swiglu(family: str, activations: list[Any]) -> None:
    model = tiny(family)
    expected, ran = logits(model), [0]
    groups = fuse(model)
    gated = [g for g in groups if g.gate is not None]
    layers = [] if family == "gemma" else [f"model.layers.{i}.mlp" for i in range(3)]
    assert [g.gate.module for g in gated if g.gate is not None] == layers
    for layer in model.model.layers:
        act = layer.mlp.activation_fn if family == "phi3" else layer.mlp.act_fn
        act.register_forward_hook(lambda *_: ran.__setitem__(0, ran[0] + 1))
    activations.clear()
    actual = logits(model)
    qkv = (256 if family == "qwen3" else 128, 64)
    assert activations == [(None, qkv), (None if family == "gemma" else "swiglu", (192, 64))] * 3
    assert ran == [3 if family == "gemma" else 0]  # the activation's module is not called any more
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


OTHERS: dict[str, tuple[dict[str, Any], int, int]] = {
    # options, groups that are fused, SwiGLUs among them
    "granite": (dict(), 6, 3),
    "smollm3": (dict(), 6, 3),
    "gemma2": (dict(head_dim=16), 6, 0),
    "mixtral": (dict(), 3, 0),  # a router and experts read what the second norm returns
    "qwen2_moe": (dict(moe_intermediate_size=32, shared_expert_intermediate_size=48, num_experts=4), 3, 0),
    "olmo2": (dict(), 0, 0),  # norms behind the linears
    "cohere": (dict(), 0, 0),  # one LayerNorm for attention and MLP
    "gpt2": (dict(n_embd=64, n_layer=2, n_head=4), 0, 0),
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families(family: str) -> None:
    options, fused, gated = OTHERS[family]
    with mock.patch.dict(tiny_models.CASES, {family: dict(model_type=family, **options)}):
        model = tiny_models.make_model(family)
    expected = logits(model)
    groups = [g for g in fuse(model) if g.fused]
    assert (len(groups), sum(g.gate is not None for g in groups)) == (fused, gated)
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert unfuse(model) == fused and torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", ["llama_bias", "phi3"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies(family: str, way: str) -> None:
    model = tiny(family)
    original = logits(model)
    fuse(model)
    expected = logits(model)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin), expected)
    with torch.no_grad():
        twin.model.layers[0].mlp.down_proj.weight.mul_(3)
    assert not torch.equal(logits(twin), expected)  # the copy's MLP is its own
    with torch.no_grad():
        twin.model.layers[0].mlp.down_proj.weight.div_(3)
    assert unfuse(twin) == 6
    torch.testing.assert_close(logits(twin), original, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", sorted({"llama", *EXTRA}))
def test_an_mlp_called_by_itself_is_right(family: str) -> None:
    """Rows that no norm made take the module's own code."""
    model, x = tiny(family), torch.randn(2, 64)
    part = model.model.layers[1].mlp
    expected = part(x)
    fuse(model)
    torch.testing.assert_close(part(x), expected, rtol=1e-6, atol=1e-6)


def test_new_weights_reach_the_kernel() -> None:
    model = tiny("llama_bias")
    fuse(model)
    before, layer = logits(model), model.model.layers[0].mlp
    with torch.no_grad():
        layer.up_proj.weight.mul_(2)  # in place
        layer.gate_proj.bias = nn.Parameter(layer.gate_proj.bias + 1)  # assigned
    after = logits(model)
    assert (after - before).abs().max() > 0.01
    unfuse(model)
    torch.testing.assert_close(logits(model), after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gate_proj", "act_fn", "down_proj"])
def test_a_replaced_module_is_not_ignored(name: str) -> None:
    """As adapters replace them: what the kernel computes cannot be replaced, what it does not is."""
    model, other = tiny("llama_bias"), tiny("llama_bias")
    fuse(model)
    parts = [m.model.layers[0].mlp for m in (model, other)]
    if name != "down_proj":
        with pytest.raises(RuntimeError, match=f"{name} is part of a fused kernel: call nanovllm.fusion.unfuse"):
            setattr(parts[0], name, nn.Sequential(getattr(parts[0], name), nn.Tanh()))
        unfuse(model)
    for part in parts:
        setattr(part, name, nn.Sequential(getattr(part, name), nn.Tanh()))
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------- modules that are gates


def up_first(self: MLP, y: torch.Tensor) -> torch.Tensor:
    up = self.up(y)
    return self.down(up * F.silu(self.gate(y)))


class Deep(nn.Module):
    """What reads the product is more than a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(INNER, 5), nn.Linear(5, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu()) if len(x) else self.second(x)


GATES: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: Block(MLP()),
    "packed": lambda: Block(Packed()),
    "up first": lambda: Block(mlp(up_first)),
    "without bias": lambda: Block(mlp(MLP.forward, lambda m: setattr(m, "up", nn.Linear(WIDTH, INNER, bias=False)))),
    "down is anything": lambda: Block(mlp(MLP.forward, lambda m: setattr(m, "down", Deep()))),
    "down has hooks": lambda: Block(
        mlp(MLP.forward, lambda m: m.down.register_forward_hook(lambda m, i, o: 2 * o)),
    ),
    "in a wrapper": lambda: Block(nn.Sequential(MLP(), nn.ReLU())),
}  # fmt: skip


@pytest.mark.parametrize("name", GATES)
def test_gate(name: str, activations: list[Any]) -> None:
    torch.manual_seed(1)
    model, x = GATES[name]().eval(), example()
    modules = {n: (type(m), sorted(vars(m))) for n, m in model.named_modules()}
    with torch.no_grad():
        expected = model(x)
        (group,) = fuse(model, x)
        assert group.fused and group.gate is not None, group.gate_reasons
        activations.clear()
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        assert activations == [("swiglu", (2 * INNER, WIDTH))]
        assert detect(model, x) == [group] and fuse(model, x) == [group]
        assert unfuse(model) == 1
        assert {n: (type(m), sorted(vars(m))) for n, m in model.named_modules()} == modules
        assert torch.equal(model(x), expected)


def test_autocast() -> None:
    """Under autocast the module runs its parts, SwiGLU included."""
    model, x = Block(MLP()).eval(), example()[:1, :2]
    fuse(model, x)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        actual = model(x)
        unfuse(model)
        expected = model(x)
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected)


# --------------------------------------------------------------------------------------- modules that only look so


def leaking(self: MLP, y: torch.Tensor) -> torch.Tensor:
    gate = self.gate(y)
    self.kept = gate
    return self.down(F.silu(gate) * self.up(y))


def reading(self: MLP, y: torch.Tensor) -> torch.Tensor:
    """NumPy reads the gate behind PyTorch's back."""
    gate = self.gate(y)
    self.down.factor = float(gate.detach().numpy().mean())
    return self.down(F.silu(gate) * self.up(y))


class Scaled(nn.Linear):
    """Wants to be told by how much, every time."""

    factor = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor, self.factor = self.factor, 1.0
        return super().forward(x) * factor


def branching(self: MLP, y: torch.Tensor) -> torch.Tensor:
    gate = self.gate(y)
    if len(y) > 2:
        gate = gate.clamp(max=1)
    return self.down(F.silu(gate) * self.up(y))


def swapped(self: Any, y: torch.Tensor) -> torch.Tensor:
    up, gate = self.both(y).chunk(2, dim=-1)
    return self.down(F.silu(gate) * up)


def twice(self: Any, y: torch.Tensor) -> torch.Tensor:
    gate = self.both(y).chunk(2, dim=-1)[0]
    return self.down(F.silu(gate) * gate)


class Parallel(Block):
    """The norm also feeds another linear."""

    def __init__(self) -> None:
        super().__init__(MLP())
        self.other = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.mlp(y) + self.other(y)


class Inline(MLP):
    """Norm and gate in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.down(F.silu(self.gate(y)) * self.up(y))


class Named(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(y=self.norm(x))


def use(forward: Callable[..., Any], change: Any = None, **sizes: int) -> Callable[[], nn.Module]:
    return lambda: Block(mlp(forward, change, **sizes))


def patch(m: MLP) -> None:
    m.act.forward = F.silu  # type: ignore[method-assign]


# Made of what, the reason if one is to be given.
SPOILT: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "GELU": (use(lambda m, y: m.down(F.gelu(m.gate(y)) * m.up(y))), None),
    "ReLU": (use(lambda m, y: m.down(F.relu(m.gate(y)) * m.up(y))), None),
    "silu in float64": (use(lambda m, y: m.down(F.silu(m.gate(y).double()).float() * m.up(y))), None),
    "silu in place": (use(lambda m, y: m.down(F.silu(m.gate(y), inplace=True) * m.up(y))), None),
    "clamped before": (use(lambda m, y: m.down(F.silu(m.gate(y).clamp(max=7)) * m.up(y))), None),
    "clamped behind": (use(lambda m, y: m.down(F.silu(m.gate(y)).clamp(max=7) * m.up(y))), "also runs aten.clamp"),
    "up shifted": (use(lambda m, y: m.down(F.silu(m.gate(y)) * (m.up(y) + 1))), "also runs aten.add"),
    "gate twice": (use(lambda m, y: m.down(F.silu(m.gate(y)) * m.gate(y))), "has another part in mlp"),
    "its own square": (use(lambda m, y: (lambda s: m.down(s * s))(F.silu(m.gate(y)))), "also runs aten.mul"),
    "silu(gate) * gate": (use(lambda m, y: (lambda g: m.down(F.silu(g) * g))(m.gate(y))), "also runs aten.mul"),
    "product scaled": (use(lambda m, y: m.down(F.silu(m.gate(y)) * m.up(y) * 2)), "also runs aten.mul"),
    "result scaled": (use(lambda m, y: m.down(F.silu(m.gate(y)) * m.up(y)) * 2), "also runs aten.mul"),
    "a part of the result": (use(lambda m, y: m.down(F.silu(m.gate(y)) * m.up(y))[..., :8]), "does more than"),
    "two results": (use(lambda m, y: (m.down(F.silu(m.gate(y)) * m.up(y)), 1)), "does more than"),
    "one number for up": (use(MLP.forward, up=1), "also runs aten.mul"),
    "a part of up": (use(lambda m, y: m.down(F.silu(m.gate(y)) * m.up(y)[..., 1:]), up=INNER + 1), "runs aten.mul"),
    "a third linear": (
        use(lambda m, y: (m.extra(y), m.down(F.silu(m.gate(y)) * m.up(y)))[1],
            lambda m: setattr(m, "extra", nn.Linear(WIDTH, 3))),
        "feeds other linears beside",
    ),
    "read twice": (
        use(lambda m, y: (lambda p: m.down(p) + m.down(p))(F.silu(m.gate(y)) * m.up(y))),
        "reads silu\\(gate\\) \\* up as well",
    ),
    "product kept": (use(leaking), "what mlp computes outlives the forward pass"),
    "read by NumPy": (use(reading, lambda m: setattr(m, "down", Scaled(INNER, WIDTH))), "the model's output changes"),
    "branches": (use(branching), "the code of mlp branches"),
    "down further below": (
        use(lambda m, y: m.below[0](F.silu(m.gate(y)) * m.up(y)),
            lambda m: setattr(m, "below", nn.Sequential(nn.Linear(INNER, WIDTH)))),
        "mlp.below.0 is no child of mlp",
    ),
    "hook on the activation": (
        use(MLP.forward, lambda m: m.act.register_forward_hook(lambda m, i, o: None)), "mlp.act has hooks",
    ),
    "hook on the module": (
        use(MLP.forward, lambda m: m.register_forward_pre_hook(lambda m, i: None)), "mlp has hooks",
    ),
    "patched activation": (use(MLP.forward, patch), "mlp.act has a patched forward"),
    "one half twice": (lambda: Block(type("Twice", (Packed,), {"forward": twice})()), "also runs aten.mul"),
    "up rows first": (lambda: Block(type("Swapped", (Packed,), {"forward": swapped})()), "come before its gate rows"),
    "as wide as the input": (lambda: Block(MLP(inner=WIDTH, up=WIDTH)), "as wide as its input"),
    "in the norm's module": (Inline, None),
    "called by keyword": (lambda: Named(MLP()), None),
    "a parallel linear": (Parallel, "feeds other linears beside mlp.gate, mlp.up"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_the_activation_stays_outside(name: str, activations: list[Any]) -> None:
    """Norm and linears are fused all the same."""
    torch.manual_seed(1)
    make, reason = SPOILT[name]
    model, x = make().eval(), example()
    with torch.no_grad():
        expected = model(x)
        (group,) = fuse(model, x)
        assert group.fused and group.gate is None, group
        if reason is None:
            assert group.gate_reasons == ()
        else:
            assert any(re.search(reason, r) for r in group.gate_reasons), group.gate_reasons
            assert "SwiGLU stays outside: " in str(report(model, x))
        activations.clear()
        actual = model(x)
        assert [activation for activation, _ in activations] == [None]
        for ours, theirs in zip(actual, expected, strict=True) if isinstance(expected, tuple) else [(actual, expected)]:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert unfuse(model) == 1


# --------------------------------------------------------------------------------------- the kernels, interpreted


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["plain", "packed", "up first"])
def test_interpreted_kernel_computes_swiglu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = GATES[name]().eval(), example()[:1, :2]
    launched: list[bool] = []
    real = rms_norm_linear_fusion.launch

    def counted(problem: Any, *args: Any, **named: Any) -> torch.Tensor:
        launched.append(problem.swiglu)
        return real(problem, *args, **named)

    monkeypatch.setattr(rms_norm_linear_fusion, "launch", counted)
    with torch.no_grad():
        expected = model(x)
        fuse(model, x)
        launched.clear()
        actual = model(x)
    assert launched == [True]
    assert 0 < (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
