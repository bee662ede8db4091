"""Numbers in documents are those of metrics.csv, tables are what the rows give, and the CSV is never half-written."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import profiling_traces as synthetic
import pytest
import report
from harness.records import METRICS, Record, read, write
from profiling.rows import profile_rows
from reporting.docs import documents, refresh
from reporting.query import lookup
from reporting.roofline import points, roofs
from reporting.series import current, gpus, lines, slug
from reporting.tables import number, tables

from nanovllm.profiling.distil import Profile, distil

ROOT = Path(__file__).resolve().parents[1]
GPU = "NVIDIA H100 80GB HBM3"


def record(**fields: object) -> Record:
    base = Record("decode", "ms_per_token", 1.4567, model="M", device=GPU, batch="1", date="2026-01-02")
    return dataclasses.replace(base, **fields)


def profiled(tmp_path: Path, fused: bool) -> Profile:
    parts = synthetic.schedule(synthetic.step_kernels(fused, 28), 4, 0.5, host=9.0)
    path = synthetic.write_nsys(tmp_path / f"{fused}.sqlite", parts)
    facts = synthetic.facts("auto" if fused else "off", device=GPU, date="2026-01-02", commit="abc")
    return distil(synthetic.recording(path, facts))


# -------------------------------------------------------------------------------------------------- the real documents


@pytest.mark.parametrize("path", documents(ROOT), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_quoted_numbers_are_in_the_csv(path: Path) -> None:
    """`make report` mends this."""
    _, complaints = refresh(path.read_text(encoding="utf-8"), read(METRICS))
    assert not complaints, "\n" + "\n".join(complaints)


def test_tables_are_what_the_rows_give() -> None:
    """`make report` mends this."""
    assert (METRICS.parent / "tables.md").read_text(encoding="utf-8") == tables(read(METRICS))


# --------------------------------------------------------------------------------------------------------- descriptions


@pytest.mark.parametrize(
    ("description", "number"),
    [
        ("test=decode metric=ms_per_token batch=1", "1.46"),
        ("test=decode metric=ms_per_token batch=1 fmt=.1f", "1.5"),
        ("test=decode metric=ms_per_token batch=1 scale=1000 fmt=,.0f", "1,457"),
        ("test=decode metric=ms_per_token batch=2 engine=vllm", "5"),
        (
            "test=decode metric=ms_per_token batch=2 engine=vllm / test=decode metric=ms_per_token batch=2 fmt=.2f",
            "2.50",
        ),
        ("test=decode metric=ms_per_token batch=* agg=count fmt=.0f", "2"),
        ("test=op metric=speedup options='* fused' agg=geomean fmt=.3f", "2.000"),
        ("test=op metric=speedup options='* fused' agg=min", "1"),
    ],
)
def test_descriptions(description: str, number: str) -> None:
    rows = [record(), record(batch="2", value=2.0), record(batch="2", value=5.0, engine="vllm")]
    rows += [record(test="op", metric="speedup", value=v, options=f"{o} fused") for v, o in ((1.0, "qkv"), (4.0, "up"))]
    assert lookup(description, rows) == number


@pytest.mark.parametrize(
    ("description", "sentence"),
    [
        ("test=decode metric=ms_per_token batch=7", "no row of metrics.csv has"),
        ("test=decode metric=ms_per_token", "2 rows have .*: say more about batch, or use agg="),
        ("metric=ms_per_token", "test= and metric= are needed"),
        ("test=decode metric=ms_per_token size=1", "unknown size"),
        ("test=decode metric=ms_per_token agg=mean", "agg must be one of"),
        ("test=decode metric=ms_per_token batch=1 fmt=q", "batch=1 fmt=q"),
    ],
)
def test_bad_descriptions_are_one_sentence(description: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        lookup(description, [record(), record(batch="2")])


def test_a_marked_number_that_differs_is_found_and_mended() -> None:
    text = "It takes <!-- metric: test=decode metric=ms_per_token -->1.47<!-- /metric --> ms."
    mended, complaints = refresh(text, [record()])
    assert complaints == ["says '1.47' where metrics.csv gives '1.46' for test=decode metric=ms_per_token"]
    assert mended == text.replace("1.47", "1.46") and refresh(mended, [record()]) == (mended, [])


@pytest.mark.parametrize(
    "text",
    [
        "<!-- metric: test=decode metric=ms_per_token -->1.46",
        "<!-- metric: test=decode metric=ms_per_token -->1.4\n6<!-- /metric -->",
        "<!-- metric: test=gone metric=ms_per_token -->1.46<!-- /metric -->",
    ],
)
def test_a_broken_marker_is_a_complaint_and_stays(text: str) -> None:
    mended, complaints = refresh(text, [record()])
    assert mended == text and complaints


def test_rewriting_and_checking_a_tree(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "docs").mkdir()
    for path in (tmp_path / "README.md", tmp_path / "docs" / "a.md"):
        path.write_text("<!-- metric: test=decode metric=ms_per_token -->?<!-- /metric -->")
    rows = [record(), record(batch="2", value=2.0, test="other")]
    assert len(report.check(rows, tmp_path)) == 3
    assert report.rewrite(rows, tmp_path) == []
    assert "-->1.46<" in (tmp_path / "docs" / "a.md").read_text()
    assert report.check(rows, tmp_path) == []
    assert report.check([record(value=3.0)], tmp_path) != []


# -------------------------------------------------------------------------------------------------------------- drawing


def test_lines_are_sorted_and_the_newest_row_wins() -> None:
    rows = [
        record(batch=b, value=v, date=d) for b, v, d in (("16", 3, "1"), ("2", 9, "3"), ("2", 1, "2"), ("4", 2, "1"))
    ]
    rows += [record(engine="vllm", version="0.26.0"), record(options="fusion=off"), record(batch="100-1024")]
    ours, unfused, theirs = lines(rows, "batch")
    assert ours.points == ((2, 9), (4, 2), (16, 3)) and ours.ours and not theirs.ours
    assert (unfused.label, theirs.label) == ("nano-vllm-coconut, unfused", "vLLM 0.26.0")


def test_plots_leave_out_earlier_engines_of_ours() -> None:
    """A new commit's rows push out those of older days, and models that it has no row of; one day's commits stay."""
    new = [
        record(date="2", commit="b"),
        record(date="3", commit="b", batch="2"),
        record(date="3", commit="a", batch="4"),
    ]
    peer = record(engine="vllm", date="1", batch="8")
    old = [
        record(date="1", commit="a", batch="8"),
        record(date="1", commit="a", model="N"),
        record(engine="vllm", model="N"),
    ]
    assert current([*old, peer, *new]) == [peer, *new]
    assert current([peer]) == [peer]


def test_measured_roofs_win() -> None:
    row = record(test="roof", metric="read_bytes_per_s", value=3e12)
    assert roofs([row], (4e12, 9e14)) == ((3e12, "measured"), (9e14, "data sheet"))


def test_gpus_are_told_from_cpus() -> None:
    rows = [record(device="AMD EPYC, 2 threads"), record(), record(device="NVIDIA H200", date="2026-02-01")]
    assert gpus(rows) == ["NVIDIA H200", GPU] and slug(GPU) == "h100-80gb-hbm3"


def test_the_roofline_knows_the_shapes() -> None:
    """Qwen3-0.6B's qkv is [4096, 1024]: 8.4 MB in bf16, so that 2.8 us at one row are 3.0 TB/s and as many FLOP/s."""
    row = record(test="fusion_operator", metric="us", value=2.8, model="Qwen3-0.6B", options="qkv fused")
    ((intensity, flops),) = points([row], "fused")
    assert intensity == pytest.approx(1, rel=2e-3) and flops == pytest.approx(2 * 4096 * 1024 / 2.8e-6)
    assert points([dataclasses.replace(row, model="unknown")], "fused") == []


def test_every_plot_is_drawn_and_stale_ones_go(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [*read(METRICS), record(value=2.0, engine="vllm", version="1", model="Qwen3-0.6B", dtype="bfloat16")]
    grid = {"model": "Qwen3-0.6B", "date": "2099-01-01", "commit": "abc"}
    rows += [
        record(**grid, batch=b, prompt=p, options=o) for b in "14" for p in ("128", "512") for o in ("", "fusion=off")
    ]
    for fused in (False, True):
        rows += profile_rows(profiled(tmp_path, fused))
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "stale.png").write_bytes(b"")
    written = report.draw([r for r in rows if r.device == GPU], tmp_path / "plots")
    kinds = ("decode", "decode_length", "decode_speedup", "prefill", "workload")
    kinds += ("fusion_speedup", "fusion_dependent", "roofline", "time")
    assert written == [f"{kind}_h100-80gb-hbm3.png" for kind in kinds]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(written)
    assert all((tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in written)


def test_profile_rows_add_up_to_the_step(tmp_path: Path) -> None:
    profile = profiled(tmp_path, True)
    rows = profile_rows(profile)
    assert len({r.key for r in rows}) == len(rows)
    parts = sum(r.value for r in rows if "role=" in r.options)
    assert parts == pytest.approx(profile.mean_period_us)
    assert "| Qwen3-0.6B | decode-b1 | auto |" in tables(rows)


@pytest.mark.parametrize(
    ("value", "text"), [(0.391, "0.391"), (2.4, "2.40"), (14.34, "14.3"), (15203.1, "15,203"), (99.96, "100.0")]
)
def test_numbers_in_tables(value: float, text: str) -> None:
    assert number(value) == text


# -------------------------------------------------------------------------------------------------------------- the CSV


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_csv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    target = tmp_path / "metrics.csv"
    write([record()], target)
    before = target.read_bytes()

    def fail(_: int) -> None:
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    sentence = "cannot write .*No space left on device.*the old file is unchanged"
    with pytest.raises(type(failure), match=sentence if isinstance(failure, OSError) else None):
        write([record(batch="2")], target)
    assert target.read_bytes() == before and list(tmp_path.iterdir()) == [target]


def test_an_interrupt_between_rows_leaves_the_old_csv(tmp_path: Path) -> None:
    target = tmp_path / "metrics.csv"
    write([record()], target)

    class Interrupts(float):
        def __format__(self, _: str) -> str:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write([record(batch="2", value=Interrupts(1))], target)
    assert [r.batch for r in read(target)] == ["1"] and list(tmp_path.iterdir()) == [target]


def test_rows_of_another_machine_are_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "rewrite", lambda records: [])
    target, theirs = tmp_path / "metrics.csv", tmp_path / "theirs.csv"
    monkeypatch.setattr(report, "write", lambda rows: write(rows, target))
    monkeypatch.setattr(report, "read", lambda path=target: read(path))
    write([record(), record(batch="2", value=2.0)], target)
    write([record(batch="2", value=3.0), record(batch="4")], theirs)
    assert report.main(["--merge", str(theirs)]) == 0
    assert {r.batch: r.value for r in read(target)} == {"1": 1.4567, "2": 3.0, "4": 1.4567}
    assert report.main(["--merge", str(tmp_path / "none.csv")]) == 1
    assert "none.csv does not exist: nothing was merged" in capsys.readouterr().err


def test_without_rows_the_report_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "read", lambda: [])
    assert report.main(["--check"]) == 1
    assert "has no rows: run a benchmark first" in capsys.readouterr().err
