"""`nanovllm.fusion` on models that are not ours: Hugging Face's, and small ones made to deceive it.

Tiers: on the CPU the fused operator is its reference body, so these tests are about what is found, replaced and
restored; under TRITON_INTERPRET=1 and on a GPU the same calls run the kernels, and those tests are about numbers.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, StaticCache

import nanovllm
from nanovllm.fusion import Group, apply, detect, fuse, report, unfuse
from nanovllm.kernels import rms_norm_linear_fusion
from nanovllm.kernels.rms_norm_linear_fusion import why_not

EXTRA: dict[str, dict[str, Any]] = {"gemma": dict(model_type="gemma", head_dim=16), "phi3": dict(model_type="phi3")}
FAMILIES = ["llama", "llama_bias", "llama_tied", "mistral", "qwen2", "qwen3", "gemma", "phi3"]
IDS = torch.randint(3, 200, (2, 11), generator=torch.Generator().manual_seed(5))


def tiny(family: str) -> PreTrainedModel:
    """A tiny random model of a family, fp32."""
    with mock.patch.dict(tiny_models.CASES, EXTRA):
        return tiny_models.make_model(family)


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids.to(next(model.parameters()).device)).logits


@pytest.fixture
def operator_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of x in every call of the fused operator."""
    calls: list[torch.Size] = []
    real = apply.rms_norm_linear

    def counted(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(x.shape)
        return real(x, *args, **kwargs)

    monkeypatch.setattr(apply, "rms_norm_linear", counted)
    return calls


@pytest.fixture
def kernel_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Variant of every fused kernel that was launched."""
    launches: list[str] = []
    real = rms_norm_linear_fusion.launch

    def counted(problem: Any, config: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        launches.append(config.variant)
        return real(problem, config, *args, **kwargs)

    monkeypatch.setattr(rms_norm_linear_fusion, "launch", counted)
    return launches


def fused_names(groups: list[Group]) -> dict[str, tuple[str, ...]]:
    return {g.norm: tuple(name.rpartition(".")[2] for name in g.linears) for g in groups if g.fused}


# --------------------------------------------------------------------------------------------- Hugging Face models


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_the_expected_ones(family: str) -> None:
    """Both norms of every layer; q_norm and k_norm feed no linear; the final norm's output is the base model's."""
    groups = detect(tiny(family))
    first, second = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    if family == "phi3":
        first, second = ("qkv_proj",), ("gate_up_proj",)
    expected = [
        (f"model.layers.{i}.{norm}", tuple(f"model.layers.{i}.{parent}.{name}" for name in names))
        for i in range(3)
        for norm, parent, names in (
            ("input_layernorm", "self_attn", first),
            ("post_attention_layernorm", "mlp", second),
        )
    ]
    assert [(g.norm, g.linears) for g in groups[:-1]] == expected
    assert all(not g.reasons and not g.fused for g in groups[:-1])
    assert (groups[-1].norm, groups[-1].linears) == ("model.norm", ("lm_head",))
    assert groups[-1].reasons == ("its output leaves model, which may be called by itself",)
    for g in groups:
        assert g.form is not None and g.form.plus_one == (family == "gemma") and g.form.gamma == "weight"
        assert g.form.eps == (1e-5 if family == "phi3" else 1e-6)
    assert groups[0].bias == (family in ("qwen2", "llama_bias")) and groups[1].bias == (family == "llama_bias")
    gated = family != "gemma"  # whose GELU stays where it is
    assert (groups[1].n, groups[1].outputs, groups[1].k) == (192, 96 if gated else 192, 64)
    assert [g.activation for g in groups] == [None, "swiglu" if gated else None] * 3 + [None]
    assert not any(g.gate_reasons for g in groups)
    saved = (1 + len(second)) * 64 + (3 * 2 * 96 if gated else 0)  # gate, silu(gate), up: each written and read
    assert groups[1].bytes_saved(10) == 10 * saved * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_logits_and_greedy_tokens(family: str, operator_calls: list[torch.Size]) -> None:
    model = tiny(family)
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    expected, tokens = logits(model), model.generate(IDS, **options)
    assert len(fused_names(fuse(model))) == 6
    operator_calls.clear()
    actual = logits(model)
    assert operator_calls == [(2, 11, 64)] * 6
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(model.generate(IDS, **options), tokens)
    hidden = model(IDS, output_hidden_states=True).hidden_states
    unfuse(model)
    for ours, theirs in zip(hidden, model(IDS, output_hidden_states=True).hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_unfuse_restores_everything(family: str) -> None:
    model = tiny(family)
    expected, state = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    modules = {name: (id(m), type(m), sorted(vars(m))) for name, m in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    storages = bytes_in_parameters(model)
    fuse(model)
    folded = 6 * 64 * 4 if family == "gemma" else 0  # 1 + weight of six norms
    assert bytes_in_parameters(model) == storages + folded
    for name, value in model.state_dict().items():
        assert torch.equal(value, state.pop(name)), name
    assert not state
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert unfuse(model) == 6 and unfuse(model) == 0
    assert {name: (id(m), type(m), sorted(vars(m))) for name, m in model.named_modules()} == modules
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == parameters
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())  # no slices left
    assert torch.equal(logits(model), expected)


def bytes_in_parameters(model: nn.Module) -> int:
    """Memory behind parameters and buffers, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def test_fuse_is_idempotent(operator_calls: list[torch.Size]) -> None:
    model = tiny("qwen3")
    groups = fuse(model)
    types = [type(m) for m in model.modules()]
    assert fuse(model) == groups == detect(model)
    assert [type(m) for m in model.modules()] == types
    operator_calls.clear()
    logits(model)
    assert len(operator_calls) == 6


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_fused_models_can_be_copied(way: str) -> None:
    model = tiny("gemma")
    fuse(model)
    expected = logits(model)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert len(fused_names(detect(twin))) == 6
    assert torch.equal(logits(twin), expected)
    assert bytes_in_parameters(twin) == bytes_in_parameters(model)
    with torch.no_grad():
        twin.model.layers[0].mlp.up_proj.weight.mul_(3)
        assert (logits(twin) - expected).abs().max() > 0.01  # the copy computes with its own parameters
        twin.model.layers[0].mlp.up_proj.weight.div_(3)
    assert unfuse(twin) == 6
    torch.testing.assert_close(logits(twin), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["load", "assign", "replace", "delete", "to", "in place"])
def test_new_weights_reach_the_fused_model(way: str) -> None:
    """Nothing that changes parameters leaves an old packed copy behind."""
    model, other = tiny("gemma"), tiny("gemma")
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "layers" in name:
                parameter.mul_(1.5).add_(0.01)
    fuse(model)
    before = logits(model)
    if way in ("load", "assign"):
        model.load_state_dict(other.state_dict(), assign=way == "assign")
    elif way in ("replace", "delete"):
        for name, parameter in other.named_parameters():
            parent, _, last = name.rpartition(".")
            if way == "delete":
                delattr(model.get_submodule(parent), last)
            setattr(model.get_submodule(parent), last, parameter)
    elif way == "to":
        model.load_state_dict(other.state_dict())
        model.to(torch.float64).to(torch.float32)
    else:
        with torch.no_grad():
            for (name, parameter), source in zip(model.named_parameters(), other.parameters(), strict=True):
                if "norm" not in name:  # Gemma's 1 + weight is computed when weights are packed
                    parameter.copy_(source)
                else:
                    source.copy_(parameter)
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-5, atol=1e-5)
    assert (logits(model) - before).abs().max() > 0.1
    storages = bytes_in_parameters(model)
    unfuse(model)
    assert abs(bytes_in_parameters(model) - storages) <= 6 * 64 * 4  # 1 + weight of six norms, and nothing else twice


def test_a_call_with_other_parameters() -> None:
    """`functional_call` lends the model parameters for one call; the model's and the lender's stay as they were."""
    model, other = tiny("gemma"), tiny("gemma")
    lent = {name: 1.5 * p.detach() for name, p in other.named_parameters() if "layers" in name}
    storages = {name: tensor.data_ptr() for name, tensor in lent.items()}
    fuse(model)
    before = logits(model)
    with torch.no_grad():
        ours, theirs = (torch.func.functional_call(m, lent, (IDS,)).logits for m in (model, other))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - before).abs().max() > 0.1
    assert torch.equal(logits(model), before)
    assert {name: tensor.data_ptr() for name, tensor in lent.items()} == storages


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.up_proj", "input_layernorm"])
def test_computed_weights_reach_the_fused_model(name: str) -> None:
    class Twice(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    model, other = tiny("llama"), tiny("llama")
    fuse(model)
    for m in (model, other):
        nn.utils.parametrize.register_parametrization(m.model.layers[1].get_submodule(name), "weight", Twice())
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-5, atol=1e-5)


def test_captured_graphs_see_loaded_weights() -> None:
    """Loading in place and moving to where the model is keep every address that a CUDA graph may have captured."""
    model = tiny("gemma")
    fuse(model)
    norm = model.model.layers[1].input_layernorm
    addresses = [norm.packed_weight.data_ptr(), norm.packed_gamma.data_ptr()]
    model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()})
    model.to("cpu", torch.float32)
    assert [norm.packed_weight.data_ptr(), norm.packed_gamma.data_ptr()] == addresses
    assert torch.equal(norm.packed_gamma, 1 + norm.weight)
    model.to(torch.bfloat16)
    assert norm.packed_weight is None


def test_training_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="training mode"):
        detect(model.train())
    for name, parameter in model.named_parameters():  # without care, q_proj alone would silently get no gradient
        parameter.requires_grad_("q_proj" in name or name == "lm_head.weight")
    fuse(model.eval())
    model(IDS)  # wants gradients, asks for none
    with pytest.raises(NotImplementedError, match="no backward"):
        model(IDS).logits.sum().backward()
    with pytest.raises(RuntimeError, match="unfuse"):
        model.train()(IDS)
    unfuse(model)
    model(IDS).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


@pytest.mark.parametrize("part", ["self_attn.q_proj", "mlp.up_proj", "input_layernorm"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_no_gradient_is_lost(part: str, autocast: bool) -> None:
    """Parameters may want gradients, or none any more, after the model has been fused."""
    model = tiny("llama").requires_grad_(False)
    fuse(model)
    model.lm_head.requires_grad_(True)
    wanting = model.model.layers[1].get_submodule(part).requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(IDS).logits
        with pytest.raises(NotImplementedError, match="no backward"):
            y.sum().backward()
    assert model.lm_head.weight.grad is not None
    wanting.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(IDS).logits.sum().backward()  # of what is not fused


def test_a_layer_called_by_itself_is_right() -> None:
    """A fused linear given rows that no norm made computes what it always did."""
    model, x = tiny("llama"), torch.randn(2, 64)
    linear = model.model.layers[1].self_attn.k_proj
    expected = linear(x)
    fuse(model)
    assert type(linear) is not nn.Linear and torch.equal(linear(x), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(backend: str) -> None:
    model = tiny("qwen3")
    fuse(model)
    expected = logits(model)
    layer = model.model.layers[0]
    x = torch.randn(2, 5, 64)
    rotary = model.model.rotary_emb(x, torch.arange(5)[None])

    def block(x: torch.Tensor) -> torch.Tensor:
        x = x + layer.self_attn(layer.input_layernorm(x), position_embeddings=rotary, attention_mask=None)[0]
        return x + layer.mlp(layer.post_attention_layernorm(x))

    with torch.no_grad():
        compiled = torch.compile(block, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-5, atol=1e-5)
        whole = torch.compile(model, backend=backend)
        torch.testing.assert_close(whole(IDS).logits, expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="compile it afterwards"):
            detect(whole)
    torch.compiler.reset()


def test_report() -> None:
    model = tiny("qwen3")
    before, text = report(model), str(report(model))
    assert [(p.count, p.n, p.k, p.fused) for p in before.patterns] == [
        (3, 256, 64, False), (3, 192, 64, False), (1, 211, 64, False),
    ]  # fmt: skip
    # Rows of 64 floats: written once, read by 3 and by 2 linears; three rows of 96 written and read.
    assert before.bytes_saved == 3 * ((4 + 3) * 64 + 3 * 2 * 96) * 4
    assert "post_attention_layernorm → gate_proj, up_proj → swiglu: can be fused" in text
    assert "model.layers.*.input_layernorm → q_proj, k_proj, v_proj: can be fused" in text
    assert "model.norm → lm_head: left alone" in text and "its output leaves model" in text
    fuse(model)
    after = report(model)
    assert [p.fused for p in after.patterns] == [True, True, False] and after.bytes_saved == before.bytes_saved
    assert "7, of which 6 can be fused and 6 are" in str(after)


def test_public_name() -> None:
    assert nanovllm.fuse is fuse


# ------------------------------------------------------------------------------------------- modules that deceive


class RMSNorm(nn.Module):
    """As everybody writes it."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(1 + 0.3 * torch.randn(width)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Centred(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class EpsOutside(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-3) * self.weight


class Clamped(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(-2, 2)


class TwoPlus(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / self.weight * (2 + self.weight)


class EpsOfDtype(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps)).to(x.dtype) * self.weight


class Mixed(RMSNorm):
    """Its weight stays in float32 in a bfloat16 model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).to(x.dtype)


class Consuming(nn.Module):
    """The norm works in its input's memory, which is read again."""

    class Norm(RMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)).mul_(self.weight)

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = self.Norm(), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x.clone()))


class Tuple(RMSNorm):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), 1


class Block(nn.Module):
    """norm, then two linears; subclasses spoil it."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm or RMSNorm()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(16, 24, bias=False)
        self.kept: Any = None

    def forward(self, x: torch.Tensor) -> Any:
        return self.use(x, self.norm(x))

    def use(self, x: torch.Tensor, h: torch.Tensor) -> Any:
        return self.a(h) * self.b(h)


def block(use: Callable[[Block, torch.Tensor, torch.Tensor], Any], change: Any = None) -> Block:
    """A block whose `use` is the given one; `change` then does something to it."""
    made = type("Spoilt", (Block,), {"use": use})()
    if change is not None:
        change(made)
    return made


def plain(self: Block, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    return self.a(h) * self.b(h)


def keep(self: Block, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    self.kept = h.view(-1)
    return plain(self, x, h)


def modify(self: Block, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    left = self.a(h)
    h.add_(1)
    return left * self.b(h)


def overwrite(self: Block, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    h.view(-1)[:3] = 0
    return plain(self, x, h)


def hidden_read(self: Block, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """NumPy reads the memory behind PyTorch's back."""
    return plain(self, x, h) + float(h.detach().numpy().sum())


def width(self: Block, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The width is read from the norm's output, as some attention modules do."""
    return plain(self, x, h)[..., : h.shape[-1]]


class Adapter(nn.Linear):
    """A subclass that does more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.sum(-1, keepdim=True)


class Wrapped(nn.Module):
    """A child that returns the norm's output to others."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.head = nn.Sequential(nn.Linear(16, 16), RMSNorm()), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.base(x))


def tie(m: Block) -> None:
    m.b.weight = m.a.weight


def tie_storage(m: Block) -> None:
    m.register_buffer("shadow", m.a.weight.data[:1])


def patch(m: Block) -> None:
    m.a.forward = lambda h: F.linear(h, m.a.weight)  # type: ignore[method-assign]


def strided(m: Block) -> None:
    m.b.weight.data = torch.randn(16, 24).t()


SPOILT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "used twice": (lambda: block(lambda m, x, h: m.a(h) + m.b(h) + h.sum()), "also read by aten.sum"),
    "residual": (lambda: block(lambda m, x, h: torch.cat([m.a(h) * m.b(h), h], -1)), "also read by aten.cat"),
    "copied": (lambda: block(lambda m, x, h: m.a(h) + m.b(h.clone())), "also read by aten.clone"),
    "returned": (lambda: block(lambda m, x, h: (plain(m, x, h), h)), "may be called by itself"),
    "stored": (lambda: block(keep), "outlives the forward pass"),
    "in place": (lambda: block(modify), "writes in place, aten.add_"),
    "in place, a view": (lambda: block(overwrite), "writes in place"),
    "a part": (lambda: block(lambda m, x, h: m.a(h[:, -1]) * m.b(h[:, -1])), "reads only a part"),
    "transposed": (lambda: block(lambda m, x, h: m.a(h.mT.reshape_as(h)) * m.b(h)), "also read by"),
    "fed otherwise too": (lambda: block(lambda m, x, h: plain(m, x, h) + m.a(x)), "a also reads something else"),
    "different linears": (
        lambda: block(lambda m, x, h: m.a(h) * m.b(m.norm(x + 1))),
        "its calls go into different linears",
    ),
    "in its input's memory": (Consuming, "is a view, not a tensor of its own"),
    "width read": (lambda: block(width), "the model's output changes"),
    "read by NumPy": (lambda: block(hidden_read), "the model's output changes by"),
    "LayerNorm": (lambda: Block(nn.LayerNorm(16)), "subtracts the mean"),
    "LayerNorm without bias": (lambda: Block(nn.LayerNorm(16, bias=False)), "subtracts the mean"),
    "mean subtracted": (lambda: Block(Centred()), "subtracts the mean"),
    "eps outside": (lambda: Block(EpsOutside()), "does not compute x / sqrt"),
    "clamped": (lambda: Block(Clamped()), "does not compute x / sqrt"),
    "2 + weight": (lambda: Block(TwoPlus()), "does not compute x / sqrt"),
    "tied": (lambda: block(plain, tie), "b.weight shares its memory with a.weight"),
    "tied to a buffer": (lambda: block(plain, tie_storage), "a.weight shares its memory with shadow"),
    "subclass": (lambda: block(plain, lambda m: setattr(m, "b", Adapter(16, 24))), "b is a Adapter"),
    "parametrized": (
        lambda: block(plain, lambda m: nn.utils.parametrizations.weight_norm(m.b)),
        "b is a ParametrizedLinear",
    ),
    "hook": (lambda: block(plain, lambda m: m.a.register_forward_hook(lambda m, i, o: o + 1)), "a has hooks"),
    "pre-hook": (lambda: block(plain, lambda m: m.norm.register_forward_pre_hook(lambda m, i: None)), "has hooks"),
    "patched": (lambda: block(plain, patch), "a has a patched forward"),
    "strides": (lambda: block(plain, strided), "b.weight is not contiguous"),
    "float64": (lambda: Block().double(), "dtype torch.float64 is none of"),
    "leaves its module": (Wrapped, "its output leaves base"),
    "as wide": (lambda: nn.Sequential(RMSNorm(), nn.Linear(16, 16)), "16 outputs are as wide as its input"),
    "scripted reader": (
        lambda: block(plain, lambda m: setattr(m, "b", torch.jit.script(m.b))),
        "also read by aten",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", SPOILT)
def test_left_alone_with_its_reason(name: str) -> None:
    torch.manual_seed(1)
    make, reason = SPOILT[name]
    model = make().eval()
    x = torch.randn(2, 3, 16, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        expected = model(x)
    types = [type(m) for m in model.modules()]
    (group,) = fuse(model, x)
    assert not group.fused and any(reason in r for r in group.reasons), group.reasons
    assert [type(m) for m in model.modules()] == types and unfuse(model) == 0
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_eps_that_depends_on_the_dtype() -> None:
    """In float32 it looks like eps=1.2e-7, in bfloat16 it is 0.008."""
    model = Block(EpsOfDtype()).eval().bfloat16()
    (group,) = fuse(model, torch.randn(2, 3, 16, dtype=torch.bfloat16))
    assert any("something else in torch.bfloat16" in r for r in group.reasons), group.reasons


def test_norm_weight_of_another_dtype() -> None:
    model = Block(Mixed()).eval().bfloat16()
    model.norm.float()
    (group,) = fuse(model, torch.randn(2, 3, 16, dtype=torch.bfloat16))
    assert any("the norm's weight is torch.float32" in r for r in group.reasons), group.reasons


@pytest.mark.parametrize(
    "norm",
    [Tuple(), nn.SiLU(), nn.Identity(), torch.jit.script(nn.RMSNorm(16, eps=1e-6))],
    ids=lambda n: type(n).__name__,
)
def test_no_group_at_all(norm: nn.Module) -> None:
    use = (lambda m, x, h: plain(m, x, h[0])) if isinstance(norm, Tuple) else plain
    model = block(use, lambda m: setattr(m, "norm", norm)).eval()
    assert fuse(model, torch.randn(2, 3, 16)) == []


CLEAN: dict[str, Callable[[], nn.Module]] = {
    "plain": Block,
    "nn.RMSNorm": lambda: Block(nn.RMSNorm(16, eps=1e-5)),
    "without weight": lambda: Block(nn.RMSNorm(16, eps=1e-5, elementwise_affine=False)),
    "frozen": lambda: Block().requires_grad_(False),
    "flattened": lambda: block(lambda m, x, h: plain(m, x, h.flatten(0, 1))),
    "dropout": lambda: block(lambda m, x, h: plain(m, x, m.drop(h)), lambda m: setattr(m, "drop", nn.Dropout(0.5))),
    "looped": lambda: block(lambda m, x, h: plain(m, x, h) + plain(m, x, m.norm(2 + x))),
    "one linear": lambda: nn.Sequential(RMSNorm(), nn.Linear(16, 24)),
    "no literal eps": lambda: Block(EpsOfDtype()),
}


@pytest.mark.parametrize("name", CLEAN)
def test_fused_where_it_is_proven(name: str, operator_calls: list[torch.Size]) -> None:
    torch.manual_seed(2)
    model, x = CLEAN[name]().eval(), torch.randn(2, 3, 16)
    with torch.no_grad():
        expected = model(x)
        (group,) = fuse(model, x)
        assert group.fused and not group.reasons, group.reasons
        operator_calls.clear()
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        small = 1e-3 * x
        fused = model(small)
        assert operator_calls
        unfuse(model)
        torch.testing.assert_close(fused, model(small), rtol=1e-5, atol=1e-5)


def test_code_that_was_not_watched_fails_loudly() -> None:
    """Another branch reads the norm's output: its width is wrong, which is an error and no silent number."""

    def use(self: Block, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return plain(self, x, h) if len(x) == 2 else plain(self, x, h) + self.a(x + h)

    model = block(use).eval()
    (group,) = fuse(model, torch.randn(2, 16))
    assert group.fused
    with pytest.raises(RuntimeError, match="size of tensor"):
        model(torch.randn(3, 16))


def test_examples_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"give an example call, such as fuse\(model, x\)"):
        fuse(Block().eval())
    with pytest.raises(ValueError, match="does not run on token ids alone"):
        fuse(nn.Sequential(nn.Bilinear(4, 4, 4), nn.Embedding(4, 4)).eval())


# ------------------------------------------------------------------------------------------ real text, real weights

SMOLLM2_TEXT = Path(__file__).with_name("data") / "smollm2_greedy.json"


def smollm2(dtype: torch.dtype, device: str) -> tuple[PreTrainedModel, list[torch.Tensor]]:
    """SmolLM2-135M-Instruct as a Hugging Face model, and some 600 tokens of text."""
    from nanovllm.loader import resolve_model

    gguf = resolve_model("smollm2").path
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype).to(device).eval()
    cases = [case["prompt_token_ids"] for case in json.loads(SMOLLM2_TEXT.read_text())["cases"]]
    return model, [torch.tensor([ids], device=device) for ids in cases if len(ids) >= 100][:4]


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """(share of rows with the same argmax, mean KL(theirs || ours) in nats)."""
    p, q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    agreement = float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    return agreement, float((p.exp() * (p - q)).sum(-1).mean())


def test_smollm2_bf16_on_real_text() -> None:
    """Here the operator is its reference body: the kernels' figures come from the gpu tier below."""
    model, texts = smollm2(torch.bfloat16, "cpu")
    expected = torch.cat([logits(model, ids)[0] for ids in texts])
    groups = fuse(model)
    assert sum(g.fused for g in groups) == 60
    agreement, kl = divergence(torch.cat([logits(model, ids)[0] for ids in texts]), expected)
    print(f"\nSmolLM2 bf16, {len(expected)} tokens: argmax agreement {agreement:.4f}, KL {kl:.2e} nats")
    assert agreement >= 0.98 and kl < 1e-3


def test_rounding_elsewhere_is_no_reason_to_leave_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels keep the normalised row in float32, the reference body here rounds it: both are right."""

    def unrounded(x: torch.Tensor, weight: torch.Tensor, gamma: torch.Tensor, eps: float, *rest: Any) -> torch.Tensor:
        row = x.float()
        y = F.linear(row * torch.rsqrt(row.square().mean(-1, keepdim=True) + eps) * gamma.float(), weight.float())
        if "swiglu" in rest:
            gate, up = y.chunk(2, -1)
            y = F.silu(gate) * up
        return y.to(x.dtype)

    model, _ = smollm2(torch.bfloat16, "cpu")
    monkeypatch.setattr(rms_norm_linear_fusion.reference, "rms_norm_linear", unrounded)
    assert sum(g.fused for g in fuse(model)) == 60


# --------------------------------------------------------------------------------------- the kernels, interpreted


@pytest.mark.interpret
@pytest.mark.parametrize("family", ["llama_bias", "mistral", "qwen2", "qwen3", "gemma"])
@pytest.mark.parametrize("rows", [1, 3])
def test_interpreted_kernel_end_to_end(family: str, rows: int, kernel_launches: list[str]) -> None:
    """The same public call on CPU tensors runs the Triton kernel itself: few rows, so that the policy chooses it."""
    model = tiny(family)
    ids = IDS[:1, :rows]
    weight = model.model.layers[0].mlp.gate_proj.weight
    assert why_not(torch.empty(1, 64), weight, None, 1e-6) == []
    expected = logits(model, ids)
    assert len(fused_names(fuse(model, ids))) == 6
    kernel_launches.clear()
    actual = logits(model, ids)
    assert len(kernel_launches) == 6
    assert 0 < (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.interpret
def test_autocast_still_decides_the_dtype(kernel_launches: list[str]) -> None:
    """A kernel knows nothing of autocast: under it the module runs its parts."""
    model, x = Block().eval(), torch.randn(1, 16)
    fuse(model, x)
    assert kernel_launches
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        actual = model(x)
        unfuse(model)
        expected = model(x)
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected)


# ----------------------------------------------------------------------------------------------- the kernels, GPU


KERNEL_FAMILIES = ["llama_bias", "mistral", "qwen2", "qwen3", "gemma"]


def some_ids(rows: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 200, (rows, 1), generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, 16, 64])
@pytest.mark.parametrize("family", KERNEL_FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_gpu_error_is_that_of_the_unfused_model(family: str, dtype: torch.dtype, rows: int) -> None:
    """Against float64 with the same weights: fused loses at most twice (RMS, 16 inputs) what the unfused model does."""
    model = tiny(family).cuda().to(dtype)
    inputs = [some_ids(rows, seed) for seed in range(16)]
    truth = copy.deepcopy(model).double()
    exact = torch.cat([logits(truth, ids) for ids in inputs])
    unfused = torch.cat([logits(model, ids) for ids in inputs]).double()
    assert len(fused_names(fuse(model, inputs[0]))) == 6
    fused = torch.cat([logits(model, ids) for ids in inputs]).double()
    ours, theirs = (float((result - exact).square().mean().sqrt()) for result in (fused, unfused))
    print(f"\n{family} {dtype} rows {rows}: fused {ours:.2e}, unfused {theirs:.2e}")
    assert 0 < ours <= 2 * theirs


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, 16, 64])
@pytest.mark.parametrize("family", KERNEL_FAMILIES)
def test_gpu_fp32_logits(family: str, rows: int, kernel_launches: list[str]) -> None:
    model, ids = tiny(family).cuda(), some_ids(rows, 0)
    expected = logits(model, ids)
    assert len(fused_names(fuse(model, ids))) == 6
    kernel_launches.clear()
    assert (logits(model, ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert len(kernel_launches) == 6 or rows > 4


@pytest.mark.gpu
def test_gpu_cuda_graph() -> None:
    """Captured, replayed on new tokens, and equal bit for bit to the eager fused model."""
    model = tiny("qwen3").cuda().bfloat16()
    model.set_attn_implementation("sdpa")
    fuse(model)
    ids = IDS[:, :1].cuda().clone()
    stream = torch.cuda.Stream()
    with torch.no_grad():
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(ids, use_cache=False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(ids, use_cache=False).logits
        for column in (1, 4, 7):
            ids.copy_(IDS[:, column : column + 1])
            graph.replay()
            assert torch.equal(output, model(ids, use_cache=False).logits)


@pytest.mark.gpu
def test_gpu_torch_compile() -> None:
    model = tiny("llama").cuda()
    ids = IDS[:, :1].cuda()
    expected = logits(model, ids)
    fuse(model)
    compiled = torch.compile(model)
    actual = logits(compiled, ids)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    torch.compiler.reset()


@pytest.mark.gpu
def test_gpu_qwen3_0_6b_same_greedy_tokens() -> None:
    """The real shape with random weights, fp32: 32 greedy tokens of two prompts, decoded at two rows."""
    config = Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(config).eval()
    options = dict(max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = model.generate(IDS.cuda(), **options)
    assert len(fused_names(fuse(model))) == 56
    assert torch.equal(model.generate(IDS.cuda(), **options), expected)


@pytest.mark.gpu
def test_gpu_smollm2_bf16_on_real_text() -> None:
    """Token by token, so that the kernels run and not the norm and the GEMM that long inputs take."""
    model, texts = smollm2(torch.bfloat16, "cuda")

    @torch.no_grad()
    def one_by_one(ids: torch.Tensor) -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits[0] for i in range(ids.shape[1])]
        return torch.cat(steps)

    expected = torch.cat([one_by_one(ids) for ids in texts[:2]])
    assert sum(g.fused for g in fuse(model)) == 60
    agreement, kl = divergence(torch.cat([one_by_one(ids) for ids in texts[:2]]), expected)
    print(f"\nSmolLM2 bf16 kernels, {len(expected)} tokens: argmax agreement {agreement:.4f}, KL {kl:.2e} nats")
    assert agreement >= 0.95 and kl < 1e-2
