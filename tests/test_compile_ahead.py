"""A cold start compiles its kernels side by side: all of them, none twice, and whatever goes wrong as without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_gpu
import pytest
import torch
from tiny_models import save_model

from nanovllm.engine.model_runner import ModelRunner
from nanovllm.kernels import activation, compile_ahead, norm
from nanovllm.kernels.compile_ahead import compile_together
from nanovllm.kernels.sample import sample
from nanovllm.kernels.sample_cut import sample_rows

triton = pytest.importorskip("triton")
async_compile = pytest.importorskip("triton.runtime._async_compile")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")
BF16 = torch.bfloat16


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> fake_gpu.Compiler:
    return fake_gpu.install(monkeypatch)


def silu(columns: int = 64) -> None:
    activation.silu_mul(torch.zeros(4, 2 * columns, dtype=BF16))


def norms() -> None:
    """Two kernels."""
    x, weight = torch.zeros(4, 64, dtype=BF16), torch.ones(64, dtype=BF16)
    norm.rms_norm(x, weight, 1e-6)
    norm.add_rms_norm(x, x, weight, 1e-6)


def everything() -> None:
    silu()
    norms()


def compiled_here(compiler: fake_gpu.Compiler) -> list[str]:
    """Kernels that were compiled in this thread."""
    return [key.split()[0] for key, thread in compiler.compiled.items() if not thread.startswith("nanovllm-compile")]


def assert_nothing_is_left() -> None:
    assert async_compile.active_mode.get() is None
    assert triton.knobs.compilation.listener is None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nanovllm-compile")]


# ------------------------------------------------------------------------------------------------------- the engine


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("qwen3", {}),
        ("qwen3", {"fusion": "off"}),
        ("mistral", {"max_num_seqs": 3}),
        ("qwen2_window", {"max_num_batched_tokens": 90}),
    ],
)
def test_a_start_compiles_what_it_has_rehearsed(
    case: str, options: dict[str, Any], tmp_path: Path, compiler: fake_gpu.Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(case, tmp_path)
    runner = fake_gpu.runner(tmp_path, **options)
    assert runner.loaded.fused_rows == (0 if "fusion" in options else 64)
    fake_gpu.start(runner)
    assert len(compiled_here(compiler)) == 1, "all but the one that showed that the start is cold"
    row, logits = runner.sampling.view(1), torch.zeros(1, 211, dtype=BF16)
    sample(logits, row.temperature, row.seeds, row.positions)
    sample_rows(logits, row)
    assert set(compiler.launched) == set(compiler.compiled), "a kernel was compiled for nothing"
    if runner.loaded.fused_rows:
        compiler.launched.clear()
        with torch.inference_mode():
            runner.decode_and_sample(3, runner.max_model_len)
        names = [key.split()[0] for key in compiler.launched]
        # Attention reads the plan before it waits, so it must be there before the first dependent is launched.
        assert names.index("_embed_kernel") == 1 + names.count("_plan_kernel")
        assert "_plan_kernel" in names or case != "qwen3"
    assert len(compiled_here(compiler)) == 1 == len(compiler.hits) and len(compiler.compiled) >= 15
    assert sum(name.startswith("nanovllm-compile") for name in compiler.driver.launchers) == len(compiler.compiled)
    assert_nothing_is_left()

    compiler.new_process(monkeypatch)
    monkeypatch.setattr(ModelRunner, "_rehearse", lambda self: pytest.fail("a warm start rehearses"))
    fake_gpu.start(fake_gpu.runner(tmp_path, **options))
    assert compiler.compiled == {} and len(compiler.hits) >= 13

    # Another process has compiled the largest step only.
    compiler.new_process(monkeypatch)
    with torch.inference_mode():
        runner._profile()
    compiler.disk = set(compiler.hits)
    fake_gpu.start(fake_gpu.runner(tmp_path, **options))
    assert len(compiler.compiled) >= 8 and len(compiled_here(compiler)) <= 2  # the first of decodes and of chunks


def test_a_start_without_graphs_compiles_its_largest_step(tmp_path: Path, compiler: fake_gpu.Compiler) -> None:
    save_model("qwen3", tmp_path)
    runner = fake_gpu.runner(tmp_path)
    runner.graphs = runner.chunk_graphs = None
    fake_gpu.start(runner)
    assert len(compiled_here(compiler)) == 1 and set(compiler.launched) < set(compiler.compiled)


# ---------------------------------------------------------------------------------------------------- one by one


def test_a_rehearsal_launches_nothing(compiler: fake_gpu.Compiler) -> None:
    """Not even what is compiled already: it would read what the others have not written."""
    silu()

    def rehearse() -> None:
        everything()
        assert len(compiler.launched) == 1

    compile_together(norms, rehearse, show_progress=False)
    assert [key.split()[0] for key in compiler.launched] == ["_silu_mul_kernel"] + ["_rms_norm_kernel"] * 2


def test_work_that_finds_its_kernels_is_done_once(compiler: fake_gpu.Compiler) -> None:
    everything()
    compile_together(everything, lambda: pytest.fail("rehearsed"), show_progress=False)
    assert len(compiler.launched) == 6
    assert_nothing_is_left()


def test_what_cannot_be_compiled_fails_at_its_launch(compiler: fake_gpu.Compiler) -> None:
    compiler.refused = {"_silu_mul_kernel"}
    compile_together(norms, everything, show_progress=False)
    assert [key.split()[0] for key in compiler.compiled] == ["_rms_norm_kernel"] * 2
    with pytest.raises(RuntimeError, match="_silu_mul_kernel was refused"):
        silu()
    compiler.refused = set()
    silu()
    assert compiler.launched[-1].startswith("_silu_mul_kernel")
    assert_nothing_is_left()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupt_leaves_nothing_behind(error: type[BaseException], compiler: fake_gpu.Compiler) -> None:
    def rehearse() -> None:
        everything()
        raise error("stop")

    with pytest.raises(error, match="stop"):
        compile_together(norms, rehearse, show_progress=False)
    assert_nothing_is_left()
    everything()
    assert len(compiler.launched) == 3


def test_an_interrupt_waits_only_for_what_has_begun(
    compiler: fake_gpu.Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted = threading.Event()

    def rehearse() -> None:
        compiler.may_go_on = interrupted
        for columns in range(16, 16 * 21, 16):
            silu(columns)
        threading.Timer(0.5, interrupted.set).start()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_together(norms, rehearse, show_progress=False)
    assert len(compiler.compiled) <= 1 + 4
    assert_nothing_is_left()


def test_filters_of_warnings_stay(compiler: fake_gpu.Compiler) -> None:
    """Triton's compiler changes them for a moment; in threads, one may set back what another has set."""
    filters = list(warnings.filters)
    compile_together(norms, lambda: warnings.simplefilter("ignore"), show_progress=False)
    assert warnings.filters == filters


def test_a_kernel_is_compiled_once(compiler: fake_gpu.Compiler) -> None:
    """Triton 3.5 and 3.6 ask again at each launch."""
    with compile_ahead.ThreadPoolExecutor(1) as pool:
        rehearsal = compile_ahead._Rehearsal(pool)
        compiles: list[int] = []
        first, second = (rehearsal.submit("key", lambda: compiles.append(1), print) for _ in range(2))
    assert first is second and compiles == [1]


def test_a_cancelled_kernel_is_compiled_by_its_launch(compiler: fake_gpu.Compiler) -> None:
    """Triton 3.7 keeps what stands for the kernel."""
    pool = compile_ahead.ThreadPoolExecutor(1)
    begin = threading.Event()
    pool.submit(begin.wait)
    made: list[Any] = []
    later = compile_ahead._Later(lambda: fake_gpu.Compiled("key", compiler.launched), made.append, pool)
    pool.shutdown(wait=False, cancel_futures=True)
    begin.set()
    later.run()
    assert later.future.cancelled() and compiler.launched == ["key"] and len(made) == 1


def test_other_threads_go_on(compiler: fake_gpu.Compiler) -> None:
    """What another engine launches meanwhile is launched, and what it compiles does not stop the work here."""

    def elsewhere(function: Callable[[], None]) -> None:
        thread = threading.Thread(target=function, name="elsewhere")
        thread.start()
        thread.join()

    def rehearse() -> None:
        elsewhere(lambda: silu(128))
        assert len(compiler.launched) == 3

    def work() -> None:
        elsewhere(lambda: silu(64))
        elsewhere(lambda: silu(96))
        norms()

    compile_together(work, rehearse, show_progress=False)
    silus = [key for key in compiler.launched if key.startswith("_silu")]
    assert len(silus) == 5 and len([t for t in compiler.compiled.values() if t == "elsewhere"]) >= 1
    assert_nothing_is_left()


def test_another_listener_hears_everything(compiler: fake_gpu.Compiler) -> None:
    heard: list[bool] = []
    settings: Any = triton.knobs.compilation
    settings.listener = listener = lambda **event: heard.append(event["cache_hit"])
    try:
        compile_together(norms, everything, show_progress=False)
        assert settings.listener is listener
    finally:
        settings.listener = None
    assert heard.count(False) == 3


def test_starts_that_overlap_leave_the_listener_as_it_was() -> None:
    settings: Any = triton.knobs.compilation
    settings.listener = listener = lambda **event: None
    entered, hold = threading.Event(), threading.Event()

    def other() -> None:
        with compile_ahead._watch.here():
            entered.set()
            hold.wait()

    thread = threading.Thread(target=other)
    try:
        with compile_ahead._watch.here():
            thread.start()
            entered.wait()
        assert settings.listener is compile_ahead._watch
        hold.set()
        thread.join()
        assert settings.listener is listener
    finally:
        hold.set()
        settings.listener = None


def test_what_catches_everything_does_not_catch_a_missing_kernel(compiler: fake_gpu.Compiler) -> None:
    def work() -> None:
        try:
            norms()
        except Exception:
            pytest.fail("swallowed")

    compile_together(work, everything, show_progress=False)
    assert len(compiled_here(compiler)) == 1


@pytest.mark.parametrize("why", ["one core", "an older Triton"])
def test_without_it_launches_compile(why: str, compiler: fake_gpu.Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "one core":
        monkeypatch.setattr(compile_ahead, "usable_cores", lambda: 1)
    else:
        monkeypatch.setattr(compile_ahead, "kernel_class", lambda: triton.JITFunction)
    compile_together(everything, lambda: pytest.fail("rehearsed"), show_progress=False)
    assert len(compiled_here(compiler)) == 3 == len(compiler.launched)


def test_an_older_triton_has_plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton.runtime._async_compile", None)
    assert compile_ahead.kernel_class.__wrapped__() is triton.JITFunction


# ---------------------------------------------------------------------------------------------- with a real compiler


def test_threads_compile_what_a_launch_would_find(
    compiler: fake_gpu.Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real kernels for an H100: one entry each in the cache on disk, which a second process hits."""
    from triton.compiler import CompiledKernel
    from triton.compiler.compiler import compile as real_compile

    launched: list[str] = []
    monkeypatch.setattr(triton.compiler, "compile", real_compile)
    monkeypatch.setattr(CompiledKernel, "run", property(lambda self: lambda *args: launched.append(self.hash)))
    monkeypatch.setattr(CompiledKernel, "function", None, raising=False)
    monkeypatch.setattr(CompiledKernel, "launch_metadata", lambda self, *args: None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    filters = list(warnings.filters)
    events: list[tuple[str, bool, str]] = []
    settings: Any = triton.knobs.compilation
    monkeypatch.setattr(
        settings, "listener",
        lambda src, metadata, cache_hit, **rest: events.append(
            (metadata["hash"], cache_hit, threading.current_thread().name)
        ),
    )  # fmt: skip
    compile_together(everything, everything, show_progress=False)
    assert warnings.filters == filters
    missed = [(name, thread.rpartition("_")[0]) for name, hit, thread in events if not hit]
    assert len(missed) == len(dict(missed)) == 3 and [t for _, t in missed].count("nanovllm-compile") == 2
    assert sorted(launched) == sorted(name for name, _ in missed)
    assert len([folder for folder in tmp_path.iterdir() if any(folder.glob("*.cubin"))]) == 3

    events.clear()
    compiler.new_process(monkeypatch)
    compile_together(everything, lambda: pytest.fail("rehearsed"), show_progress=False)
    assert sorted(name for name, hit, _ in events if hit) == sorted(name for name, _ in missed) and len(events) == 3


# ----------------------------------------------------------------------------------------------------- on a real GPU

START = """
import json, sys, threading
import triton
compiled = []
def listener(src, cache_hit, **event):
    if not cache_hit:
        compiled.append((src.name, threading.current_thread().name))
triton.knobs.compilation.listener = listener
from nanovllm import LLM, SamplingParams
llm = LLM(sys.argv[1], load_format="dummy", max_model_len=256, max_num_seqs=80, kvcache_block_size=32,
          num_kvcache_blocks=128, show_progress=False, skip_tokenizer_init=True)
prompts = [[5 + i, 6, 7] * (1 + 4 * i) for i in range(5)]
params = [SamplingParams(temperature=heat, seed=1, max_tokens=20, ignore_eos=True) for heat in (0, 0, 0.8, 0.8, 0)]
at_start = len(compiled)
outputs = llm.generate(prompts, params, use_tqdm=False)
print(json.dumps([compiled[:at_start], compiled[at_start:], [output.outputs[0].token_ids for output in outputs]]))
"""


@pytest.mark.gpu
@pytest.mark.parametrize("fusion", ["auto", "off"])
def test_cold_and_warm_start(fusion: str, tmp_path: Path) -> None:
    """A cold start compiles one kernel itself; a warm one compiles nothing and says the same."""
    save_model("qwen3", tmp_path)
    script = START.replace('load_format="dummy"', f'load_format="dummy", fusion="{fusion}"')
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}

    def run() -> Any:
        command = [sys.executable, "-c", script, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    cold, _, cold_tokens = run()
    warm, later, warm_tokens = run()
    assert [thread for _, thread in cold].count("MainThread") == 1, cold
    assert len(cold) >= 15 and len(cold) - 1 == sum(thread.startswith("nanovllm-compile") for _, thread in cold)
    assert warm == later == []
    assert warm_tokens == cold_tokens
