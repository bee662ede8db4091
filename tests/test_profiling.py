"""Traces to numbers: reading, cutting into steps, layers from the order of kernels, accounts that add up."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import profiling_traces as synthetic
import pytest

from nanovllm.profiling import report, timeline
from nanovllm.profiling.attribute import Place, attribute, find_layers, layer_roles
from nanovllm.profiling.distil import Profile, distil, exposed_and_gaps, make_steps, representative
from nanovllm.profiling.facts import Facts, bytes_by_role
from nanovllm.profiling.recording import Recording, cut, load, load_all, save
from nanovllm.profiling.trace import (
    LABELS,
    STEP,
    WINDOW,
    Event,
    Labelled,
    Range,
    Trace,
    labelled,
    read_trace,
    short_name,
    split_steps,
    window,
)

COUNTS, TWIN = f"{WINDOW} {synthetic.CASE}", f"{LABELS} {synthetic.CASE}"


def profile_of(tmp_path: Path, fused: bool, *, layers: int = 28, gap: float = 1.0, steps: int = 6) -> Profile:
    parts = synthetic.schedule(synthetic.step_kernels(fused, layers), steps, gap, host=20.0)
    path = synthetic.write_nsys(tmp_path / f"{fused}.sqlite", parts)
    return distil(synthetic.recording(path, synthetic.facts("auto" if fused else "off", layers)))


# ---------------------------------------------------------------------------------------------------------- reading


def test_both_sources_read_alike(tmp_path: Path) -> None:
    parts = synthetic.schedule(synthetic.step_kernels(True, 3), 2, 0.5, host=9.0)
    nsys = window(read_trace(synthetic.write_nsys(tmp_path / "a.sqlite", parts)), COUNTS)
    torch = window(read_trace(synthetic.write_torch(tmp_path / "a.json", parts)), COUNTS)
    assert (nsys.source, torch.source) == ("nsys", "torch.profiler")
    assert nsys.events == torch.events and nsys.ranges == torch.ranges
    assert len(nsys.events) == sum(map(len, parts))  # the kernel before the window is gone
    assert all(event.in_graph for event in nsys.events)
    first = nsys.events[0]
    assert (first.name, first.start, first.end) == parts[0][0] and first.launched == first.start - 500


def test_events_are_sorted_whatever_the_file_says(tmp_path: Path) -> None:
    (step,) = synthetic.schedule(synthetic.step_kernels(True, 2), 1, 0.5, host=0)
    trace = read_trace(synthetic.write_torch(tmp_path / "a.json", [[step[0], *reversed(step[1:-1]), step[-1]]]))
    assert [e.start for e in trace.events] == sorted(e.start for e in trace.events)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.sqlite", b"no database at all", "is no export of nsys"),
        ("a.json", b"{", "is no trace of torch.profiler"),
        ("a.json", b'{"traceEvents": []}', "holds no kernel"),
        ("a.json.gz", b"plain", "is no trace of torch.profiler"),
    ],
)
def test_broken_traces_are_refused_in_a_sentence(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_trace(tmp_path / name)


def test_missing_trace(tmp_path: Path) -> None:
    for name in ("a.sqlite", "a.json"):
        with pytest.raises(FileNotFoundError, match="no trace at"):
            read_trace(tmp_path / name)
    assert not (tmp_path / "a.sqlite").exists()  # sqlite3 would have made one


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        ("_decode_kernel", "_decode_kernel"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>(cublasLt::P)", "splitKreduce_kernel"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*>>"
            "(int, at::native::CUDAFunctor_add<float>, std::array<char*, 3>)",
            "vectorized_elementwise_kernel<CUDAFunctor_add>",
        ),
        ("void (anonymous namespace)::softmax_warp_forward<float>(float*)", "softmax_warp_forward"),
        (
            "void at::native::<unnamed>::indexSelectSmallIndex<c10::BFloat16, long, unsigned int>(int)",
            "indexSelectSmallIndex",
        ),
    ],
)
def test_short_names(demangled: str, short: str) -> None:
    assert short_name(demangled) == short


def test_a_kernel_belongs_to_the_step_that_launched_it() -> None:
    """With overlap, step 2 is launched while step 1 still runs."""
    ranges = (Range(STEP, 0, 10), Range(STEP, 20, 30))
    events = (Event("a", "kernel", 5, 50, launched=4), Event("b", "kernel", 25, 60, launched=6))
    late = Event("c", "kernel", 70, 80, launched=21)
    steps = split_steps(Trace("nsys", (*events, late), ranges))
    assert [[e.name for e in part] for _, part in steps] == [["a", "b"], ["c"]]
    unknown = tuple(Event(e.name, "kernel", e.start, e.end) for e in (*events, late))
    assert [[e.name for e in part] for _, part in split_steps(Trace("nsys", unknown, ranges))] == [["a"], ["b", "c"]]


def test_no_steps() -> None:
    event = Event("a", "kernel", 5, 50, launched=4)
    with pytest.raises(ValueError, match="no range named"):
        split_steps(Trace("nsys", (event,), ()))
    with pytest.raises(ValueError, match=f"no range named '{COUNTS}'"):
        distil(Recording(synthetic.facts("off"), Trace("nsys", (event,), ())))
    empty = Trace("nsys", (event,), (Range(COUNTS, 100, 200), Range(STEP, 101, 150)))
    with pytest.raises(ValueError, match="no kernel ran inside a recorded step"):
        distil(Recording(synthetic.facts("off"), empty))


# ------------------------------------------------------------------------------------------------------ attribution


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layers", [2, 16, 28])
def test_every_kernel_finds_its_layer_and_role(fused: bool, layers: int) -> None:
    kernels = synthetic.step_kernels(fused, layers)
    places = attribute([name for name, _, _ in kernels], layers)
    assert [place.role for place in places] == [role for _, _, role in kernels]
    per_layer = len(synthetic.FUSED_LAYER if fused else synthetic.PLAIN_LAYER)
    end = 1 + layers * per_layer
    assert [place.layer for place in places[1:end]] == [i // per_layer for i in range(layers * per_layer)]
    assert {place.layer for place in [*places[:1], *places[end:]]} == {None}


def test_a_first_layer_that_differs() -> None:
    """Its norm was fused with the embedding: the other 27 repeat, layer 0 is what is left of the pattern."""
    kernels = synthetic.step_kernels(False, 28)
    names = ["embed_norm", *(name for name, _, _ in kernels[2:])]
    places = attribute(names, 28)
    assert places[0] == Place(None, "prepare")
    assert [p.layer for p in places[1:10]] == [0] * 9 and [p.layer for p in places[10:20]] == [1] * 10
    assert places[1].role == "qkv" and places[-1].role == "sample"


def test_a_last_layer_that_differs() -> None:
    kernels = synthetic.step_kernels(False, 28)
    names = [name for name, _, _ in kernels]
    down = 1 + 28 * 10 - 1
    places = attribute([*names[:down], "gemvx_last", "something", *names[down + 1 :]], 28)
    assert places[down - 1] == Place(27, "activation") and places[1] == Place(0, "norm")


def test_a_whole_layer_in_one_kernel() -> None:
    places = attribute(["embed", *["layer_gemv"] * 16, "head_gemv"], 16)
    assert [p.role for p in places] == ["prepare", *["layer"] * 16, "head"]


def test_split_linears_and_strangers_join_their_neighbour() -> None:
    names = ["gemm", "splitKreduce_kernel", "flash_fwd_splitkv_kernel", "gemm", "copy_thing", "gemm", "gemm"]
    assert layer_roles(names) == ["qkv", "qkv", "attention", "o_proj", "o_proj", "gate_up", "down"]


def test_nothing_repeats() -> None:
    assert find_layers(["a", "gemm", "b", "attention"], 2) is None
    assert find_layers(["fill"] * 30, 28) is None, "repeated copies are no layers"
    assert [p.layer for p in attribute(["gemm", "norm"], 28)] == [None, None]
    assert attribute([], 28) == []


@pytest.mark.parametrize("fused", [False, True])
def test_a_labelled_step_places_kernels_whatever_they_are_called(tmp_path: Path, fused: bool) -> None:
    """The roles of a chain whose kernels are all called the same, which no rule of names or order could tell."""
    layers = 5
    kernels = [("k", length, role) for _, length, role in synthetic.step_kernels(fused, layers)]
    path = synthetic.write_nsys(tmp_path / "a.sqlite", synthetic.schedule(kernels, 3, 0.5, host=9.0))
    synthetic.add_labels(path, kernels, synthetic.step_layers(fused, layers))
    profile = distil(synthetic.recording(path, synthetic.facts("auto", layers)))
    assert [p.place.role for p in profile.median.placed] == [role for _, _, role in kernels]
    assert [p.place.layer for p in profile.median.placed] == synthetic.step_layers(fused, layers)
    assert profile.layers_found and len(profile.steps) == 2, "the labelled step is none of the recorded ones"


def test_labels_are_the_ranges_at_the_time_of_the_launch(tmp_path: Path) -> None:
    kernels = synthetic.step_kernels(False, 2)
    path = synthetic.write_nsys(tmp_path / "a.sqlite", synthetic.schedule(kernels, 2, 0.5, host=9.0))
    assert labelled(read_trace(path), TWIN) == []
    synthetic.add_labels(path, kernels, synthetic.step_layers(False, 2))
    found = labelled(read_trace(path), TWIN)
    assert [kernel.name for kernel in found] == [name for name, _, _ in kernels]
    assert found[2] == Labelled(kernels[2][0], ("model.layers.0", "model.layers.0.self_attn.qkv_proj"))
    assert found[-1].ranges == (), "nobody's range is open behind the head"


def test_steps_that_differ_from_their_labelled_twin() -> None:
    """Another batch size: other names for some kernels, one linear split in two."""
    kernels = synthetic.step_kernels(False, 3)
    layers = synthetic.step_layers(False, 3)
    twin = [
        Labelled(name, (synthetic.MODULES[role].format(layer),) if role in synthetic.MODULES else ())
        for (name, _, role), layer in zip(kernels, layers, strict=True)
    ]
    names = [name for name, _, _ in kernels]
    down = 1 + 2 * 10 - 1  # of layer 1
    names[down : down + 1] = ["another_gemm", "splitKreduce_kernel"]
    names[3] = "renamed"
    places = attribute(names, 3, twin)
    assert places[3] == Place(0, "rope")
    assert places[down] == places[down + 1] == Place(1, "down") and places[down + 2] == Place(2, "norm")
    assert [p.role for p in places[-4:]] == ["final norm", "head", "sample", "sample"]


def test_an_unfused_linear_keeps_its_norm_and_activation() -> None:
    path = "model.layers.0.mlp.gate_up_proj"
    own = [Labelled(name, (path,)) for name in ("_rms_norm_kernel", "nvjet", "_silu_mul_kernel")]
    twin = [*own, Labelled("gather", ("model",)), Labelled("_rms_norm_kernel", ("lm_head",)), Labelled("pick", ())]
    places = attribute([kernel.name for kernel in twin], 1, twin)
    assert [(p.layer, p.role) for p in places] == [
        (0, "norm"), (0, "gate_up"), (0, "activation"), (None, "final norm"), (None, "head"), (None, "sample"),
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------- recordings


def test_a_recording_survives_its_file(tmp_path: Path) -> None:
    kernels = synthetic.step_kernels(True, 28)
    path = synthetic.write_nsys(tmp_path / "a.sqlite", synthetic.schedule(kernels, 32, -0.5, host=9.0))
    synthetic.add_labels(path, kernels, synthetic.step_layers(True, 28))
    whole = read_trace(path)
    recording = Recording(synthetic.facts("auto"), cut(whole, synthetic.CASE), "no counters")
    file = save(recording, tmp_path)
    assert load(file) == recording and file.stat().st_size < 100_000
    assert len(recording.trace.events) == 33 * len(kernels) == len(whole.events) - 1, "the stray kernel is cut off"
    save(Recording(synthetic.facts("off"), recording.trace), tmp_path)
    assert [r.facts.fusion for r in load_all(tmp_path)[synthetic.CASE]] == ["off", "auto"]
    (tmp_path / "other.profile.json.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="is no recorded profile"):
        load_all(tmp_path)


# ----------------------------------------------------------------------------------------------------------- accounts


def test_exposed_time_and_gaps_add_up() -> None:
    def kernel(start: int, end: int) -> Event:
        return Event("k", "kernel", start, end)

    events = [kernel(10, 30), kernel(25, 40), kernel(26, 28), kernel(50, 60)]
    accounts = exposed_and_gaps(events, begin=4)
    assert accounts == [(20, 6), (10, 0), (0, 0), (10, 10)]
    assert sum(map(sum, accounts)) == 60 - 4
    assert exposed_and_gaps([kernel(0, 10), kernel(1, 20)], begin=15) == [(0, 0), (5, 0)]


@pytest.mark.parametrize(("fused", "gap"), [(False, 0.9), (True, -0.4), (True, 0.0)])
def test_rows_add_up_to_the_step(tmp_path: Path, fused: bool, gap: float) -> None:
    profile = profile_of(tmp_path, fused, gap=gap)
    for rows in (profile.roles, profile.kernels):
        assert sum(r.exposed_us + r.gap_us for r in rows) == pytest.approx(profile.mean_period_us)
        assert sum(r.share for r in rows) == pytest.approx(1)
        assert sum(r.calls for r in rows) == len(synthetic.step_kernels(fused, 28))
    assert len(profile.steps) == 5, "the first step has no begin"
    assert profile.layers_found and profile.median in profile.steps
    idle = 20 + max(0, gap) * (len(synthetic.step_kernels(fused, 28)) - 1)
    assert profile.idle_share * profile.mean_period_us == pytest.approx(idle, rel=1e-3)


def test_isolated_steps_begin_with_their_request(tmp_path: Path) -> None:
    parts = synthetic.schedule(synthetic.step_kernels(False, 4), 3, 0.0, host=500.0)
    trace = window(read_trace(synthetic.write_nsys(tmp_path / "a.sqlite", parts)), COUNTS)
    steps, layered = make_steps(split_steps(trace), 4, isolated=True)
    assert len(steps) == 3 and layered
    assert all(step.placed[0].gap == 700 for step in steps)  # from the range to its first kernel


def test_the_median_step_has_the_commonest_kernels(tmp_path: Path) -> None:
    steps = list(profile_of(tmp_path, True).steps)
    short = steps[0].__class__(steps[0].begin, steps[0].end, steps[0].placed[:1])
    assert representative([short, *steps]) in steps


def test_bytes_are_those_of_the_weights(tmp_path: Path) -> None:
    """Qwen3-0.6B at batch 1 reads 1.192 GB of weights: linears of 28 layers and the tied head."""
    facts = synthetic.facts("off")
    traffic = bytes_by_role(facts)
    weights = sum(traffic[role] for role in ("qkv", "o_proj", "gate_up", "down", "head"))
    assert weights == pytest.approx(1.192e9, rel=2e-3)
    assert traffic["attention"] == pytest.approx(28 * (2 * 8 * 128 * 150 + 2 * 16 * 128) * 2)
    assert "attention" not in bytes_by_role(synthetic.facts("off", kv_tokens=0.0))
    profile = profile_of(tmp_path, False)
    head = next(row for row in profile.roles if row.name == "head")
    assert head.gb_s == pytest.approx(traffic["head"] / ((head.exposed_us + head.gap_us) * 1e-6) / 1e9)


def test_facts_survive_json() -> None:
    facts = synthetic.facts("auto")
    assert Facts.from_json(facts.to_json()) == facts
    for broken in ("", "{}", "[]"):
        with pytest.raises(ValueError, match="not the facts"):
            Facts.from_json(broken)


# ------------------------------------------------------------------------------------------------------------ reports


def test_summary_csv_is_complete(tmp_path: Path) -> None:
    profiles = [profile_of(tmp_path, fused) for fused in (False, True)]
    rows = list(csv.DictReader(io.StringIO(report.summary_csv(profiles))))
    assert {row["fusion"] for row in rows} == {"off", "auto"} and {row["level"] for row in rows} == {
        "step",
        "role",
        "kernel",
    }
    for profile in profiles:
        own = [row for row in rows if row["fusion"] == profile.facts.fusion]
        (step,) = (row for row in own if row["level"] == "step")
        parts = sum(float(r["exposed_us"]) + float(r["gap_us"]) for r in own if r["level"] == "role")
        assert parts == pytest.approx(float(step["exposed_us"]) + float(step["gap_us"]), rel=1e-3)
        assert all(row["device"] == "Synthetic GPU" and row["torch"] for row in own)


def test_notes_say_where_they_come_from(tmp_path: Path) -> None:
    profile = profile_of(tmp_path, True)
    text = report.notes([profile])
    assert "recorded with nsys" in text and "Synthetic GPU" in text and "`_rope_attention_kernel`" in text
    assert "guesses" not in text
    lost = profile.__class__(**{**{f: getattr(profile, f) for f in profile.__slots__}, "layers_found": False})
    assert "guesses" in report.notes([lost])


def test_a_graph_that_takes_longer_than_its_step_is_said_so(tmp_path: Path) -> None:
    profile = profile_of(tmp_path, True)
    for graph, words in ((500.0, "100 µs a step are outside"), (678.0, "Its graph takes 78 µs more when it is")):
        facts = dataclasses.replace(profile.facts, free_step_us=600.0, free_wait_us=400.0, free_graph_us=graph)
        assert words in report.pace(dataclasses.replace(profile, facts=facts))


def test_timeline_is_one_file_with_all_kernels(tmp_path: Path) -> None:
    profiles = [profile_of(tmp_path, fused) for fused in (False, True)]
    page = timeline.render(profiles)
    assert len(page) < 1_000_000
    assert not re.search(r"(?:src|href)\s*=|url\(|@import|https?://", page), "it must open from disk, offline"
    data = json.loads(re.search(r"^const data = (.*);$", page, re.MULTILINE)[1])
    for lane, profile in zip(data["lanes"], profiles, strict=True):
        assert len(lane["events"]) == len(profile.median.placed)
        assert sum(e[5] + e[6] for e in lane["events"]) == pytest.approx(lane["length"], abs=0.5)
    with pytest.raises(ValueError, match="at least one"):
        timeline.render([])


def test_timeline_escapes_names(tmp_path: Path) -> None:
    parts = synthetic.schedule([("</script><b>", 2.0, ""), *synthetic.step_kernels(True, 2)], 3, 0.1, host=1.0)
    path = synthetic.write_nsys(tmp_path / "a.sqlite", parts)
    page = timeline.render([distil(synthetic.recording(path, synthetic.facts("off", 2, model="<i>&")))])
    assert page.count("</script>") == 1 and "<i>&" not in page and "&lt;i&gt;&amp;" in page


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_timeline_script_is_valid(tmp_path: Path) -> None:
    script = re.search(r"<script>(.*)</script>", timeline.render([profile_of(tmp_path, True)]), re.DOTALL)[1]
    (tmp_path / "a.js").write_text(script)
    subprocess.run(["node", "--check", str(tmp_path / "a.js")], check=True)
