"""Top-k, top-p and min-p as a threshold: the PyTorch body and the Triton kernels against a sort in float64."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_kernels_compile import CONSUMER, CompileOnly

from nanovllm.kernels import jit, sample_cut, sample_reference
from nanovllm.kernels import sample as sample_module
from nanovllm.kernels.launch_config import H100
from nanovllm.kernels.sample import sample
from nanovllm.kernels.sample_cut import CutWorkspace, RowParams, cut_threshold, sample_rows

interpret, gpu = pytest.mark.interpret, pytest.mark.gpu
all_devices = pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cpu", marks=interpret, id="interpret"), pytest.param("cuda", marks=gpu, id="gpu")],
)
kernel_devices = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpret, id="interpret"), pytest.param("cuda", marks=gpu, id="gpu")]
)

# How far a float32 sum of shares may lie from the true one, relative to it: an exponent d is rounded twice, which moves
# the share by d * 2**-23, and its exponential by 2**-22; the mean of d under the softmax is at most log(V) = 12.5.
SHARE = 2e-6
Rule = tuple[float, int, float, float]  # temperature, top_k, top_p, min_p

RULES: list[Rule] = [
    (0.8, 1, 1.0, 0.0),
    (0.8, 7, 1.0, 0.0),
    (1.0, 50, 1.0, 0.0),
    (1.3, 1500, 1.0, 0.0),
    (1.0, 10**6, 1.0, 0.0),
    (1.0, 0, 0.001, 0.0),
    (0.5, 0, 0.5, 0.0),
    (1.0, 0, 0.95, 0.0),
    (1.7, 0, 0.9999, 0.0),
    (1.0, 0, 1.0, 0.05),
    (1.0, 0, 1.0, 1.0),
    (0.7, 20, 0.8, 0.0),
    (1.0, 50, 0.95, 0.02),
    (1.0, 5000, 0.9, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.0, 5, 0.5, 0.5),
]


@pytest.fixture(autouse=True)
def _one_thread(poisoned_memory: None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def smallest_kept(values: np.ndarray, rule: Rule, slack: float) -> float:
    """The smallest logit that top-p of p - slack and min-p of (1 + slack) times the limit keep, by sorting in float64.

    values: float64 [V] without NaN, in which no logit is infinite or the largest one is -inf.
    """
    heat, k, p, floor = rule
    order = np.sort(values)[::-1]
    if heat == 0 or order[0] == -np.inf:
        return float(order[-1])
    kept = order[order >= order[k - 1]] if 0 < k < len(order) else order
    shares = np.exp((kept - order[0]) / heat)
    if p < 1.0 and p - slack < 1.0:
        below = np.cumsum(shares) - shares < (p - slack) * shares.sum()
        kept = kept[kept >= kept[max(int(below.sum()) - 1, 0)]]
    if floor > 0.0:
        kept = kept[(np.exp((kept - order[0]) / heat) >= floor * (1 + 10 * slack)) | (kept == order[0])]
    return float(kept[-1])


def assert_cut(threshold: torch.Tensor, logits: torch.Tensor, rules: list[Rule]) -> None:
    """What `threshold` [R] keeps of `logits` [R, V] is what the sort keeps, up to the rounding of shares."""
    assert threshold.dtype == torch.float32
    for row, rule in enumerate(rules):
        values = logits[row].double().numpy()
        values = np.where(np.isnan(values), -np.inf, values)
        got = float(values[values >= threshold[row].item()].min())
        low, high = smallest_kept(values, rule, -SHARE), smallest_kept(values, rule, SHARE)
        assert low <= got <= high, (row, rule, low, got, high)
        if rule[2] >= 1.0 and rule[3] == 0.0:  # top-k has nothing to round
            assert low == high


def tensors(rules: list[Rule], device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """temperature, top_k, top_p, min_p."""
    columns = list(zip(*rules, strict=True))
    types = (torch.float32, torch.int32, torch.float32, torch.float32)
    return tuple(torch.tensor(c, dtype=t, device=device) for c, t in zip(columns, types, strict=True))


def as_stored(rules: list[Rule]) -> list[Rule]:
    """Rules with the numbers that float32 holds."""
    return [(float(np.float32(h)), k, float(np.float32(p)), float(np.float32(m))) for h, k, p, m in rules]


def check(logits: torch.Tensor, rules: list[Rule], device: str) -> torch.Tensor:
    threshold = cut_threshold(logits.to(device), *tensors(rules, device)).cpu()
    assert_cut(threshold, logits, as_stored(rules))
    return threshold


# ------------------------------------------------------------------------------------------------------------- any case

ODD = st.sampled_from([-math.inf, math.nan, 0.0, -0.0, 1.0, 1.0, -1.0, 3.0, 1e-30, -1e30])
LOGITS = st.lists(st.one_of(ODD, st.floats(-12, 12, width=16)), min_size=1, max_size=90)
RULE = st.tuples(
    st.sampled_from([0.0, 1e-5, 0.3, 1.0, 1.0, 5.0]),
    st.sampled_from([0, 0, 1, 2, 5, 30, 89, 1000]),
    st.one_of(st.sampled_from([1.0, 1.0, 0.5, 1 - 1e-6, 1e-30]), st.floats(0.01, 1.0)),
    st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
)


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups and lists so small that a hundred logits need every step of the search."""
    monkeypatch.setattr(sample_cut, "GROUP", 4)
    monkeypatch.setattr(sample_cut, "CAPACITY", 8)


@all_devices
@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(values=LOGITS, rules=st.lists(RULE, min_size=3, max_size=3))
@example(values=[1.0] * 60, rules=[(1.0, 3, 1.0, 0.0), (1.0, 0, 0.5, 0.0), (1.0, 2, 0.9, 0.1)])  # all are kept
@example(values=[0.0, -0.0] * 20 + [-1.0] * 20, rules=[(1.0, 3, 0.5, 0.0), (1.0, 50, 1.0, 0.0), (1.0, 0, 0.9, 0.0)])
@example(values=[-0.0] * 30 + [-1.0] * 30, rules=[(1.0, 3, 1.0, 0.0), (1.0, 40, 1.0, 0.0), (1.0, 3, 0.5, 0.0)])
@example(values=[2.0] + [1.0] * 50 + [-math.inf] * 9, rules=[(1.0, 2, 0.9, 0.0), (1.0, 55, 0.5, 0.0), (1.0, 2, 1, 0.0)])
@example(values=[math.nan] * 20 + [-math.inf] * 3, rules=[(1.0, 3, 0.5, 0.0), (1.0, 0, 0.9, 0.5), (1.0, 0, 1, 0.5)])
def test_any_logits_and_rules(
    device: str, values: list[float], rules: list[Rule], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.tensor(values, dtype=torch.float32).expand(3, -1).contiguous()
    with monkeypatch.context() as patch:
        small(patch)
        check(logits, rules, device)
    check(logits[:1], rules[:1], device)


@all_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [0.1, 3.0])  # flat and peaked
def test_rules_at_odd_sizes(device: str, dtype: torch.dtype, scale: float) -> None:
    for vocab in (1, 129, 6001):
        strided = torch.full((len(RULES), vocab + 5), 99.0, dtype=dtype)
        strided[:, :vocab] = (torch.randn(len(RULES), vocab) * scale).to(dtype)
        threshold = cut_threshold(strided.to(device)[:, :vocab], *tensors(RULES, device)).cpu()
        assert_cut(threshold, strided[:, :vocab].float(), as_stored(RULES))
        assert threshold[-2:].tolist() == [-math.inf, -math.inf]  # nothing asked for; greedy


@kernel_devices
def test_long_lists_are_narrowed(device: str) -> None:
    """Nuclei and ranks beyond the list's capacity, and more equal logits than it holds."""
    rules: list[Rule] = [(1.0, 0, 0.9, 0.0), (1.0, 9000, 0.5, 0.0), (1.0, 9000, 1.0, 0.0), (1.0, 300, 0.99, 0.0)]
    rules.append((1.0, 300, 0.6, 0.0))  # 10 > 0.6 * (10 + 4096 * exp(-7)), but not with all 9,900 equal logits
    logits = torch.randn(5, 12000)
    logits[3:, 100:10000] = 3.0
    logits[4, :10] = 10.0
    assert sample_cut.CAPACITY < 9000
    check(logits, rules, device)


@all_devices
def test_share_just_at_the_boundary(device: str) -> None:
    """Sixteen logits of the share 1/16 each: p = 4/16 keeps four where they differ in the last bit, else all."""
    equal = torch.zeros(1, 16)
    steps = torch.arange(16, dtype=torch.float32)[None] * 1e-7  # shares differ by less than a float32 can hold
    for p, kept in ((0.25, 4), (0.2501, 5), (0.2499, 4), (1 / 16, 1)):
        rules: list[Rule] = [(1.0, 0, p, 0.0)]
        assert cut_threshold(equal.to(device), *tensors(rules, device)).item() == 0.0
        count = int((steps >= check(steps, rules, device)[:, None]).sum())
        assert abs(count - kept) <= (1 if p in (0.25, 1 / 16) else 0)


@all_devices
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinite_and_missing_logits_keep_the_largest(device: str, value: float) -> None:
    logits = torch.randn(len(RULES), 700)
    logits[:, 300:320] = value
    logits[: len(RULES) // 2, 320:] = value
    threshold = cut_threshold(logits.to(device), *tensors(RULES, device)).cpu()
    finite = torch.where(logits.isnan(), -math.inf, logits)
    assert not threshold.isnan().any()
    assert (threshold <= finite.amax(dim=-1)).all()
    if value != math.inf:
        assert_cut(threshold, logits, as_stored(RULES))
    else:  # all the share is theirs; only a rank beyond them, or no cut, keeps others
        for row, (heat, k, p, floor) in enumerate(RULES):
            reached = 0 < k <= int((logits[row] == math.inf).sum())
            only = heat > 0 and (p < 1.0 or floor > 0.0 or reached)
            assert (threshold[row] == math.inf) == only


@kernel_devices
@pytest.mark.parametrize("rule", RULES)
def test_a_row_does_not_depend_on_its_company(device: str, rule: Rule) -> None:
    vocab = 50000 if device == "cuda" else 3000
    logits = (torch.randn(9, vocab) * 2).to(device)
    alone = cut_threshold(logits[4:5], *tensors([rule], device))
    others = [*RULES[:4], rule, *RULES[5:9]]
    assert torch.equal(cut_threshold(logits, *tensors(others, device))[4:5], alone)


# ------------------------------------------------------------------------------------------------ sampling and launches


def params_of(rules: list[Rule], device: str, seed: int = 0) -> RowParams:
    heat, k, p, floor = tensors(rules, device)
    count = torch.arange(len(rules), device=device)
    return RowParams(heat, count * 77 + seed, count + 3, k, p, floor)


@all_devices
def test_sample_rows_chooses_among_what_is_kept(device: str) -> None:
    logits = torch.randn(len(RULES), 2000)
    for seed in range(5):
        params = params_of(RULES, device, seed)
        tokens = sample_rows(logits.to(device), params).cpu()
        threshold = sample_reference.cut_threshold(logits, *tensors(RULES))
        left = logits.masked_fill(logits < threshold[:, None], -math.inf)
        cpu = {f.name: getattr(params, f.name).cpu() for f in dataclasses.fields(params)}
        expected = sample_reference.sample(left, cpu["temperature"], cpu["seeds"], cpu["positions"])
        assert torch.equal(tokens, expected)


@all_devices
def test_sample_with_a_threshold(device: str) -> None:
    """The threshold itself is kept, whatever the temperature, and what is below never comes."""
    logits = torch.tensor([[0.0, 2.0, 1.0, 5.0, 2.0, -math.inf, 1.9999]]).repeat(400, 1).to(device)
    seeds, positions = torch.zeros(400, dtype=torch.int64, device=device), torch.arange(400, device=device)
    for heat in (1.5, 6.0):
        threshold = torch.full((400,), 2.0, device=device)
        tokens = sample(logits, torch.full((400,), heat, device=device), seeds, positions, threshold=threshold)
        assert set(tokens.tolist()) == {1, 3, 4}


@all_devices
def test_workspace_serves_fewer_rows(device: str) -> None:
    workspace = CutWorkspace.allocate(20, 1000, torch.device(device))
    logits = torch.randn(len(RULES), 1000).to(device)
    got = cut_threshold(logits, *tensors(RULES, device), workspace=workspace)
    assert torch.equal(got, cut_threshold(logits, *tensors(RULES, device)))


def test_arguments_are_checked() -> None:
    logits, vectors = torch.zeros(3, 40), tensors(RULES[:3])
    with pytest.raises(ValueError, match=r"top_k must have shape \(3,\) to match logits, got \(2,\)"):
        cut_threshold(logits, vectors[0], vectors[1][:2], *vectors[2:])
    assert cut_threshold(logits[:0], *(v[:0] for v in vectors)).shape == (0,)
    with pytest.raises(ValueError, match="limited to 524288 logits a row, got 524289"):
        CutWorkspace.allocate(1, 2**19 + 1, torch.device("cpu"))


@interpret
@pytest.mark.parametrize(("rows", "vocab"), [(2, 40), (3, 400)])
def test_workspace_must_fit(rows: int, vocab: int) -> None:
    workspace = CutWorkspace.allocate(rows, vocab, torch.device("cpu"))
    with pytest.raises(ValueError, match="allocate it for at least 3 rows and 40 logits"):
        cut_threshold(torch.zeros(3, 40), *tensors(RULES[:3]), workspace=workspace)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")
@pytest.mark.parametrize(("device_gpu", "capability"), [(H100, 90), (CONSUMER, 86)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_compile(device_gpu: Any, capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    compiled: list[str] = []
    monkeypatch.setattr(sample_module, "num_sms", lambda device: 132)
    for module in (sample_cut, sample_module):
        monkeypatch.setattr(module, "use_triton", lambda x: True)
        jit._materialise(vars(module))
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, CompileOnly(getattr(module, name), device_gpu, capability, compiled))
    sample_rows(torch.zeros(2, 151936, dtype=dtype), params_of(RULES[:2], "cpu"))
    assert compiled == ["_summary_kernel", "_threshold_kernel", "_chunk_kernel", "_pick_kernel"]


# ------------------------------------------------------------------------------------------------------------------ GPU


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 151936), (17, 151936), (64, 49152), (256, 32000), (3, 262208)])
@pytest.mark.parametrize("scale", [0.3, 3.0, 8.0])
def test_gpu_at_full_size(dtype: torch.dtype, rows: int, vocab: int, scale: float) -> None:
    logits = (torch.randn(rows, vocab, device="cuda") * scale).to(dtype).cpu()
    repeat = -(-len(RULES) // rows)
    for part in range(repeat):  # a few rows must see every rule as well
        rules = [RULES[(part * rows + i) % len(RULES)] for i in range(rows)]
        check(logits, rules, "cuda")


@gpu
def test_gpu_many_processors_agree_with_themselves() -> None:
    """Integer sums: the order in which programs and warps run does not show."""
    logits = torch.randn(64, 151936, device="cuda")
    vectors = tensors([RULES[i % len(RULES)] for i in range(64)], "cuda")
    first = cut_threshold(logits, *vectors)
    for _ in range(20):
        assert torch.equal(cut_threshold(logits, *vectors), first)


@gpu
@pytest.mark.parametrize("rows", [1, 5, 64, 256])
def test_gpu_graph_follows_its_buffers(rows: int) -> None:
    vocab = 50000
    logits = torch.randn(rows, vocab, device="cuda")
    params = params_of([RULES[i % len(RULES)] for i in range(rows)], "cuda")
    workspace = CutWorkspace.allocate(rows, vocab, torch.device("cuda"))
    sample_rows(logits, params, workspace=workspace)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sample_rows(logits, params, workspace=workspace)
    for step in range(1, 8):
        logits.copy_(torch.randn(rows, vocab) * step)
        fresh = params_of([RULES[(i + 3 * step) % len(RULES)] for i in range(rows)], "cuda", step)
        for entry in dataclasses.fields(params):
            getattr(params, entry.name).copy_(getattr(fresh, entry.name))
        graph.replay()
        assert torch.equal(tokens, sample_rows(logits, params))
