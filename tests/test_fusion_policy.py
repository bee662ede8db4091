"""The launch policy of the fused operator as a policy; its tables as data; its configurations through the compiler."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.kernels import fusion_config, fusion_table, jit, rms_norm_linear_fusion, rms_norm_linear_kernels
from nanovllm.kernels.fusion_config import ELEMENT_SIZES, MAX_PAIR_ROWS, UNFUSED, FusionConfig, Problem, heuristic
from nanovllm.kernels.fusion_table import TABLES, TunedRow, choose, load_table, lookup, table_name
from nanovllm.kernels.launch_config import H100, Gpu

HOPPER = dataclasses.replace(H100, pdl=True)
CONSUMER = Gpu(num_sms=82, shared_memory=99 * 1024)
BLACKWELL = dataclasses.replace(CONSUMER, pdl=True)
INTERPRETER = Gpu(num_sms=4, shared_memory=99 * 1024)
WIDTHS = (1, 7, 64, 100, 1024, 2560, 4096, 5120, 12288, 16384)

numbers = st.integers(1, 4096)
configs = st.one_of(
    st.just(UNFUSED),
    st.builds(lambda n, k, w, pdl: FusionConfig("gemv", 0, n, k, w, launch_pdl=pdl), *[numbers] * 3, st.booleans()),
    st.builds(FusionConfig, st.just("panel"), *[numbers] * 4, st.just(1), st.just(True), st.booleans()),
    st.builds(FusionConfig, st.sampled_from(["tile", "pair"]), *[numbers] * 5, st.booleans()),
)


@given(configs)
def test_text_is_a_config_s_other_form(config: FusionConfig) -> None:
    assert FusionConfig.parse(str(config)) == config


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gemv",
        "gemv/1/2",
        "tile/1/2/3/4/5/6",
        "gemv/1/2/x",
        "unfused/1",
        "gemv/1/2/3/",
        "pair/1/2/3/4",
        "pair/1/2/3/4/5/late",
    ],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no fusion config"):
        FusionConfig.parse(text)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("gpu", [H100, CONSUMER, INTERPRETER], ids=["h100", "consumer", "interpreter"])
def test_the_heuristic_always_gives_something_that_runs(width: int, gpu: Gpu) -> None:
    for m, n, dtype, swiglu in itertools.product(
        (1, 3, 4, 5, 16, 17, 64, 9999), (1, 63, 200_000), ELEMENT_SIZES, (0, 1)
    ):
        problem = Problem(m, n, width, dtype, bool(swiglu))
        config = heuristic(problem, gpu)
        assert config.faults(problem, gpu) == [], (problem, config)
        if m > (4 if dtype == "float32" else 16):
            assert config == UNFUSED
        elif m == 1 or dtype == "float32":  # several wide float32 rows do not fit into a warp
            assert config.variant == "gemv" or m > 1 and width >= 2048
        else:
            assert config.variant == "panel"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "gpu", [H100, HOPPER, CONSUMER, BLACKWELL, INTERPRETER], ids=["h100", "hopper", "consumer", "blackwell", "none"]
)
def test_what_is_guessed_for_dependents_always_runs(width: int, gpu: Gpu) -> None:
    """A dependent launch only where the GPU knows it, and everywhere else what is guessed without; pairs to 64 rows."""
    for m, n, dtype, swiglu in itertools.product(
        (1, 4, 5, 8, 9, 16, 17, 33, 64, 65, 9999), (1, 63, 200_000), ELEMENT_SIZES, (False, True)
    ):
        problem = Problem(m, n, width, dtype, swiglu)
        config, alone = heuristic(problem, gpu, dependent=True), heuristic(problem, gpu)
        assert config.faults(problem, gpu) == [], (problem, config)
        assert not alone.launch_pdl and alone.variant != "pair"
        if not gpu.pdl:
            assert config == alone
        elif dtype != "float32" and 16 < m <= MAX_PAIR_ROWS:
            assert config.variant == "pair" and config.launch_pdl and config.block_m >= m
        else:
            late = 8 < m <= 16 and alone.variant == "panel"
            pdl = alone != UNFUSED
            assert config == dataclasses.replace(alone, launch_pdl=pdl, late_trigger=late), (problem, config)


def test_a_lone_row_reaches_every_sm() -> None:
    for n, k in ((4096, 1024), (6144, 4096), (3072, 2048)):
        config = heuristic(Problem(1, n, k), H100)
        assert n // config.block_n >= 0.9 * H100.num_sms


FAULTS = {
    "gemv/3/64/1": (Problem(1, 8, 64), "block_n=3 is no power of two"),
    "gemv/0/64/1": (Problem(1, 8, 64), "block_n=0"),
    "gemv/1/64/1": (Problem(1, 8, 64, swiglu=True), "block_n >= 2"),
    "gemv/8/64/64": (Problem(1, 8, 64), "more than 32"),
    "gemv/8/64/4": (Problem(9, 8, 64), "at most 8 rows"),
    "gemv/64/256/4": (Problem(2, 8, 4096), "registers of 4 warps"),
    "gemv/2/256/4": (Problem(1, 8, 4096), "each of 4 warps takes rows of its own"),
    "panel/8/16/100/4": (Problem(2, 8, 4096), "no multiple of 32 columns for each of 4 warps"),
    "panel/8/8/128/4": (Problem(2, 8, 4096), "takes 16 of the weight, not 8"),
    "panel/8/16/128/2": (Problem(9, 8, 4096), "at most block_m=8 rows"),
    "panel/16/16/4096/2": (Problem(9, 8, 4096), "do not fit into its registers"),
    "panel/8/16/128/1": (Problem(2, 8, 4096, "float32"), "16-bit numbers"),
    "tile/8/64/64/4/2": (Problem(9, 8, 64), "block_m must be at least 16"),
    "tile/16/64/64/4/0": (Problem(9, 8, 64), "num_stages must be at least 1"),
    "tile/64/128/128/8/6": (Problem(9, 8, 64), "shared memory"),
    "tile/16/16/64/4/2": (Problem(2**21, 8, 64), "65,535 blocks"),
    "pair/8/64/64/4/2": (Problem(9, 8, 64), "block_m must be at least 16"),
    "pair/48/64/64/4/2": (Problem(9, 8, 64), "block_m=48 is no power of two"),
    "pair/64/1/64/4/2": (Problem(9, 8, 64, swiglu=True), "block_n >= 2"),
    "pair/64/128/128/8/6": (Problem(9, 8, 64), "shared memory"),
    "pair/64/64/64/4/2/pdl": (Problem(9, 8, 64), "launch_pdl needs a GPU that launches dependents"),
    "gemv/8/64/4/late": (Problem(1, 8, 64), "launch_pdl needs a GPU that launches dependents"),
}


@pytest.mark.parametrize("text", FAULTS)
def test_faults_are_named(text: str) -> None:
    problem, sentence = FAULTS[text]
    assert sentence in "; ".join(FusionConfig.parse(text).faults(problem, H100))


def test_a_dependent_launch_is_no_fault_where_the_gpu_knows_it() -> None:
    for text in ("gemv/8/64/4/late", "panel/8/16/128/4/pdl", "tile/16/64/64/4/2/pdl", "pair/64/64/64/4/2/pdl"):
        assert FusionConfig.parse(text).faults(Problem(5, 8, 64), HOPPER) == []
    late = dataclasses.replace(FusionConfig.parse("pair/64/64/64/4/2/pdl"), late_trigger=True)
    assert late.faults(Problem(5, 8, 64), HOPPER) == ["late_trigger is for dependent launches of gemv and panel"]


def test_a_late_trigger_without_a_dependent_launch_is_refused() -> None:
    """Its text would not say it, and text is how a configuration reaches the operator."""
    with pytest.raises(ValueError, match="late_trigger .* launch_pdl"):
        FusionConfig("gemv", 0, 8, 64, 4, late_trigger=True)


@pytest.mark.parametrize(
    ("text", "k", "stride", "first", "expected"),
    [
        ("pair/32/64/128/4/4/pdl", 1024, 1024, 0, (384, 2)),  # what its loop begins with, two threads a row
        ("tile/64/32/128/4/5/pdl", 1024, 1024, 0, (512, 4)),
        ("tile/64/32/128/4/5/pdl", 256, 1024, 8, (256, 4)),  # not beyond the row, where its buffer goes on
        ("tile/64/128/64/4/1/pdl", 1024, 1024, 0, (64, 1)),
        ("pair/32/64/128/4/4", 1024, 1024, 0, (0, 1)),  # its tile waits for a norm only
        ("pair/32/64/128/4/4/pdl", 1024, 1032, 1, (0, 1)),  # no row begins at a multiple of 16 bytes
        ("pair/32/64/128/4/4/pdl", 1024, 1025, 0, (0, 1)),  # the second does not
        ("pair/32/64/128/4/4/pdl", 328, 328, 0, (0, 1)),  # the second piece of a row would not
    ],
)
def test_a_dependent_tile_brings_aligned_pieces_of_its_own_rows(
    text: str, k: int, stride: int, first: int, expected: tuple[int, int]
) -> None:
    weight = torch.empty(64 * stride, dtype=torch.bfloat16).as_strided((63, k), (stride, 1), first)
    assert rms_norm_linear_fusion._prefetch(Problem(32, 63, k), FusionConfig.parse(text), weight) == expected


def test_bytes_moved() -> None:
    qkv = Problem(1, 4096, 1024)
    assert qkv.bytes_moved() == 2 * (4096 * 1024 + 1024 + 4096)
    assert qkv.bytes_moved(fused=False) - qkv.bytes_moved() == 2 * 2 * 1024  # the normalised row, written and read
    gate_up = Problem(4, 3072, 1024, "float32", swiglu=True)
    assert gate_up.bytes_moved() == 4 * (6144 * 1024 + 4 * (1024 + 3072))
    assert gate_up.bytes_moved(fused=False) - gate_up.bytes_moved() == 4 * 2 * 4 * (1024 + 6144)


# ------------------------------------------------------------------------------------------------------- tables


def row(m: int, n: int, k: int, config: str, dependent: str | None = None) -> TunedRow:
    parsed = None if dependent is None else FusionConfig.parse(dependent)
    return TunedRow(Problem(m, n, k), FusionConfig.parse(config), 1.0, 2.0, parsed)


ROWS = (
    row(1, 4096, 1024, "gemv/8/1024/4"),
    row(4, 4096, 1024, "gemv/4/1024/4"),
    row(16, 4096, 1024, "unfused"),
    row(1, 6144, 4096, "gemv/2/2048/8"),
    row(16, 6144, 4096, "tile/16/64/128/4/4"),
)


@pytest.mark.parametrize(
    ("problem", "config"),
    [
        (Problem(1, 4096, 1024), "gemv/8/1024/4"),
        (Problem(2, 4096, 1024), "gemv/4/1024/4"),  # the next larger M that was measured
        (Problem(5, 4096, 1024), "unfused"),
        (Problem(17, 4096, 1024), None),  # beyond the table
        (Problem(9, 5120, 4096), "tile/16/64/128/4/4"),  # the nearest weight
        (Problem(1, 4096, 500), None),  # none is near
        (Problem(1, 4096, 1024, "float16"), None),
        (Problem(1, 4096, 1024, swiglu=True), None),
    ],
)
def test_lookup(problem: Problem, config: str | None) -> None:
    found = lookup(problem, ROWS)
    assert (None if found is None else str(found)) == config


DEPENDENTS = (
    *ROWS,  # as tables of older versions, and of GPUs without dependent launches
    row(4, 2560, 2048, "gemv/8/1024/4"),
    row(4, 2048, 2048, "gemv/4/1024/4", "panel/8/16/512/2/pdl"),
    row(32, 2048, 2048, "tile/32/64/128/4/4", "pair/32/64/128/4/4/pdl"),
    row(64, 2048, 2048, "tile/64/64/128/4/4", "unfused"),
    row(128, 2048, 2048, "tile/128/64/64/4/4"),
)


@pytest.mark.parametrize(
    ("problem", "config", "dependent"),
    [
        (Problem(3, 2048, 2048), "gemv/4/1024/4", "panel/8/16/512/2/pdl"),
        (Problem(17, 2048, 2048), "tile/32/64/128/4/4", "pair/32/64/128/4/4/pdl"),
        (Problem(17, 2048, 2560), "tile/32/64/128/4/4", "pair/32/64/128/4/4/pdl"),  # the nearest weight
        (Problem(4, 2560, 2048), "gemv/8/1024/4", "panel/8/16/512/2/pdl"),  # its own row has none
        (Problem(33, 2048, 2048), "tile/64/64/128/4/4", "unfused"),
        (Problem(1, 4096, 1024), "gemv/8/1024/4", None),  # nor has one that is near
        (Problem(16, 6144, 4096), "tile/16/64/128/4/4", None),
    ],
)
def test_lookup_of_dependents(problem: Problem, config: str, dependent: str | None) -> None:
    assert str(lookup(problem, DEPENDENTS)) == config
    found = lookup(problem, DEPENDENTS, dependent=True)
    assert (None if found is None else str(found)) == dependent


def write_table(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / table_name("Some GPU (80GB)")
    path.write_text(json.dumps({"rows": rows}))
    return path


SOUND = dict(m=1, n=8, k=64, dtype="bfloat16", swiglu=False, config="gemv/2/64/1", fused_us=1.0, unfused_us=2.0)


def test_choose_reads_the_device_s_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(1, 8, 64)
    monkeypatch.setattr(fusion_table, "TABLES", tmp_path)
    choose.cache_clear()
    write_table(tmp_path, SOUND)
    assert str(choose(problem, "Some GPU (80GB)", H100)) == "gemv/2/64/1"
    assert choose(problem, "Another GPU", H100) == heuristic(problem, H100)
    choose.cache_clear()


def test_a_row_that_does_not_fit_the_gpu_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(16, 8, 64)
    monkeypatch.setattr(fusion_table, "TABLES", tmp_path)
    choose.cache_clear()
    write_table(tmp_path, {**SOUND, "m": 16, "config": "tile/16/128/256/4/3"})
    assert choose(problem, "Some GPU (80GB)", CONSUMER) == heuristic(problem, CONSUMER)
    choose.cache_clear()


def test_choose_takes_dependents_where_they_are_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's, or guessed ones; on a GPU without them, and above 64 rows, what all others get."""
    monkeypatch.setattr(fusion_table, "TABLES", tmp_path)
    choose.cache_clear()
    pair = {**SOUND, "m": 32, "config": "tile/32/16/16/4/2", "dependent": "pair/32/16/16/4/2/pdl"}
    write_table(tmp_path, SOUND, pair, {**SOUND, "m": 128, "config": "tile/128/16/16/4/2"})

    def chosen(m: int, gpu: Gpu, dependent: bool) -> str:
        return str(choose(Problem(m, 8, 64), "Some GPU (80GB)", gpu, dependent=dependent))

    assert chosen(32, HOPPER, True) == "pair/32/16/16/4/2/pdl"
    assert chosen(32, HOPPER, False) == chosen(32, H100, True) == "tile/32/16/16/4/2"
    assert chosen(33, HOPPER, True) == str(heuristic(Problem(33, 8, 64), HOPPER, dependent=True))
    assert chosen(1, H100, True) == "gemv/2/64/1"
    assert chosen(100, HOPPER, True) == chosen(100, HOPPER, False) == "tile/128/16/16/4/2"
    choose.cache_clear()


@pytest.mark.parametrize(
    "bad",
    [
        {"config": "fast"}, {"m": "one"}, {"unfused_us": None}, {"dependent": "fast"}, {"dependent": None},
        {"config": "gemv/2/64/1/pdl"},  # would be launched for callers who promise nothing
    ],
    ids=str,
)  # fmt: skip
def test_a_broken_table_is_named(tmp_path: Path, bad: dict[str, Any]) -> None:
    path = write_table(tmp_path, {**SOUND, **bad})
    with pytest.raises(ValueError, match="is no table of rms_norm_linear"):
        load_table(path)


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_tables(path: Path) -> None:
    """Each problem once, each configuration able to run, none slower than norm and GEMM; and where it comes from."""
    table = json.loads(path.read_text())
    assert path.name == table_name(table["device"])
    assert all({"date", "nanovllm", "torch", "triton", "driver", "method"} <= set(run) for run in table["runs"])
    assert {row["run"] for row in table["rows"]} == set(range(len(table["runs"])))
    rows = load_table(path)
    assert len({row.problem for row in rows}) == len(rows) > 0
    for row in rows:
        assert row.config.faults(row.problem, H100) == []
        assert row.config == UNFUSED or row.fused_us <= row.unfused_us
        assert row.dependent is None or row.dependent.faults(row.problem, HOPPER) == []


def test_the_policy_is_pure() -> None:
    for module in (fusion_config, fusion_table):
        assert not {"torch", "triton"} & set(vars(module))


# ----------------------------------------------------------------------------------------------------- compiler

PROBLEMS = [(1, 4096, 1024, False), (2, 96, 1000, False), (4, 3072, 2560, True), (3, 1001, 4095, False)]
PROBLEMS += [(16, 3072, 1024, True)]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("target", ["h100", "consumer"])
def test_what_the_policy_chooses_compiles(target: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from test_kernels_compile import TARGETS, CompileOnly

    gpu, capability = TARGETS[target]
    compiled: list[str] = []
    monkeypatch.setattr(rms_norm_linear_fusion, "use_triton", lambda x: True)
    monkeypatch.setattr(rms_norm_linear_fusion, "gpu_of", lambda device: gpu)
    jit._materialise(vars(rms_norm_linear_kernels))
    for name in ("gemv_kernel", "panel_kernel", "tile_kernel"):
        kernel = getattr(rms_norm_linear_kernels, name)
        monkeypatch.setattr(rms_norm_linear_kernels, name, CompileOnly(kernel, gpu, capability, compiled))
    choose.cache_clear()
    for m, n, k, swiglu in PROBLEMS:
        x, weight = (torch.zeros(rows, k, dtype=getattr(torch, dtype)) for rows in (m, 2 * n if swiglu else n))
        rest = {"bias": weight[:, 0].contiguous(), "residual": x.new_zeros(m, n)} if swiglu else {}
        activation = "swiglu" if swiglu else None
        rms_norm_linear_fusion.rms_norm_linear(x, weight, x[0], 1e-6, activation=activation, **rest)
    choose.cache_clear()
    # Several wide float32 rows do not fit into a warp, and sixteen rows of x are too many.
    assert compiled == (["gemv_kernel"] * 2 if dtype == "float32" else ["gemv_kernel"] + ["panel_kernel"] * 4)
