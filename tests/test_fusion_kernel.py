"""The fused RMSNorm+Linear against float64: every variant, epilogue and edge, on inputs that can fail.

One table of tolerances serves all: `kernel_checks.judge` (twice PyTorch's own error in the same dtype, maximum and
root mean square), and 1e-5 of the largest value in float32. Half precision has no number of its own: 2x PyTorch's
three roundings (normalised row, gamma, output) is what a wrong cast order breaks and a right one does not reach.
One rounding too many hides in that budget if it is the same for a whole row: `scale_error` looks for it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import BF16, F16, F32, judge, norm_weight, outliers, tiers

from nanovllm.kernels import reference, rms_norm_linear_fusion
from nanovllm.kernels.fusion_config import FusionConfig, Problem
from nanovllm.kernels.fusion_table import TABLES, load_table, table_name
from nanovllm.kernels.jit import gpu_of
from nanovllm.kernels.launch_config import Gpu
from nanovllm.kernels.linear_residual import linear_residual
from nanovllm.kernels.norm import rms_norm
from nanovllm.kernels.rms_norm_linear_fusion import rms_norm_linear, why_not

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EPS = 1e-6


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


class Case(NamedTuple):
    """One problem. x: [*shape, k]; `parts` names what is there besides: gamma, bias, residual, swiglu."""

    shape: tuple[int, ...]
    n: int
    k: int
    parts: str
    config: str | None = None

    def __str__(self) -> str:
        return f"{self.shape}-{self.n}-{self.k}-{self.parts.replace(' ', '+') or 'bare'}-{self.config or 'policy'}"


class Arguments(NamedTuple):
    """What the operator takes, and what it must and may return."""

    positional: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float]
    named: dict
    truth: torch.Tensor
    same_dtype: torch.Tensor


def in_nan(tensor: torch.Tensor, gap: int) -> torch.Tensor:
    """The same values as rows of a wider buffer: `gap` NaNs behind each row, and one row of them."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    buffer = torch.full(
        (rows.shape[0] + 1, rows.shape[1] + gap), float("nan"), dtype=tensor.dtype, device=tensor.device
    )
    buffer[:-1, : rows.shape[1]] = rows
    return buffer[:-1, : rows.shape[1]].unflatten(0, tensor.shape[:-1]) if tensor.dim() > 1 else buffer[0, :-gap]


def truth_of(x, weight, gamma, bias, residual, swiglu: bool) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """float64, from the formula."""
    x, weight, gamma, bias, residual = (
        None if t is None else t.double().cpu() for t in (x, weight, gamma, bias, residual)
    )
    normed = x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    y = torch.einsum("...k,nk->...n", normed if gamma is None else normed * gamma, weight)
    y = y if bias is None else y + bias
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = gate / (1 + torch.exp(-gate)) * up
    return y if residual is None else y + residual


def torch_of(x, weight, gamma, bias, residual, swiglu: bool) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """The eager code of Hugging Face's models, every operator rounding to x's dtype."""
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
    y = F.linear(normed if gamma is None else gamma * normed, weight, bias)
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if residual is None else residual + y


def arguments(case: Case, dtype: torch.dtype, device: str, gap: int = 0, scale: float = 1.0) -> Arguments:
    """Rows with channels a thousand times larger than the rest, norm weights up to 90, `gap` NaNs behind every row."""
    swiglu = "swiglu" in case.parts
    rows = 2 * case.n if swiglu else case.n
    x = torch.randn(*case.shape, case.k)
    x[..., :: max(case.k // 3, 1)] *= 1000
    x = (x * scale).to(dtype).to(device)
    weight = (torch.randn(rows, case.k) / case.k**0.5).to(dtype).to(device)
    gamma = norm_weight(case.k, dtype, device) if "gamma" in case.parts else None
    bias = torch.randn(rows).to(dtype).to(device) if "bias" in case.parts else None
    residual = (10 * torch.randn(*case.shape, case.n)).to(dtype).to(device) if "residual" in case.parts else None
    operands = (x, weight, gamma, bias, residual, swiglu)
    truth, same_dtype = truth_of(*operands), torch_of(*operands)
    if gap:
        x, weight = in_nan(x, gap), in_nan(weight, gap)
        residual = None if residual is None else in_nan(residual, gap)
    config = FusionConfig.parse(case.config) if case.config else None
    if dtype == F32 and config is not None and config.variant == "panel":  # for 16-bit numbers: policies say so
        config = None
    named = {"bias": bias, "residual": residual, "activation": "swiglu" if swiglu else None, "config": config}
    return Arguments((x, weight, gamma, EPS), named, truth, same_dtype)


def check(given: Arguments) -> torch.Tensor:
    """Run the public call and judge it."""
    y = rms_norm_linear(*given.positional, **given.named)
    assert y.is_contiguous()
    judge(y, given.truth, given.same_dtype)
    if y.dtype == F32:
        assert (y.double().cpu() - given.truth).abs().max() <= 1e-5 * given.truth.abs().max()
    return y


ALL = "gamma bias residual"
SMALL = [
    Case((1,), 33, 100, "gamma"),
    Case((1,), 32, 128, "", "gemv/4/128/1"),
    Case((3,), 20, 130, "gamma bias residual swiglu", "gemv/4/64/2"),
    Case((2, 2), 7, 96, ALL, "gemv/8/32/1"),
    Case((5,), 37, 129, ALL, "tile/16/16/32/1/1"),
    Case((2, 9), 24, 64, "gamma swiglu bias residual", "tile/32/32/64/4/2"),
    Case((40,), 16, 48, "residual", "tile/16/16/16/4/2"),
    Case((66,), 21, 100, "gamma swiglu bias residual", "tile/64/32/32/4/2"),  # x is the left operand
    Case((3,), 37, 129, ALL, "tile/64/16/32/4/2"),
    Case((5,), 37, 129, ALL, "pair/16/16/32/1/1"),
    Case((2, 9), 24, 128, "gamma swiglu bias residual", "pair/32/32/64/4/2"),
    Case((70,), 7, 9, "", "pair/64/64/16/4/3"),
    Case((40,), 40, 64, "residual", "pair/64/32/32/4/2"),
    Case((5,), 37, 129, ALL, "panel/8/16/64/2"),
    Case((2, 8), 20, 200, "gamma swiglu bias residual", "panel/16/32/128/4"),
    Case((7,), 20, 64, ALL, "unfused"),
    Case((7,), 20, 64, "bias residual swiglu", "unfused"),  # gamma folded: 1 / rms in the activation's kernel
]
LARGE = [
    Case((1,), 4096, 1024, "gamma"),
    Case((1,), 3072, 1024, "gamma swiglu"),
    Case((2,), 1024, 16384, ALL),
    Case((4,), 1001, 2560, ALL),
    Case((1,), 1000, 4095, "gamma swiglu", "gemv/16/256/8"),
    Case((8,), 500, 576, ALL, "gemv/4/256/2"),
    Case((8,), 4096, 1024, "gamma"),
    Case((16,), 3072, 1024, "gamma swiglu residual"),
    Case((1,), 4096, 1024, "gamma", "panel/8/16/1024/8"),
    Case((5,), 1024, 3072, "residual", "panel/8/16/3072/8"),
    Case((16,), 3072, 1024, "gamma swiglu", "panel/16/32/1024/8"),
    Case((16,), 999, 2560, ALL, "panel/16/32/512/4"),
    Case((7,), 500, 1001, ALL, "panel/8/16/512/4"),
    Case((33,), 999, 1001, ALL, "tile/64/64/64/4/3"),
    Case((64,), 1536, 2048, "gamma swiglu", "tile/64/128/64/8/3"),
    Case((64,), 256, 16384, ALL, "tile/32/64/128/4/4"),
    Case((64,), 1001, 2560, ALL, "tile/64/32/128/4/4"),
    Case((64,), 1536, 2048, "gamma swiglu", "tile/64/16/256/4/4"),
    Case((32,), 3072, 1024, "gamma swiglu", "pair/32/64/128/4/4"),
    Case((33,), 999, 1001, ALL, "pair/64/64/64/4/3"),
    Case((64,), 1536, 2048, "gamma swiglu residual", "pair/64/128/128/8/4"),
    Case((100,), 1024, 2048, "bias", "pair/64/32/256/4/4"),
    Case((300,), 1024, 1000, ALL),
    Case((300,), 1024, 1000, "swiglu"),
    Case((2, 150), 1024, 1000, "bias residual swiglu"),
]


@tiers(small=SMALL, large=LARGE)
def test_against_float64(device: str, dtype: torch.dtype, case: Case) -> None:
    if dtype == F32 and "panel" in (case.config or ""):  # multiplies 16-bit numbers
        case = case._replace(config=None)
    elif dtype == F32 and case.config is not None and case in LARGE:  # the policy never takes tiles for float32
        case = case._replace(config="gemv/16/128/8" if case.shape[0] <= 8 else None)
    check(arguments(case, dtype, device))


def scale_error(y: torch.Tensor, truth: torch.Tensor) -> float:
    """By how much all of y is too large: the mean relative error, weighted by the square of the values."""
    y = y.double().cpu()
    return float((y * truth).sum() / truth.square().sum() - 1)


def between_two(dtype: torch.dtype, rows: int, width: int) -> torch.Tensor:
    """Rows whose 1 / rms, rounded to `dtype`, becomes smaller by 0.4 units in the last place.

    Not near 1: there the product with numbers of `dtype` would be rounded the same way every time.
    """
    target = torch.tensor(1.37).to(dtype).item() + 0.4 * torch.finfo(dtype).eps
    x = torch.randn(rows, width, dtype=torch.float64)
    x = (x / (target * x.square().mean(-1, keepdim=True).sqrt())).to(dtype)
    rstd = x.double().square().mean(-1).add(EPS).rsqrt()
    assert bool((rstd.to(dtype).double() / rstd - 1 < -0.2 * torch.finfo(dtype).eps).all())
    return x


SCALES = [
    *[("cpu", dtype, (4, 64, 256), None) for dtype in (F16, BF16)],
    *[
        ("interpret", F16, (4, 64, 256), c)
        for c in (
            "gemv/4/256/2",
            "panel/8/16/64/2",
            "tile/16/16/64/2/2",
            "tile/64/32/64/4/2",
            "pair/16/16/64/2/2",
            "unfused",
        )
    ],
    *[
        ("cuda", dtype, (m, 4096, 1024), config)
        for dtype in (F16, BF16)
        for m, config in (
            (1, "gemv/8/512/4"),
            (4, "panel/8/16/128/4"),
            (16, "tile/16/64/128/4/3"),
            (64, "tile/64/32/128/4/3"),
            (32, "pair/32/64/128/4/3"),
            (200, "unfused"),
        )
    ],
]


@pytest.mark.parametrize(
    ("device", "dtype", "shape", "config"),
    [
        pytest.param(
            "cuda" if where == "cuda" else "cpu", dtype, shape, config, id=f"{where}-{dtype}-{config or 'reference'}",
            marks={"cuda": [pytest.mark.gpu], "interpret": [pytest.mark.interpret]}.get(where, []),
        )
        for where, dtype, shape, config in SCALES
    ],
)  # fmt: skip
def test_one_over_rms_is_not_rounded(
    device: str, dtype: torch.dtype, shape: tuple[int, int, int], config: str | None
) -> None:
    """A scale rounded to x's dtype would move all outputs together, here by 0.29 eps: too little for `judge` to see.

    Other roundings, of outputs and of the normalised row's elements, are independent. Each is 0.2 eps in the mean, and
    the square root of their number divides it: about 0.03 eps is left of 256 outputs and K = 256.
    """
    m, n, k = shape
    x, gamma = between_two(dtype, m, k), (1 + 0.1 * torch.randn(k)).to(dtype)
    weight = (torch.randn(n, k) / k**0.5).to(dtype)
    truth = truth_of(x, weight, gamma, None, None, False)
    chosen = FusionConfig.parse(config) if config else None
    y = rms_norm_linear(x.to(device), weight.to(device), gamma.to(device), EPS, config=chosen)
    assert abs(scale_error(y, truth)) < 0.15 * torch.finfo(dtype).eps


@tiers(
    small=[
        Case((3,), 21, 100, ALL, "gemv/4/64/1"),
        Case((6,), 18, 100, ALL + " swiglu", "tile/16/16/32/2/2"),
        Case((6,), 18, 100, ALL + " swiglu", "tile/64/32/32/4/2"),
        Case((2, 3), 18, 128, ALL + " swiglu", "pair/16/32/32/2/2"),  # with a gap of 8 aligned
        Case((6,), 18, 100, ALL + " swiglu", "panel/8/16/64/2"),
    ],
    large=[Case((2, 2), 300, 1000, ALL), Case((2, 3), 300, 1000, ALL + " swiglu"), Case((70,), 300, 1000, ALL)],
)
@pytest.mark.parametrize("gap", [8, 13])
def test_strided_rows_between_nans(device: str, dtype: torch.dtype, case: Case, gap: int) -> None:
    """Nothing outside the rows is read, though their tiles overlap it."""
    check(arguments(case, dtype, device, gap))


@tiers(
    small=[
        Case((2,), 40, 64, "gamma", "gemv/4/64/1"),
        Case((6,), 40, 64, "gamma", "tile/16/16/32/2/2"),
        Case((6,), 40, 64, "gamma", "pair/16/16/32/2/2"),
        Case((6,), 40, 64, "gamma", "panel/8/16/64/2"),
    ],
    large=[Case((1,), 512, 1024, "gamma"), Case((16,), 512, 1024, "gamma"), Case((99,), 512, 1024, "gamma")],
)
def test_tiny_rows(device: str, dtype: torch.dtype, case: Case) -> None:
    """Values so small that eps decides."""
    check(arguments(case, dtype, device, scale=1e-6 if dtype != F16 else 1e-5))


@tiers(
    small=[
        Case((3,), 20, 64, "gamma bias", "gemv/4/64/1"),
        Case((6,), 20, 64, "gamma bias", "tile/16/16/32/2/2"),
        Case((6,), 20, 64, "gamma bias", "pair/16/16/32/2/2"),
        Case((6,), 20, 64, "gamma bias", "panel/8/16/64/2"),
    ],
    large=[Case((2,), 512, 1024, "gamma bias"), Case((16,), 512, 1024, "gamma bias")],
)
@pytest.mark.parametrize("eps", [EPS, 1e-30])
def test_a_row_of_zeros_gives_the_bias(device: str, dtype: torch.dtype, case: Case, eps: float) -> None:
    given = arguments(case, dtype, device)
    (x, weight, gamma, _), config = given.positional, given.named["config"]
    bias = torch.randn(case.n).to(dtype).to(device)
    x[1] = 0
    y = rms_norm_linear(x, weight, gamma, eps, bias=bias, config=config)
    assert torch.equal(y[1], bias)
    assert bool(torch.isfinite(y).all())


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", F16, marks=pytest.mark.interpret, id="interpret"),
        *[pytest.param("cuda", dtype, marks=pytest.mark.gpu, id=f"gpu-{dtype}") for dtype in (F16, BF16)],
    ],
)
def test_a_pair_rounds_as_norm_and_linear_do(device: str, dtype: torch.dtype) -> None:
    """Through a weight that changes nothing comes what the norm alone returns; a fused kernel rounds less often."""
    x, _, gamma, _ = arguments(Case((20,), 64, 64, "gamma"), dtype, device).positional
    weight, normed = torch.eye(64, dtype=dtype, device=device), rms_norm(x, gamma, EPS)
    assert torch.equal(rms_norm_linear(x, weight, gamma, EPS, config=FusionConfig.parse("pair/32/16/32/4/2")), normed)
    tile = rms_norm_linear(x, weight, gamma, EPS, config=FusionConfig.parse("tile/32/16/32/4/2"))
    assert not torch.equal(tile, normed)


@pytest.mark.interpret
@pytest.mark.parametrize("config", ["gemv/4/64/1", "tile/16/16/32/2/2", "pair/16/16/32/2/2"])
def test_the_interpreter_runs_the_kernel(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(Case((2,), 20, 64, "gamma", config), F32, "cpu")
    monkeypatch.setattr(reference, "rms_norm_linear", None)
    check(given)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("rows", "outputs"), [(0, 8), (3, 0), (0, 0)])
def test_nothing_to_do(device: str, rows: int, outputs: int) -> None:
    x, weight = torch.ones(2, rows, 16, device=device), torch.ones(outputs, 16, device=device)
    assert rms_norm_linear(x, weight, None, EPS).shape == (2, rows, outputs)


def test_layouts_that_no_kernel_reads_take_the_reference_body() -> None:
    x, weight = torch.randn(64, 3).t(), torch.randn(64, 8).t()
    torch.testing.assert_close(
        rms_norm_linear(x, weight, None, EPS), rms_norm_linear(x.contiguous(), weight, None, EPS)
    )
    assert any("x is not contiguous" in reason for reason in why_not(x, weight, None, EPS))
    assert any("float64 is none of" in reason for reason in why_not(x.double(), weight.double(), None, EPS))
    assert rms_norm_linear(x.double(), weight.double(), None, EPS).dtype == torch.float64


BAD = {
    "K": ({"weight": torch.ones(4, 9)}, r"x \[2, 8\] and weight \[4, 9\] must share"),
    "dimensions": ({"weight": torch.ones(4)}, r"weight \[N, K\], got \[2, 8\] and \[4\]"),
    "no columns": ({"x": torch.ones(2, 0), "weight": torch.ones(4, 0)}, "at least 1"),
    "norm weight": ({"norm_weight": torch.ones(4)}, r"norm_weight must have shape \[8\] .* got \[4\]"),
    "bias": ({"bias": torch.ones(8)}, r"bias must have shape \[4\] .* got \[8\]"),
    "packed bias": ({"bias": torch.ones(2), "activation": "swiglu"}, r"bias must have shape \[4\]"),
    "residual": ({"residual": torch.ones(2, 8)}, r"residual must have shape \[2, 4\] .* got \[2, 8\]"),
    "broadcast residual": ({"residual": torch.ones(4)}, r"residual must have shape \[2, 4\]"),
    "swiglu residual": ({"residual": torch.ones(2, 4), "activation": "swiglu"}, r"must have shape \[2, 2\]"),
    "odd rows": ({"weight": torch.ones(5, 8), "activation": "swiglu"}, "packed weight"),
    "dtype": ({"weight": torch.ones(4, 8, dtype=F16)}, "weight is torch.float16 on cpu but x is torch.float32"),
    "norm dtype": ({"norm_weight": torch.ones(8, dtype=BF16)}, "norm_weight is torch.bfloat16"),
    "device": ({"bias": torch.ones(4, device="meta")}, "bias is torch.float32 on meta but x is torch.float32 on cpu"),
    "integers": ({"x": torch.ones(2, 8).int(), "weight": torch.ones(4, 8).int(), "norm_weight": None}, "torch.int32"),
    "complex": ({"x": torch.ones(2, 8, dtype=torch.complex64)}, "floating-point tensor, got torch.complex64"),
    "eps": ({"eps": -1e-6}, "eps must be 0 or positive, got -1e-06"),
    "NaN": ({"eps": float("nan")}, "got nan"),
    "activation": ({"activation": "gelu"}, "got 'gelu'"),
}


@pytest.mark.parametrize("name", BAD)
def test_arguments_that_do_not_match(name: str) -> None:
    changed, sentence = BAD[name]
    given = {"x": torch.ones(2, 8), "weight": torch.ones(4, 8), "norm_weight": torch.ones(8), "eps": EPS, **changed}
    with pytest.raises(ValueError, match=sentence):
        rms_norm_linear(**given)
    assert len(why_not(**given)) == 1


def test_why_not_names_every_reason() -> None:
    x, weight = torch.ones(2, 8), torch.ones(4, 8)
    assert "LayerNorm" in why_not(x, weight, None, EPS, subtracts_mean=True)[0]
    meta = why_not(x.to("meta"), weight.to("meta"), None, EPS)
    assert meta == ["x is on meta: the kernels need a CUDA device"]


@pytest.mark.interpret
def test_why_not_follows_the_policy() -> None:
    weight = torch.ones(4, 64)
    assert why_not(torch.ones(2, 64), weight, None, EPS) == []
    assert "as fast or faster" in why_not(torch.ones(5000, 64), weight, None, EPS)[0]
    gemv, pair = map(FusionConfig.parse, ("gemv/4/64/1", "pair/64/32/32/4/2"))
    assert "at most" in why_not(torch.ones(50, 64), weight, None, EPS, config=gemv)[0]
    assert why_not(torch.ones(50, 64), weight, None, EPS, config=pair, weights_ready=True) == []


@pytest.mark.interpret
def test_a_config_that_cannot_run_is_refused() -> None:
    for text, sentence in (("gemv/4/64/1", "at most 8 rows"), ("pair/16/16/32/4/2/pdl", "Hopper or later")):
        with pytest.raises(ValueError, match=f"{text} cannot run .*{sentence}"):
            rms_norm_linear(torch.ones(9, 64), torch.ones(4, 64), None, EPS, config=FusionConfig.parse(text))


@pytest.mark.interpret
def test_a_config_never_gives_way_to_the_reference_body() -> None:
    """Operands that no kernel reads take it only where nobody asked for a kernel."""
    gemv, unfused = map(FusionConfig.parse, ("gemv/4/64/1", "unfused"))
    x, weight = torch.randn(2, 64), torch.randn(64, 4).t()
    for operands, reason in (((x, weight), "weight is not contiguous"), ((x.double(), weight.double()), "float64")):
        with pytest.raises(ValueError, match=f"{gemv} cannot run .*{reason}"):
            rms_norm_linear(*operands, None, EPS, config=gemv)
        y = rms_norm_linear(*operands, None, EPS)
        assert torch.equal(rms_norm_linear(*operands, None, EPS, config=unfused), y)


STREAM_SMALL = [
    Case((1,), 21, 129, "bias", "gemv/4/64/1"),
    Case((9,), 21, 100, "bias", "panel/16/16/64/2"),
    Case((17,), 37, 129, "bias", "tile/64/16/256/4/4"),  # x is the left operand
    Case((64,), 16, 600, "", "tile/64/16/256/4/4"),
    Case((33,), 40, 25, "bias", "tile/64/16/32/4/4"),
]
STREAM_LARGE = [
    Case((1,), 1024, 3072, "", "gemv/4/256/4"),
    Case((24,), 1024, 3072, "", "tile/64/16/256/4/4"),
    Case((64,), 2048, 8192, "bias", "tile/64/16/256/4/4"),
]


@tiers(small=STREAM_SMALL, large=STREAM_LARGE)
def test_a_linear_is_added_to_the_stream_in_place(device: str, dtype: torch.dtype, case: Case) -> None:
    """The other half of a decoder layer, from strided rows; launched as a dependent where the GPU can."""
    m, n, k = *case.shape, case.n, case.k
    assert case.config is not None
    config = FusionConfig.parse(case.config)
    if dtype == F32 and (config.variant == "panel" or (config.variant == "tile" and device == "cuda")):
        config = FusionConfig.parse("unfused")  # as policies say
    elif config.variant != "unfused":
        config = dataclasses.replace(config, launch_pdl=gpu_of(torch.device(device)).pdl)
    x, weight = outliers(m, k, dtype=dtype, device=device), (torch.randn(n, k) / k**0.5).to(dtype).to(device)
    bias = torch.randn(n).to(dtype).to(device) if case.parts else None
    stream = (10 * torch.randn(m, n)).to(dtype).to(device)
    truth = stream.double().cpu() + x.double().cpu() @ weight.double().cpu().T
    truth = truth if bias is None else truth + bias.double().cpu()
    same_dtype = stream + F.linear(x, weight, bias)
    y = linear_residual(in_nan(x, 13), in_nan(weight, 13), stream, bias=bias, config=config)
    assert y.data_ptr() == stream.data_ptr()
    judge(y, truth, same_dtype)


@pytest.mark.interpret
@pytest.mark.parametrize("config", ["gemv/4/64/1", "tile/16/16/32/2/2"])
def test_a_stream_with_gaps_is_not_added_to(config: str) -> None:
    """The rows of the result stand one behind the other: in a wider buffer they would overwrite their neighbours."""
    x, weight, wide = torch.randn(3, 64), torch.randn(8, 64), torch.randn(3, 16)
    with pytest.raises(ValueError, match="residual must be contiguous"):
        linear_residual(x, weight, wide[:, :8], config=FusionConfig.parse(config))
    expected = wide[:1, :8] + x[:1] @ weight.T  # a lone row has no gaps
    linear_residual(x[:1], weight, wide[:1, :8], config=FusionConfig.parse(config))
    torch.testing.assert_close(wide[:1, :8], expected)


@pytest.mark.interpret
@pytest.mark.parametrize("config", ["gemv/4/64/1", "panel/8/16/64/2", "tile/16/16/32/2/2", "pair/16/16/32/2/2"])
def test_rows_more_than_two_billion_elements_apart(config: str, tmp_path: Path) -> None:
    """The last tokens of a batch of long sequences, in a sparse file; 32 bits would lead in front of them."""
    k, stride, before = 64, 2**29 + 8, 2**31
    buffer = torch.from_file(str(tmp_path / "x"), shared=True, size=before + 4 * stride + k, dtype=F16)
    x = buffer.as_strided((5, k), (stride, 1), before)
    x.copy_(torch.randn(5, k))
    given = arguments(Case((5,), 16, k, "gamma", config), F16, "cpu")
    weight, gamma = given.positional[1:3]
    y = rms_norm_linear(x, weight, gamma, EPS, config=FusionConfig.parse(config))
    operands = x.clone(), weight, gamma, None, None, False
    judge(y, truth_of(*operands), torch_of(*operands))


@pytest.mark.interpret
@pytest.mark.parametrize("weights_ready", [False, True])
def test_only_a_promise_lets_the_policy_launch_dependents(weights_ready: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public call and `why_not` ask the policy the same question; nobody promises unless told to."""
    asked: list[bool] = []

    def choose(problem: Problem, device: str, gpu: Gpu, *, dependent: bool = False) -> FusionConfig:
        asked.append(dependent)
        return FusionConfig.parse("pair/16/16/32/4/2")

    monkeypatch.setattr(rms_norm_linear_fusion, "choose", choose)
    given = arguments(Case((5,), 20, 64, ALL), F32, "cpu")
    named = {"bias": given.named["bias"], "residual": given.named["residual"]}
    promise = {"weights_ready": True} if weights_ready else {}
    y = rms_norm_linear(*given.positional, **named, **promise)
    judge(y, given.truth, given.same_dtype)
    assert why_not(*given.positional, **named, **promise) == []
    assert asked == [weights_ready] * 2


def test_no_backward() -> None:
    y = rms_norm_linear(torch.ones(2, 8), torch.ones(4, 8, requires_grad=True), None, EPS)
    with pytest.raises(NotImplementedError, match="no backward"):
        y.sum().backward()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", [Case((2, 3), 16, 64, ALL + " swiglu"), Case((0,), 16, 64, "gamma")], ids=str)
@pytest.mark.parametrize("weights_ready", [False, True])
def test_opcheck(device: str, case: Case, weights_ready: bool) -> None:
    given = arguments(case, F32, device)
    named = {**given.named, "config": None, "weights_ready": weights_ready}
    torch.library.opcheck(torch.ops.nanovllm.rms_norm_linear.default, (*given.positional, *named.values()))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("weights_ready", [False, True])
def test_torch_compile_takes_it_whole(device: str, weights_ready: bool) -> None:
    given = arguments(Case((2,), 16, 64, ALL), F32, device)

    def around(x: torch.Tensor) -> torch.Tensor:
        return 2 * rms_norm_linear(x, *given.positional[1:], **given.named, weights_ready=weights_ready)

    compiled = torch.compile(around, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(given.positional[0]), around(given.positional[0]), rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------- one GPU

VARIANTS = [
    Case((1,), 4096, 1024, "gamma"),
    Case((4,), 3072, 2560, "gamma swiglu bias residual"),
    Case((16,), 3072, 1024, "gamma swiglu residual"),
    Case((64,), 1024, 2048, "gamma", "tile/64/64/64/4/3"),
    Case((48,), 1001, 2048, ALL, "pair/64/64/128/4/4"),
    Case((32,), 4096, 1024, "gamma", "pair/32/64/128/4/4/pdl"),
    Case((64,), 3072, 1024, "gamma swiglu", "pair/64/32/128/4/4/pdl"),
    Case((200,), 1024, 1024, ALL),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_a_cuda_graph_repeats_the_eager_call_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    if dtype == F32:  # the policy never takes tiles for float32
        case = case._replace(config=None)
    given = arguments(case, dtype, "cuda")
    eager = check(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rms_norm_linear(*given.positional, **given.named)
    for _ in range(3):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, eager)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [
        "gemv/8/256/4",
        "panel/8/16/1024/8",
        "tile/16/32/128/4/4",
        "tile/64/32/128/4/3",
        "tile/64/16/256/4/4",
        "pair/16/64/128/4/4",
    ],
)
def test_programmatic_dependent_launch_changes_no_bit(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain in which every kernel reads what the one before wrote, and overwrites what that one read."""
    monkeypatch.undo()  # a fresh tensor that is poisoned puts a kernel between two of ours, behind which all waits
    weights = [(torch.randn(1024, 1024) / 32).to(BF16).cuda() for _ in range(20)]
    start = torch.randn(4, 1024).to(BF16).cuda()

    def chain(config: FusionConfig) -> torch.Tensor:
        x = start
        for weight in weights:
            x = rms_norm_linear(x, weight, None, EPS, residual=x, config=config)
        return x

    plain = chain(FusionConfig.parse(config))
    for _ in range(5):
        assert torch.equal(chain(FusionConfig.parse(config + "/pdl")), plain)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, 16, 17, 32, 64, 65])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_a_promise_changes_the_launch_and_nothing_else(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the policy takes for dependents is as exact, a row of them as well as one; a given config wins."""
    given = arguments(Case((rows,), 3072, 1024, ALL + " swiglu"), dtype, "cuda")
    check(given)
    monkeypatch.undo()
    promised = [rms_norm_linear(*given.positional, **given.named, weights_ready=True) for _ in range(20)]
    for y in promised:
        judge(y, given.truth, given.same_dtype)
        assert torch.equal(y, promised[0])
    named = {**given.named, "config": FusionConfig.parse("pair/64/64/64/4/3")}
    plain = rms_norm_linear(*given.positional, **named)
    assert torch.equal(rms_norm_linear(*given.positional, **named, weights_ready=True), plain)


# What a kernel reads too early shows where the kernel in front lets it start and is slow to write itself.
WRITER = FusionConfig.parse("tile/64/64/64/4/3")
LONG = 8192  # columns that the writer adds up: some 30 us in which its dependents wait


def write_slowly(target: torch.Tensor, row: torch.Tensor, parts: torch.Tensor) -> None:
    """Fill `target` [M, N] with the one value of `row` by a kernel whose dependents start long before it has done so.

    row: [1, LONG] of that value; parts: [1, LONG] of 1 / LONG.
    """
    m, n = target.shape
    config = dataclasses.replace(WRITER, launch_pdl=gpu_of(target.device).pdl)
    operands = row.expand(m, LONG), parts.expand(n, LONG), None, 0.0, None, None
    rms_norm_linear_fusion.launch(Problem(m, n, LONG), config, *operands, norm=False, out=target)


PROMISED = [
    (1, None), (4, None), (16, None), (32, None), (64, None), (1, "gemv/8/128/4/pdl"), (2, "gemv/4/128/4/late"),
    (4, "panel/8/16/128/4/pdl"), (16, "panel/16/16/128/4/late"), (16, "tile/16/64/64/4/2/pdl"),
    (64, "tile/64/32/64/4/2/pdl"), (64, "tile/64/16/128/4/4/pdl"), (32, "pair/32/64/64/4/2/pdl"),
]  # fmt: skip
UNPROMISED = [(m, c.removesuffix("/pdl").removesuffix("/late") if c else None) for m, c in PROMISED] + [(64, "unfused")]


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(
    ("rows", "config", "ready"), [(*p, True) for p in PROMISED] + [(*p, False) for p in UNPROMISED]
)
def test_what_the_kernel_in_front_writes_is_read(
    rows: int, config: str | None, ready: bool, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x and the residual always; without a promise weight, gamma and bias as well. Each in turn is written last."""
    monkeypatch.undo()
    shapes = {"x": (rows, 128), "residual": (rows, 2048), "weight": (2048, 128), "gamma": (1, 128), "bias": (1, 2048)}
    made = {name: torch.ones(shape, dtype=BF16, device="cuda") for name, shape in shapes.items()}
    x, residual, weight, gamma, bias = made.values()
    row, parts = (torch.full((1, LONG), value, dtype=BF16, device="cuda") for value in (1.0, 1 / LONG))
    chosen = FusionConfig.parse(config) if config else None
    written = ["x", "residual"] if ready else list(made)

    def step() -> list[torch.Tensor]:
        results = []
        for last in written:
            for name in written:
                made[name].fill_(float("nan"))
            for name in written:
                if name != last:
                    made[name].copy_(row[0, 0])
            write_slowly(made[last], row, parts)
            y = rms_norm_linear(
                x, weight, gamma[0], 0.0, bias=bias[0], residual=residual, config=chosen, weights_ready=ready
            )
            results.append(y)
        return results

    results, graph = step(), torch.cuda.CUDAGraph()
    if captured:
        with torch.cuda.graph(graph):
            results = step()
    for turn in range(20):
        i = (-1) ** turn
        row.fill_(i)
        if captured:
            graph.replay()
        else:
            results = step()
        expected = 128 * i + 1 + i if ready else 130 * i  # K products, the bias, the residual: bfloat16 holds them
        assert [name for name, y in zip(written, results, strict=True) if not bool((y == expected).all())] == [], turn


@pytest.mark.gpu
@pytest.mark.parametrize("config", ["gemv/8/256/8", "panel/8/16/512/8", "tile/16/32/128/4/4"])
def test_weights_beyond_two_billion_elements(config: str) -> None:
    rows, width = 140_000, 16384
    weight = torch.zeros(rows, width, dtype=BF16, device="cuda")
    weight[-1, -1] = 1
    x = torch.ones(1, width, dtype=BF16, device="cuda")
    y = rms_norm_linear(x, weight, None, 0.0, config=FusionConfig.parse(config))
    assert y[0, -1].item() == 1
    assert y.abs().sum().item() == 1


@pytest.mark.gpu
def test_every_row_of_the_tuned_table() -> None:
    """On a GPU without a table: what the heuristic says for the same kind of problem.

    Weights repeat after 1,024 rows: of many fewer results, the largest error of two roundings differs by chance.
    """
    rows = load_table(TABLES / table_name(torch.cuda.get_device_name()))
    problems = [row.problem for row in rows] or [Problem(m, 3072, 2048, "bfloat16", True) for m in (1, 4, 16)]
    for problem in problems:
        case = Case((problem.m,), problem.n, problem.k, "gamma swiglu" if problem.swiglu else "gamma")
        x, weight, gamma, _ = arguments(case._replace(n=1024), getattr(torch, problem.dtype), "cuda").positional
        operands = (x, weight.repeat(problem.n // 1024 + 1, 1)[: problem.weight_rows].contiguous(), gamma)
        activation = "swiglu" if problem.swiglu else None
        y = rms_norm_linear(*operands, EPS, activation=activation)
        truth = reference.rms_norm_linear(*(t.double() for t in operands), EPS, activation=activation)
        judge(y, truth.cpu(), torch_of(*operands, None, None, problem.swiglu))
