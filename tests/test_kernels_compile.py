"""Every kernel compiles to machine code for GPUs that are not here, as its public function launches it.

The interpreter runs Python: it does not see a variable that changes its type in a loop, or tiles that do not fit into
shared memory. Triton's compiler needs no GPU; only the launch is replaced, so wrong launch arguments show as well.
"""

from __future__ import annotations

import dataclasses
import os
from types import ModuleType
from typing import Any

import pytest
import torch

from nanovllm.kernels import (
    activation,
    decode_attention,
    feed,
    fetch,
    jit,
    kv_cache,
    linear_residual,
    norm,
    prefill_attention,
    rms_norm_linear_fusion,
    rms_norm_linear_kernels,
    rope,
    rope_attention,
    sample,
    sample_cut,
    split_plan,
)
from nanovllm.kernels.chain_config import linear_config
from nanovllm.kernels.fusion_config import FusionConfig, Problem
from nanovllm.kernels.launch_config import H100, Gpu, rope_attention_config

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")

CONSUMER = Gpu(num_sms=82, shared_memory=99 * 1024)
DEPENDENT = Gpu(num_sms=132, shared_memory=227 * 1024, pdl=True)
BLACKWELL = Gpu(num_sms=170, shared_memory=99 * 1024, pdl=True)  # consumers': dependents, and little shared memory
TARGETS = {"h100": (H100, 90), "consumer": (CONSUMER, 86), "dependent": (DEPENDENT, 90), "blackwell": (BLACKWELL, 120)}
# What sampling reads the kernel before it has written, and between steps the stream orders everything.
SAMPLING = {"_summary_kernel", "_threshold_kernel", "_chunk_kernel", "_pick_kernel"}
FIRST_OF_A_STEP, LAST_OF_A_STEP = {"_embed_kernel"}, {"_pick_kernel"}
F32, BF16 = torch.float32, torch.bfloat16
TYPES = {F32: "*fp32", BF16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64"}


class CompileOnly:
    """Stands in for a kernel: `kernel[grid](...)` compiles for `target` what would have been launched."""

    def __init__(self, kernel: Any, gpu: Gpu, capability: int, compiled: list[str]) -> None:
        self.kernel, self.gpu, self.compiled = kernel, gpu, compiled
        self.target = triton.backends.compiler.GPUTarget("cuda", capability, 32)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(isinstance(size, int) and size > 0 for size in grid)
        return self.compile

    def compile(
        self,
        *args: Any,
        num_warps: int = 4,
        num_stages: int = 3,
        launch_pdl: bool = False,
        maxnreg: int | None = None,
        **constants: Any,
    ) -> None:
        name = self.kernel.__name__
        pdl = constants.get("PDL", False) and name not in FIRST_OF_A_STEP
        assert launch_pdl == pdl, "a kernel that waits must be launched as a dependent"
        names = self.kernel.arg_names
        values = {**dict(zip(names, args, strict=False)), **constants}
        assert len(args) + len(constants) == len(names), "every parameter is given once"
        assert set(values) == set(names)
        constant = {name: value for name, value in values.items() if name in constants or value is None}
        signature = {name: "constexpr" if name in constant else self.describe(values[name]) for name in names}
        wide = [[["tt.divisibility", 16]] if self.is_aligned(name, values[name]) else None for name in names]
        attrs = {(i,): spec for i, spec in enumerate(wide) if spec and names[i] not in constant}
        source = triton.compiler.ASTSource(self.kernel, signature, constant, attrs)
        options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
        binary = triton.compile(source, target=self.target, options=options)
        assert binary.metadata.shared <= self.gpu.shared_memory
        before, wait, behind = binary.asm["ptx"].partition("griddepcontrol.wait")
        triggers = constants.get("TRIGGER", launch_pdl and name not in LAST_OF_A_STEP)
        if "TRIGGER" in constants or launch_pdl:
            assert ("griddepcontrol.launch_dependents" in binary.asm["ptx"]) == triggers
        if launch_pdl:  # what may be read early is asked for before the wait, and all of the rest behind it
            assert wait and "st.global" in behind and "st.global" not in before
            early = name not in SAMPLING and values.get("weight", 0) is not None  # without gamma a norm has nothing
            early = early and values.get("PREFETCH") != 0  # the tile of a pair that is no dependent
            assert ("ld.global" in before or "prefetch" in before) == early
        if launch_pdl and name == "tile_kernel":  # x would be read by what its loop pipelines
            assert "ld.global" not in before and "cp.async.c" not in before
        self.compiled.append(name)
        self.pdl, self.ptx, self.maxnreg = launch_pdl, binary.asm["ptx"], maxnreg  # of the last launch

    @staticmethod
    def describe(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return TYPES[value.dtype]
        return "fp32" if isinstance(value, float) else "i32"

    @staticmethod
    def is_aligned(name: str, value: Any) -> bool:
        return isinstance(value, torch.Tensor) or (name.endswith("stride") and value % 16 == 0)


@pytest.fixture
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was compiled; public functions take the Triton path on CPU tensors, up to the launch."""
    gpu, capability = TARGETS[request.param]
    names: list[str] = []
    modules: list[ModuleType] = [activation, decode_attention, kv_cache, norm, prefill_attention, rope]
    modules += [
        linear_residual,
        rms_norm_linear_fusion,
        rms_norm_linear_kernels,
        rope_attention,
        split_plan,
        feed,
        fetch,
        sample,
        sample_cut,
    ]
    for module in modules:
        if hasattr(module, "use_triton"):
            monkeypatch.setattr(module, "use_triton", lambda x: True)
        if hasattr(module, "gpu_of"):
            monkeypatch.setattr(module, "gpu_of", lambda device: gpu)
        if hasattr(module, "num_sms"):
            monkeypatch.setattr(module, "num_sms", lambda device: gpu.num_sms)
        jit._materialise(vars(module))
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, CompileOnly(getattr(module, name), gpu, capability, names))
    return names


h100 = pytest.mark.parametrize("compiled", ["h100"], indirect=True)


@h100
def test_row_kernels(compiled: list[str]) -> None:
    x, weight = torch.zeros(4, 2048, dtype=BF16), torch.ones(2048, dtype=BF16)
    norm.rms_norm(x, weight, 1e-6)
    norm.rms_norm(x, None, 1e-6)
    norm.add_rms_norm(x, x, weight, 1e-6)
    activation.silu_mul(x)
    activation.rms_silu_mul(x, x, 1e-6, weight)
    assert compiled == 3 * ["_rms_norm_kernel"] + ["_silu_mul_kernel", "_rms_silu_mul_kernel"]


@pytest.mark.parametrize("compiled", ["dependent", "consumer"], indirect=True)
def test_ends_of_a_step(compiled: list[str]) -> None:
    """Inputs from the host's memory, rows of the embedding; sampling, with the tokens sent to the host's memory."""
    ids, vocab, rows = torch.zeros(4, dtype=torch.int64), 151936, 4
    turn, table = torch.zeros(2, dtype=torch.int64), torch.zeros(2, rows, 640, dtype=torch.int32)
    source = torch.zeros(2, 3, rows, dtype=torch.int64), table[:, :, 0].contiguous(), table
    fetch.fetch_step_(turn, source, tuple(part[0] for part in source), rows, 640)
    feed.embed_fed(ids, ids, torch.zeros(vocab, 8, dtype=BF16))
    floats, logits = torch.zeros(rows), torch.zeros(rows, vocab, dtype=BF16)
    params = sample_cut.RowParams(floats, ids, ids, ids, floats, floats)
    sink = sample.TokenSink(ids, torch.zeros(2, rows, dtype=torch.int64), turn)
    sample_cut.sample_rows(logits, params, sink=sink)
    names = ["fetch", "embed", "summary", "threshold", "chunk", "pick"]
    assert compiled == [f"_{name}_kernel" for name in names]


@h100
@pytest.mark.parametrize("with_norm", [True, False])
def test_rope_and_store(compiled: list[str], with_norm: bool) -> None:
    cache, ints = torch.zeros(2, 8, 32, 128, dtype=BF16), torch.zeros(4, dtype=torch.int64)
    weight = torch.ones(128, dtype=BF16) if with_norm else None
    qkv = torch.zeros(4, 32 * 128, dtype=BF16)
    rope.qk_norm_rope_store(qkv, weight, weight, 1e-6, torch.zeros(8, 128), ints, cache, cache, ints)
    kv_cache.store_kv(torch.zeros(4, 8, 128, dtype=BF16), torch.zeros(4, 8, 128, dtype=BF16), cache, cache, ints)
    assert compiled == ["_qk_norm_rope_store_kernel", "_store_kv_kernel"]


# (dtype, q_heads, kv_heads, head_dim, page, window, sequences)
ATTENTION = [
    ("h100", (BF16, 16, 8, 128, 32, None, 1)),
    ("consumer", (BF16, 16, 8, 128, 32, None, 1)),
    ("h100", (BF16, 9, 3, 64, 64, 100, 300)),
    ("consumer", (BF16, 8, 2, 256, 32, None, 300)),
    ("h100", (F32, 4, 2, 80, 32, None, 2)),
    ("h100", (BF16, 16, 8, 128, 32, 1000, 3)),
]


@pytest.mark.parametrize(("compiled", "case"), ATTENTION, indirect=["compiled"])
def test_attention(compiled: list[str], case: tuple) -> None:
    dtype, q_heads, kv_heads, dim, page, window, sequences = case
    cache = torch.zeros(2, kv_heads, page, dim, dtype=dtype)
    table, lengths = (torch.zeros(shape, dtype=torch.int32) for shape in ((sequences, 5), (sequences,)))
    q = torch.zeros(sequences, q_heads, dim, dtype=dtype)
    decode_attention.decode_attention(q, cache, cache, table, lengths, 0.1, window, 4096)
    assert compiled in (["_decode_kernel"], ["_plan_kernel"] * (sequences > 1) + ["_decode_kernel", "_merge_kernel"])
    start = torch.zeros(sequences + 1, dtype=torch.int32)
    for tokens in (40, 3000):
        q = torch.zeros(tokens, q_heads, dim, dtype=dtype)
        prefill_attention.prefill_attention(q, cache, cache, table, start, lengths, tokens, 0.1, window)
    assert compiled[-2:] == ["_prefill_kernel", "_prefill_kernel"]


@pytest.mark.parametrize(
    ("compiled", "rows", "kernels"),
    [
        ("dependent", 1, ["gemv_kernel"]),
        ("dependent", 4, ["panel_kernel"]),
        ("dependent", 16, ["panel_kernel"]),
        ("consumer", 1, ["gemv_kernel"]),
        ("consumer", 16, ["panel_kernel"]),
        ("blackwell", 16, ["panel_kernel"]),
    ],
    indirect=["compiled"],
)
def test_linears_of_the_decode_chain(
    compiled: list[str], request: pytest.FixtureRequest, rows: int, kernels: list[str]
) -> None:
    """QKV, gate_up with SwiGLU and the output projection of Qwen3-0.6B, in the configurations of the policy."""
    gpu = TARGETS[request.node.callspec.params["compiled"]][0]
    for n, k, swiglu in ((4096, 1024, False), (3072, 1024, True)):
        problem = Problem(rows, n, k, "bfloat16", swiglu)
        x, weight = torch.zeros(rows, k, dtype=BF16), torch.zeros(problem.weight_rows, k, dtype=BF16)
        gamma = torch.ones(k, dtype=BF16)
        rms_norm_linear_fusion.launch(problem, linear_config(problem, gpu), x, weight, gamma, 1e-6, None, None)
    x, weight = torch.zeros(rows, 2048, dtype=BF16), torch.zeros(1024, 2048, dtype=BF16)
    config = linear_config(Problem(rows, 1024, 2048), gpu)
    linear_residual.linear_residual(x, weight, torch.zeros(rows, 1024, dtype=BF16), config=config)
    assert len(compiled) == 3 and set(compiled) <= set(kernels)
    # A row that a warp cannot hold as a whole: a window of it.
    x, weight = torch.zeros(rows, 8192, dtype=BF16), torch.zeros(2048, 8192, dtype=BF16)
    config = linear_config(Problem(rows, 2048, 8192), gpu)
    linear_residual.linear_residual(x, weight, torch.zeros(rows, 2048, dtype=BF16), config=config)
    assert len(compiled) == 4


@pytest.mark.parametrize("compiled", ["dependent", "consumer", "blackwell"], indirect=True)
def test_only_bfloat16_is_unpacked_by_hand(compiled: list[str]) -> None:
    """Two at a time; also where a warp takes 32 columns, of which a thread has one."""
    for dtype, by_hand in ((BF16, True), (torch.float16, False), (F32, False)):
        for k, config in ((1024, "gemv/32/256/8"), (33, "gemv/4/32/4")):
            problem = Problem(1, 4096, k, str(dtype).removeprefix("torch."))
            x, weight = torch.zeros(1, k, dtype=dtype), torch.zeros(4096, k, dtype=dtype)
            rms_norm_linear_fusion.launch(problem, FusionConfig.parse(config), x, weight, x[0], 1e-6, None, None)
            ptx = rms_norm_linear_kernels.gemv_kernel.ptx
            assert ("0xffff0000" in ptx) == by_hand
            assert "cvt.f32.bf16" not in ptx, "all of it, x and gamma as well"
    assert compiled == 6 * ["gemv_kernel"]


@pytest.mark.parametrize("compiled", ["dependent", "blackwell"], indirect=True)
@pytest.mark.parametrize("rows", [17, 33, 64])
@pytest.mark.parametrize("pdl", [True, False])
def test_pairs(compiled: list[str], request: pytest.FixtureRequest, rows: int, pdl: bool) -> None:
    """A norm that lets its tile start, itself a dependent or not, with and without gamma; and the tile alone."""
    gpu = TARGETS[request.node.callspec.params["compiled"]][0]
    for n, k, swiglu in ((4096, 1024, False), (3072, 1024, True)):
        problem = Problem(rows, n, k, "bfloat16", swiglu)
        config = dataclasses.replace(linear_config(problem, gpu), launch_pdl=pdl)
        assert config.variant == "pair"
        x, weight = torch.zeros(rows, k, dtype=BF16), torch.zeros(problem.weight_rows, k, dtype=BF16)
        for gamma in (torch.ones(k, dtype=BF16), None):
            compiled.clear()
            rms_norm_linear_fusion.launch(problem, config, x, weight, gamma, 1e-6, None, None)
            assert compiled == ["_rms_norm_kernel", "tile_kernel"]
            assert (norm._rms_norm_kernel.pdl, rms_norm_linear_kernels.tile_kernel.pdl) == (pdl, True)
    compiled.clear()
    linear_residual.linear_residual(x, weight[:1024], torch.zeros(rows, 1024, dtype=BF16), config=config)
    assert compiled == ["tile_kernel"] and rms_norm_linear_kernels.tile_kernel.pdl == pdl
    compiled.clear()
    config = linear_config(Problem(rows, 1024, 1024), gpu, norm=False)  # back to the stream: narrow tiles of their own
    linear_residual.linear_residual(x, weight[:1024], torch.zeros(rows, 1024, dtype=BF16), config=config)
    assert (config.variant, config.block_n, compiled) == ("tile", 16, ["tile_kernel"])


@pytest.mark.parametrize("compiled", ["h100", "consumer", "dependent"], indirect=True)
@pytest.mark.parametrize("text", ["tile/64/32/64/4/3", "tile/64/16/128/4/2", "pair/64/32/64/4/3"])
def test_tiles_with_x_on_the_left(compiled: list[str], request: pytest.FixtureRequest, text: str) -> None:
    """With and without the norm inside, and in a dtype that scales first; a pair's is a dependent where the GPU can."""
    for dtype, swiglu in ((BF16, True), (torch.float16, False)):
        problem = Problem(64, 1001, 1000, str(dtype).removeprefix("torch."), swiglu)
        x, weight = torch.zeros(64, 1000, dtype=dtype), torch.zeros(problem.weight_rows, 1000, dtype=dtype)
        rms_norm_linear_fusion.launch(problem, FusionConfig.parse(text), x, weight, x[0], 1e-6, weight[:, 0], None)
    assert compiled == (["tile_kernel"] if "tile" in text else ["_rms_norm_kernel", "tile_kernel"]) * 2
    target, tile = request.node.callspec.params["compiled"], rms_norm_linear_kernels.tile_kernel
    assert tile.pdl == ("pair" in text and target == "dependent")
    assert ("wgmma.mma" in tile.ptx) == (target != "consumer"), "Hopper's instruction takes 64 rows on its left"


# (q_heads, kv_heads, head_dim, page, window, sequences, longest context), and whether tiles are pipelined
CHAIN_ATTENTION = [
    ("dependent", (16, 8, 128, 32, None, 1, 40960), False),
    ("dependent", (16, 8, 128, 32, None, 8, 512), False),
    ("dependent", (16, 8, 128, 32, None, 4, 4096), False),
    ("dependent", (32, 1, 128, 32, None, 12, 4096), False),
    ("dependent", (16, 8, 128, 32, 1000, 4, 4096), False),
    ("dependent", (16, 8, 128, 32, 20000, 16, 40960), True),
    ("dependent", (16, 8, 128, 256, None, 8, 4096), True),
    ("dependent", (32, 8, 64, 64, 300, 16, 4096), False),
    ("dependent", (32, 8, 64, 64, 1000, 16, 4096), True),
    ("dependent", (16, 8, 128, 32, None, 32, 512), True),
    ("dependent", (16, 8, 128, 32, None, 64, 4096), True),
    ("consumer", (14, 2, 64, 32, None, 3, 4096), False),
    ("consumer", (32, 8, 128, 32, None, 10, 40960), True),
    ("consumer", (32, 8, 128, 32, None, 16, 512), True),
    ("blackwell", (16, 8, 128, 32, None, 1, 40960), False),
    ("blackwell", (16, 8, 128, 32, None, 64, 4096), True),
]


@pytest.mark.parametrize(("compiled", "case", "pipelined"), CHAIN_ATTENTION, indirect=["compiled"])
@pytest.mark.parametrize("with_norm", [True, False])
def test_attention_of_the_decode_chain(
    compiled: list[str], request: pytest.FixtureRequest, case: tuple, pipelined: bool, with_norm: bool
) -> None:
    """Both forms fit, ask for old keys before the wait and store nothing before it."""
    gpu = TARGETS[request.node.callspec.params["compiled"]][0]
    q_heads, kv_heads, dim, page, window, sequences, longest = case
    cache = torch.zeros(2, kv_heads, page, dim, dtype=BF16)
    table, lengths = (torch.zeros(shape, dtype=torch.int32) for shape in ((sequences, 5), (sequences,)))
    qkv, weight = torch.zeros(sequences, (q_heads + 2 * kv_heads) * dim, dtype=BF16), torch.ones(dim, dtype=BF16)
    norm_weight = weight if with_norm else None
    angles = torch.zeros(8, dim)
    plan = rope_attention.plan_rope_attention(cache, lengths, longest, window)
    rope_attention.rope_attention(
        qkv, norm_weight, norm_weight, 1e-6, angles, cache, cache, table, lengths, 0.1, window, longest, plan=plan
    )
    keys = split_plan.longest_span(longest, window, page)
    config = rope_attention_config(sequences, kv_heads, dim, 2, keys, gpu)
    split = config.slots(sequences) > sequences
    assert (
        compiled
        == ["_plan_kernel"] * (split and sequences > 1) + ["_rope_attention_kernel"] + ["_merge_kernel"] * split
    )
    assert (config.num_stages > 1) == pipelined
    kernel = rope_attention._rope_attention_kernel
    assert kernel.maxnreg == (config.max_registers if q_heads <= 16 * kv_heads else None), "wide groups would spill"
    assert (".maxnreg 128" in kernel.ptx) == (kernel.maxnreg == 128)
