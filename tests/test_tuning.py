"""`nanovllm tune` without a GPU: what is tried, what decides, what is written, and how a mistake is told.

The kernels' times come from a fake clock; the operands, the gate and the tables are the real ones (on the CPU the
operator runs its reference body whatever the configuration).
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from nanovllm import cli
from nanovllm.cli.tune import line
from nanovllm.config import ModelConfig
from nanovllm.kernels import fusion_table, rms_norm_linear_fusion, rms_norm_linear_kernels
from nanovllm.kernels.fusion_config import UNFUSED, FusionConfig, Problem, heuristic
from nanovllm.kernels.fusion_table import TABLES, choose, load_table, table_name
from nanovllm.kernels.jit import gpu_of
from nanovllm.kernels.launch_config import H100, Gpu
from nanovllm.tuning import table
from nanovllm.tuning.candidates import candidates, kernel_of
from nanovllm.tuning.cases import SHAPES, Case, Shape, cases
from nanovllm.tuning.compilers import Compilers
from nanovllm.tuning.measure import Operands, Replay, Result, Variant, calls_for, measure
from nanovllm.tuning.search import plan, search
from nanovllm.tuning.turns import percentiles, take_turns, times_as_fast

DEPENDENT = dataclasses.replace(H100, pdl=True)
CONSUMER = Gpu(num_sms=82, shared_memory=99 * 1024)
CPU = torch.device("cpu")
SMALL = Case("tiny", "qkv", Problem(2, 24, 64, "float32"))
RUN = {"date": "2026-01-01", "nanovllm": "0", "torch": "0", "triton": "0", "driver": "0", "method": "none"}


# -------------------------------------------------------------------------------------------------------- cases


def test_cases_come_in_the_order_of_rows() -> None:
    found = cases(SHAPES, (4, 1), layers=("qkv", "gate_up+swiglu"))
    assert [case.problem.m for case in found] == [4] * 10 + [1] * 10
    assert found[0] == Case("Qwen3-0.6B", "qkv", Problem(4, 4096, 1024))
    assert found[-1] == Case("Llama-3.2-1B", "gate_up+swiglu", Problem(1, 8192, 2048, swiglu=True))
    assert {case.layer for case in cases(SHAPES)} == {"qkv", "gate_up", "gate_up+swiglu", "lm_head"}


def test_the_built_in_shapes_are_those_of_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    from harness.models import SHAPES as CONFIGS

    names = [field.name for field in dataclasses.fields(Shape)]
    assert {name: {n: config[n] for n in names} for name, config in CONFIGS.items()} == {
        name: dataclasses.asdict(shape) for name, shape in SHAPES.items()
    }


# --------------------------------------------------------------------------------------------------- candidates

ALL = [case.problem for case in cases(SHAPES, (1, 2, 3, 4, 8, 9, 16, 32, 64, 128, 4096))]


@pytest.mark.parametrize("gpu", [H100, CONSUMER, DEPENDENT], ids=["h100", "consumer", "dependent"])
def test_candidates_can_run_and_are_few(gpu: Gpu) -> None:
    for problem in ALL:
        found = candidates(problem, gpu)
        assert not [config for config in found if config.faults(problem, gpu)]
        assert any(config.launch_pdl for config in found) == (gpu.pdl and problem.m <= 64)
        pairs = gpu.pdl and problem.element_size == 2 and 16 <= problem.m <= 64
        assert {config.launch_pdl for config in found if config.variant == "pair"} == (
            {False, True} if pairs else set()
        )
        assert len(set(found)) == len(found) <= 120, (problem, len(found))
        if problem.m > 128:  # nobody beats cuBLAS there
            assert found == []
            continue
        assert len(found) >= (1 if problem.m > 64 else 4), problem
        variants = {config.variant for config in found}
        assert variants >= ({"gemv"} if problem.m == 1 else {"panel"} if problem.m <= 16 else {"tile"})
        assert "tile" in variants or problem.m < 16


def test_the_best_configurations_known_are_candidates() -> None:
    """Winners in the decode chain of an H100."""
    for problem, text in {
        Problem(1, 4096, 1024): "gemv/16/256/8",
        Problem(1, 1024, 2048): "gemv/8/256/4",
        Problem(1, 3072, 1024, swiglu=True): "gemv/4/256/1",
        Problem(1, 1024, 3072): "gemv/8/256/8",
        Problem(8, 4096, 1024): "panel/8/32/1024/4",
        Problem(8, 1024, 3072): "panel/8/16/3072/8",
        Problem(16, 3072, 1024, swiglu=True): "panel/16/16/512/2",
        Problem(16, 1024, 2048): "panel/16/8/2048/4",
    }.items():
        found = [str(config) for config in candidates(problem, H100)]
        assert text in found, (problem, found)


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (Problem(1, 4096, 1024), "gemv/4/256/2/pdl"),
        (Problem(2, 6144, 2560), "panel/8/32/1024/4/pdl"),
        (Problem(16, 6144, 4096), "panel/16/16/1024/4/late"),
        (Problem(32, 4096, 1024), "tile/32/64/256/4/3/pdl"),
        (Problem(32, 19456, 2560), "pair/32/64/128/4/3/pdl"),
        (Problem(64, 4096, 2048), "pair/64/32/256/4/4/pdl"),
        (Problem(64, 4096, 2048), "pair/64/64/128/4/7"),
    ],
)
def test_the_best_dependents_known_are_candidates(problem: Problem, text: str) -> None:
    """Winners on an H100."""
    assert text in map(str, candidates(problem, DEPENDENT))


def test_kernels_are_shared_between_problems() -> None:
    """Compilation is what tuning costs: problems that differ in N, or in an even K, need no second one of a tile."""
    gemv = FusionConfig.parse("gemv/2/512/2")
    for text in ("tile/16/32/128/4/4", "pair/16/32/128/4/4/pdl"):
        tile = FusionConfig.parse(text)
        assert kernel_of(Problem(9, 4096, 1024), tile) == kernel_of(Problem(16, 6144, 4096), tile)
        assert kernel_of(Problem(9, 4096, 1024), tile) != kernel_of(Problem(9, 4096, 1000), tile)
        assert kernel_of(Problem(9, 4096, 1024), tile) != kernel_of(Problem(9, 4096, 1024, swiglu=True), tile)
    assert kernel_of(Problem(1, 4096, 1024), gemv) == kernel_of(Problem(1, 6144, 1024), gemv)
    assert kernel_of(Problem(1, 4096, 1024), gemv) != kernel_of(Problem(2, 4096, 1024), gemv)
    assert kernel_of(Problem(1, 4096, 1024), gemv) != kernel_of(Problem(1, 4096, 2048), gemv)


class Launches:
    """Stands for a kernel; keeps the constants of a launch, which are what Triton compiles for."""

    def __init__(self, seen: set[str]) -> None:
        self.seen = seen

    def __getitem__(self, grid: tuple[int, ...]) -> Launches:
        return self

    def __call__(self, *arguments: object, **constants: object) -> None:
        specialised = [a % 16 == 0 for a in arguments if isinstance(a, int)][-3:]  # strides; M and N do not count
        self.seen.add(f"{specialised} {sorted(constants.items())}")


@pytest.mark.parametrize("gpu", [H100, DEPENDENT], ids=["h100", "dependent"])
def test_a_kernel_compiles_what_the_problem_needs(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch of the small problem has the constants of the large one, for every candidate."""
    monkeypatch.setattr(rms_norm_linear_fusion, "use_triton", lambda x: True)
    monkeypatch.setattr(rms_norm_linear_fusion, "gpu_of", lambda device: gpu)

    def constants(problem: Problem, config: FusionConfig) -> set[str]:
        seen: set[str] = set()
        for name in ("gemv_kernel", "panel_kernel", "tile_kernel"):
            monkeypatch.setattr(rms_norm_linear_kernels, name, Launches(seen))
        x = torch.empty(problem.m, problem.k, dtype=torch.bfloat16)
        weight = torch.empty(problem.weight_rows, problem.k, dtype=torch.bfloat16)
        rms_norm_linear_fusion.launch(problem, config, x, weight, x[0], 1e-6, None, None)
        return seen

    for problem in [
        Problem(1, 512, 2560),
        Problem(2, 512, 2048, swiglu=True),
        Problem(8, 640, 1024),
        Problem(64, 512, 1088),
        Problem(32, 512, 512),  # fewer columns than a pair may bring to the cache
    ]:
        for config in candidates(problem, gpu):
            assert constants(problem, config) == constants(kernel_of(problem, config).problem, config), (
                problem,
                config,
            )


# ------------------------------------------------------------------------------------------------------ measure


class FakeTimer:
    """Times by name: `cheap` in the first pass, `precise` in the second; counts replays."""

    def __init__(self, cheap: dict[str, float], precise: dict[str, float]) -> None:
        self.clocks = [cheap, precise]
        self.calls: dict[str, list[int]] = {}
        self.order: list[str] = []

    def __call__(self, variant: Variant, weights: Sequence[torch.Tensor], calls: int) -> Replay:
        assert calls % len(weights) == 0
        variant.call(weights[0])
        asked = self.calls.setdefault(variant.name, [])
        asked.append(calls)
        clock = self.clocks[len(asked) - 1 if "/" in variant.name else 1]

        def replay() -> float:
            self.order.append(variant.name)
            return clock.get(variant.name, 50.0)

        return replay


FOUR = [FusionConfig.parse(f"gemv/{n}/64/1") for n in (1, 2, 4, 8)]
A, B, C, D = map(str, FOUR)


def timed(cheap: dict[str, float], precise: dict[str, float], **kwargs: object) -> tuple[Result, FakeTimer]:
    timer = FakeTimer(cheap, precise)
    return measure(SMALL, Operands(SMALL.problem, CPU), FOUR, timer, rounds=4, finalists=2, **kwargs), timer  # type: ignore[arg-type]


def test_the_precise_pass_decides_between_the_best_of_the_cheap_one() -> None:
    result, timer = timed({A: 1, B: 2, C: 3, D: 4}, {A: 7.0, B: 5.0, C: 1.0, "unfused": 6.0})
    assert set(result.times) == {A, B, "unfused"}, "C and D were not among the best two"
    assert result.best() == result.choice() == B
    assert result.us("fused") == 5.0
    assert result.us("unfused") == 6.0
    turns = timer.order[-3 * 5 :]
    assert [sorted(turns[i : i + 3]) for i in range(0, 15, 3)] == [sorted([A, B, "unfused"])] * 5, "variants take turns"


def test_a_win_within_noise_is_none() -> None:
    assert timed({}, {A: 9.95, B: 9.95, C: 9.95, D: 9.95, "unfused": 10.0})[0].choice() == "unfused"
    assert timed({}, {A: 9.8, "unfused": 10.0})[0].choice() == A
    assert timed({}, {A: 11.0, "unfused": 10.0})[0].us("fused") == 10.0


def test_either_launch_is_ranked_among_its_own() -> None:
    """Dependents that are slower in the cheap pass are timed nonetheless, and the table gets the best of both."""
    configs = FOUR + [dataclasses.replace(config, launch_pdl=True) for config in FOUR]
    cheap = {A: 1, B: 2, C: 3, D: 4, f"{A}/pdl": 11, f"{B}/pdl": 12, f"{C}/pdl": 10, f"{D}/pdl": 13}
    clock = {A: 5.0, B: 5.5, f"{A}/pdl": 4.0, f"{C}/pdl": 3.0, "unfused": 6.0}

    def measured(clock: dict[str, float]) -> Result:
        return measure(SMALL, Operands(SMALL.problem, CPU), configs, FakeTimer(cheap, clock), rounds=4, finalists=2)

    result = measured(clock)
    assert set(result.times) == set(clock)
    assert (result.choice(), result.choice(dependent=True)) == (A, f"{C}/pdl")
    assert (result.us("fused"), result.us("dependent")) == (5.0, 3.0)
    (row,) = table.rows_of([result])
    assert (row["config"], row["fused_us"], row["dependent"], row["dependent_us"]) == (A, 5.0, f"{C}/pdl", 3.0)
    assert f"{A} 5.00 us, norm + linear 6.00 us, as a dependent {C}/pdl 3.00 us" in line(result)

    late = measured({**clock, f"{A}/pdl": 7.0, f"{C}/pdl": 6.5})
    assert late.us("dependent") == 5.0, "who may launch a dependent may as well not"
    assert table.rows_of([late])[0].items() >= {"config": A, "dependent": A, "dependent_us": 5.0}.items()
    refused = dataclasses.replace(timed({}, {A: 7.0, "unfused": 6.0})[0], refused={f"{A}/pdl": "wrong"})
    assert table.rows_of([refused])[0]["dependent"] == "unfused", "no dependent passed: the policy must not guess one"


def test_without_dependents_nothing_is_said_of_them() -> None:
    result, _ = timed({}, {A: 5.0, "unfused": 6.0})
    assert not result.has_dependents and result.us("dependent") == 5.0
    assert not any("dependent" in name for name in table.rows_of([result])[0])
    assert "dependent" not in line(result)


def test_baselines_are_timed_in_the_same_turns() -> None:
    extra = Variant("gemm", lambda w: w)
    result, timer = timed({}, {"gemm": 2.0}, baselines=[extra])
    assert result.us("gemm") == 2.0
    assert timer.order.count("gemm") == 5


def test_wrong_and_failing_candidates_are_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = Operands(SMALL.problem, CPU)
    sound = Operands.fused

    def fused(self: Operands, config: FusionConfig) -> Variant:
        def call(w: torch.Tensor) -> torch.Tensor:
            if str(config) == A:
                raise RuntimeError("out of resource: shared memory\nmore")
            y = sound(self, config).call(w)
            if str(config) == B:
                y[-1, -1] = float("nan")
            if str(config) == C:
                y = y * 1.001
            return y

        return Variant(str(config), call)

    monkeypatch.setattr(Operands, "fused", fused)
    result = measure(SMALL, operands, FOUR, FakeTimer({}, {A: 1, B: 1, C: 1, D: 2.0}), rounds=4)
    assert result.choice() == D
    assert result.refused[A] == "out of resource: shared memory"
    assert "nan" in result.refused[B]
    assert "relative error 1.0" in result.refused[C]


def test_the_gate_compares_with_a_float64_of_its_own() -> None:
    """Against the formula written out, for both activations, gamma given and folded."""
    for swiglu, folded in ((False, False), (True, False), (True, True)):
        operands = Operands(Problem(300, 24, 64, "float32", swiglu), CPU, folded=folded)
        assert operands.sample[[0, -1]].tolist() == [0, 299] and (operands.gamma is None) == folded
        x, weight = (t.double() for t in (operands.x[operands.sample], operands.weights[0]))
        gamma = 1 if operands.gamma is None else operands.gamma.double()
        y = (gamma * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ weight.T
        if swiglu:
            y = y[:, :24] * torch.sigmoid(y[:, :24]) * y[:, 24:]
        torch.testing.assert_close(operands.truth(), y, rtol=1e-12, atol=1e-12)
        assert operands.error(operands.fused(UNFUSED).call, operands.truth()) < 1e-6


def test_norm_and_linear_are_gated_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """By plain PyTorch's error: they are what candidates are compared with, and what large problems run."""
    operands, sound = Operands(SMALL.problem, CPU), Operands.fused

    def fused(self: Operands, config: FusionConfig) -> Variant:
        return Variant(str(config), lambda w: 1.001 * sound(self, config).call(w))

    monkeypatch.setattr(Operands, "fused", fused)
    with pytest.raises(RuntimeError, match="norm and linear are wrong for .*relative error 1.0"):
        measure(SMALL, operands, [], FakeTimer({}, {}))


def test_folded_cases_try_no_kernel() -> None:
    wanted = cases({"tiny": SHAPES["Qwen3-0.6B"]}, (1, 16), layers=("gate_up+swiglu",), folded=True)
    assert [configs for stage in plan(wanted, H100) for _, configs in stage.cases] == [[], []]


def test_weights_rotate() -> None:
    operands = Operands(SMALL.problem, CPU, rotate_bytes=10 * 24 * 64 * 4 - 1)
    assert len(operands.weights) == 10
    assert len({weight.data_ptr() for weight in operands.weights}) == 10
    assert all(torch.equal(weight, operands.weights[0]) for weight in operands.weights)
    assert [len(Operands(SMALL.problem, CPU, rotate_bytes=size).weights) for size in (0, 1)] == [1, 2]
    assert calls_for(Problem(1, 4096, 1024), 22, 400) == 22 * 6  # 2.8 us a call
    assert calls_for(Problem(8192, 24576, 4096), 1, 400) == 1


def test_a_median_ignores_the_first_turn_and_an_outlier() -> None:
    times = iter([100.0, 1.0, 2.0, 90.0, 3.0, 2.0])
    median, low, high = percentiles(take_turns({"x": lambda: next(times)}, 5)["x"])
    assert median == 2.0
    assert low <= median <= high


def test_a_clock_that_steps_is_no_speedup() -> None:
    """Equal but for a clock that slows down after seven of fifteen turns, where one of the two had a pause."""
    ours, theirs = [2.0] * 7 + [2.2] * 8, [2.0] * 6 + [9.0] + [2.2] * 8
    ours[8] = 1.9
    assert percentiles(ours)[0] < percentiles(theirs)[0]
    assert times_as_fast(ours, theirs) == 1.0


# ------------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("gpu", [H100, DEPENDENT], ids=["h100", "dependent"])
def test_search_hands_out_results_and_counts_steps(gpu: Gpu) -> None:
    """Where the GPU knows dependent launches, the best three of those as well."""
    wanted = [dataclasses.replace(SMALL, problem=Problem(m, 24, 512, "float32")) for m in (1, 2)]
    stages = plan(wanted, gpu)
    steps: list[int] = []
    found = []
    for result in search(
        stages, CPU, jobs=1, timer=lambda *a: FakeTimer({}, {"unfused": 90.0})(*a), progress=steps.append
    ):
        found.append(result.case)
        assert len(result.times) == (7 if gpu.pdl else 4)
        assert result.has_dependents == ("dependent" in table.rows_of([result])[0]) == gpu.pdl
    assert found == wanted
    assert sum(steps) == sum(stage.steps for stage in stages)


def test_search_begins_nothing_after_its_time() -> None:
    stages = plan([SMALL], H100)
    assert list(search(stages, CPU, jobs=1, time_limit=0.0)) == []


def test_a_kernel_that_does_not_compile_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = plan([SMALL], H100)
    config = stages[0].cases[0][1][0]

    def run(self: Compilers, work: list[tuple[object, ...]], deadline: float, done: object) -> dict[object, str]:
        return {job: "ptxas died" for job in work if job[1] == kernel_of(SMALL.problem, config)}

    monkeypatch.setattr(Compilers, "run", run)
    (result,) = search(stages, CPU, jobs=1, timer=lambda *a: FakeTimer({}, {})(*a))
    assert result.refused == {str(config): "ptxas died"}


def slow_square(x: int) -> str:
    """Runs in a worker process."""
    if x == 3:
        time.sleep(3)
    return "" if x < 2 else str(x * x)


@pytest.mark.parametrize(("limit", "expected"), [(60.0, {2: "4"}), (0.0, {})])
def test_workers_answer_until_the_deadline(limit: float, expected: dict[int, str]) -> None:
    done: list[int] = []
    with Compilers(2) as compilers:
        numbers = (1, 2) if limit else (1, 2, 3)
        failed = compilers.run(
            [(slow_square, x) for x in numbers], time.monotonic() + limit, lambda job: done.append(job[1])
        )
    assert failed == {(slow_square, x): text for x, text in expected.items()}
    assert sorted(done) == ([1, 2] if limit else [])


# -------------------------------------------------------------------------------------------------------- table


def result_of(m: int, config: str, us: float = 2.0, n: int = 24) -> Result:
    times = {"unfused": (4.0, 4.0, 4.0)} | ({config: (us, us, us)} if config != "unfused" else {})
    return Result(Case("tiny", "qkv", Problem(m, n, 64)), times)


def test_a_table_is_merged_and_says_where_rows_come_from(tmp_path: Path) -> None:
    first = table.TableWriter(tmp_path, "Some GPU", {**RUN, "date": "1"})
    first.add(result_of(1, "gemv/2/64/1"))
    first.add(result_of(2, "gemv/4/64/1"))
    second = table.TableWriter(tmp_path, "Some GPU", {**RUN, "date": "2"})
    second.add(result_of(2, "gemv/8/64/1", us=5.0))
    second.add(result_of(4, "tile/16/16/64/2/2"))

    path = tmp_path / table_name("Some GPU")
    content = json.loads(path.read_text())
    assert content["device"] == "Some GPU"
    assert [(row["m"], row["config"], content["runs"][row["run"]]["date"]) for row in content["rows"]] == [
        (1, "gemv/2/64/1", "1"),
        (2, "unfused", "2"),
        (4, "tile/16/16/64/2/2", "2"),
    ]
    load_table.cache_clear()
    assert [(row.fused_us, row.unfused_us) for row in load_table(path)] == [(2.0, 4.0), (5.0, 4.0), (2.0, 4.0)]
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "no partial file is left"

    third = table.TableWriter(tmp_path, "Some GPU", {**RUN, "date": "3"})
    third.add(result_of(1, "unfused"))
    assert [run["date"] for run in json.loads(path.read_text())["runs"]] == ["2", "3"], "a run without rows goes"


@pytest.mark.parametrize("text", ["{", '{"rows": [{}]}', '{"rows": []}'])
def test_a_file_that_is_no_table_is_not_overwritten(tmp_path: Path, text: str) -> None:
    path = tmp_path / table_name("Some GPU")
    path.write_text(text)
    with pytest.raises(ValueError, match="some_gpu.json"):
        table.TableWriter(tmp_path, "Some GPU", RUN)
    assert path.read_text() == text


def test_the_user_s_table_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped, user = tmp_path / "shipped", tmp_path / "user"
    monkeypatch.setattr(fusion_table, "TABLES", shipped)
    monkeypatch.setenv(fusion_table.VARIABLE, str(user))
    for folder, config in ((shipped, "gemv/2/64/1"), (user / fusion_table.OPERATOR, "gemv/4/64/1")):
        writer = table.TableWriter(folder, "Some GPU", RUN)
        writer.add(result_of(1, config))
        if folder is shipped:
            writer.add(result_of(2, "gemv/8/64/1"))
    choose.cache_clear()
    load_table.cache_clear()
    assert str(choose(Problem(1, 24, 64), "Some GPU", H100)) == "gemv/4/64/1"
    assert str(choose(Problem(2, 24, 64), "Some GPU", H100)) == "gemv/8/64/1"
    choose.cache_clear()
    load_table.cache_clear()


def test_where_the_user_s_tables_are() -> None:
    assert fusion_table.user_tables({fusion_table.VARIABLE: "/a"}) == Path("/a/rms_norm_linear")
    assert fusion_table.user_tables({"XDG_CACHE_HOME": "/c"}) == Path("/c/nanovllm/tuned/rms_norm_linear")
    home = Path(os.path.expanduser("~"))
    assert fusion_table.user_tables({}) == home / ".cache/nanovllm/tuned/rms_norm_linear"


def test_provenance_names_no_machine() -> None:
    found = table.provenance(180_000_000)
    assert set(found) == set(RUN)
    assert "180 MB" in found["method"]
    assert not any("/" in value for value in found.values())


# ------------------------------------------------------------------------------------------------- command line


def test_without_a_gpu_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune", "Qwen3-0.6B"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("nanovllm: tune measures kernels on a CUDA GPU")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("rows", ["", "0", "1,x", "-1"])
def test_rows_that_are_none(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["tune", f"--rows={rows}"])
    assert exit.value.code == 2
    assert "list of positive numbers" in capsys.readouterr().err


def test_an_unknown_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "no-such-model"]) == 2
    assert "'no-such-model' does not exist" in capsys.readouterr().err


def test_the_command_writes_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a config.json to the file, with a fake GPU and clock; then the table of a run that is interrupted."""
    from nanovllm.tuning import measure as measuring
    from nanovllm.tuning import search as searching

    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=48, hidden_size=512, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
        rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=True, hidden_act="silu", torch_dtype="float32",
    )  # fmt: skip
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("nanovllm.cli.tune._gpu", lambda: "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(measuring, "rotate_bytes", lambda device: 0)
    clock = {"unfused": 90.0}
    monkeypatch.setitem(search.__kwdefaults__, "timer", lambda *a: FakeTimer({}, clock)(*a))
    argv = ["tune", str(model / "config.json"), "--rows=1,2", "--dtype=float32", "--output", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    path = tmp_path / "out" / "rms_norm_linear" / "fake_gpu.json"
    rows = json.loads(path.read_text())["rows"]
    problems = {(row["m"], row["n"], row["k"], row["swiglu"]) for row in rows}
    each = {(128, 512, False), (64, 512, False), (32, 512, True), (48, 512, False)}
    assert all("/" in row["config"] for row in rows)
    assert problems == {(m, *rest) for m in (1, 2) for rest in each}
    assert "8 of 8 cases measured" in capsys.readouterr().out

    path.unlink()
    calls = []

    def interrupted(*arguments: object, **kwargs: object) -> Result:
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return measure(*arguments, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(searching, "measure", interrupted)
    assert cli.main(argv) == 130
    load_table.cache_clear()
    assert len(load_table(path)) == 2


def test_the_command_line_imports_no_torch() -> None:
    code = "import sys; from nanovllm.cli import build_parser; build_parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_shapes_come_from_a_model_s_configuration() -> None:
    fields = {
        "hidden_size": 1,
        "intermediate_size": 2,
        "num_heads": 3,
        "num_kv_heads": 4,
        "head_dim": 5,
        "vocab_size": 6,
    }
    config = ModelConfig.__new__(ModelConfig)
    for name, value in fields.items():
        object.__setattr__(config, name, value)
    assert Shape.of(config) == Shape(1, 2, 3, 4, 5, 6)


# --------------------------------------------------------------------------------------------------- benchmark


def test_the_benchmark_reports_losses_and_complete_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    from harness.fusion_operator import Report

    wanted = cases({"tiny": SHAPES["Qwen3-0.6B"]}, (1, 2), layers=("qkv", "gate_up"))
    compiled = iter((8.0, 2.0, 3.8))  # against 4 us: twice as fast, half as fast, a loss of 5 %
    results = []
    for case in wanted[:3]:
        times = {"gemv/2/64/1": 4.0, "unfused": 5.0, "compiled": next(compiled), "eager": 9.0, "gemm": 3.0}
        results.append(Result(case, {name: (us, us, us) for name, us in times.items()}))
    report = Report(wanted, results, bandwidth=6e12)
    text = report.summary()
    assert "1 wins, 2 losses" in text
    assert text.count("LOSS") == 2
    assert "worst: tiny         gate_up        M    1" in text
    assert "  M=1                      1.000 (0.500; 2.000), 2 cases\n" in text
    assert "  M=2                      0.950 (0.950; 0.950), 1 cases (INCOMPLETE)" in text
    share = wanted[1].problem.bytes_moved() / 4e-6 / 6e12  # the one weight of 12 MB and more
    assert f"at least {share:.1%} of the read" in text
    records = report.records({"device": "Fake"})
    assert [r.options for r in records if r.metric == "speedup_geomean"] == ["M=1", "qkv to M=64"]
    assert {r.test for r in records} == {"fusion_operator"}
    assert not any("dependent" in r.options for r in records)
    for result in results:
        result.turns["gemv/2/64/1/pdl"] = (2.0, 2.0, 2.0)  # twice as fast as on its own
    both = Report(wanted, results, bandwidth=6e12)
    assert "dependent: speed-up over compiled norm" in both.summary()
    kept = {(r.metric, r.batch, r.options): r for r in both.records({"device": "Fake"})}
    assert len(kept) == len(both.records({"device": "Fake"}))
    speedups = [kept["speedup", "1", f"qkv {form}"] for form in ("fused", "dependent")]
    assert [(r.value, r.note) for r in speedups] == [(2.0, "gemv/2/64/1"), (4.0, "gemv/2/64/1/pdl")]
    means = [kept["speedup_geomean", "", name].value for name in ("M=1", "M=1, dependent")]
    assert means == [pytest.approx(1.0), pytest.approx(2.0)]
    large = cases({"tiny": SHAPES["Qwen3-0.6B"]}, (1024,), layers=("gate_up+swiglu",), folded=True)
    parts = {name: (5.0, 5.0, 5.0) for name in ("unfused", "compiled", "eager", "gemm")}
    folded = Report(large, [Result(large[0], parts)], bandwidth=6e12).records({"device": "Fake"})
    assert {r.test for r in folded} == {"fusion_operator_folded"}
    means = ["all above M=64", "M=1024", "gate_up+swiglu above M=64"]
    assert [r.options for r in folded if r.metric == "speedup_geomean"] == means
    assert len({r.key for r in records}) == len(records)
    assert {r.note for r in records if r.options.endswith(" fused")} == {"gemv/2/64/1"}


# --------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
def test_every_row_of_this_gpu_s_table_passes_the_gate() -> None:
    """Full-size weights against float64; on a GPU without a table, what the heuristic says for a few problems."""
    device = torch.device("cuda")
    rows = load_table(TABLES / table_name(torch.cuda.get_device_name()))
    guessed = [Problem(m, 3072, 2048, "bfloat16", swiglu) for m in (1, 4, 16) for swiglu in (False, True)]
    pairs = [(row.problem, row.config) for row in rows] or [(p, heuristic(p, gpu_of(device))) for p in guessed]
    wrong = []
    for problem, config in pairs:
        operands = Operands(problem, device)
        truth = operands.truth()
        allowed = 2 * operands.error(operands.fused(UNFUSED).call, truth)
        error = operands.error(operands.fused(config).call, truth)
        if not error <= allowed:
            wrong.append(f"{problem} {config}: relative error {error:.2e}, allowed {allowed:.2e}")
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.gpu
def test_search_on_a_gpu() -> None:
    """Two workers compile, graphs are timed, and nobody reads a weight faster than memory can."""
    device = torch.device("cuda")
    wanted = [Case("tiny", "qkv", Problem(m, 4096, 1024)) for m in (1, 16)]
    results = list(search(plan(wanted, gpu_of(device)), device, jobs=2))
    assert [result.case for result in results] == wanted
    for result in results:
        assert "/" in result.best(), result.refused
        assert all(low <= us <= high for us, low, high in result.times.values())
        assert min(us for us, _, _ in result.times.values()) > 4096 * 1024 * 2 / 10e6, "10 TB/s: weights do not rotate"
