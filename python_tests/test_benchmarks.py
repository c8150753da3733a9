"""Report, comparison and instruction counts on made-up results; one row of the suite that is really run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmark_rows import ROOT, peak, step, timed, write

# Comparison


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ({"ratio": 4.0}, {"ratio": 3.0, "seconds": 1.3e-3}, "slower"),
        ({"ratio": 4.0}, {"ratio": 5.0, "seconds": 0.8e-3}, "faster"),
        # The middle halves overlap, however far the medians are apart.
        ({"ratio": 4.0, "spread": 1.0}, {"ratio": 2.5, "spread": 0.6, "seconds": 2e-3}, None),
        # Apart, but within the tolerance.
        ({"ratio": 4.0, "spread": 0.01}, {"ratio": 3.8, "spread": 0.01, "seconds": 1.1e-3}, None),
        # The ratio fell because the peer took less: our time did not grow.
        ({"ratio": 4.0}, {"ratio": 3.0, "seconds": 0.9e-3}, "peer"),
        ({"ratio": 4.0}, {"ratio": 5.0, "seconds": 1.1e-3}, "peer"),
        # The whole machine got slower.
        ({"ratio": 4.0}, {"ratio": 4.0, "seconds": 2e-3}, None),
    ],
)
def test_compare_judges_the_paired_ratio(
    load: Any, tmp_path: Path, old: dict[str, float], new: dict[str, float], verdict: str | None
) -> None:
    compare, rows = load("compare"), load("rows")
    before = rows.read(write(tmp_path / "old.json", [timed("test_step[a]", **old)]))
    after = rows.read(write(tmp_path / "new.json", [timed("test_step[a]", **new)]))
    found = compare.compare(before, after, 0.1)._asdict()
    assert {name for name, lines in found.items() if lines} == ({verdict} if verdict else set())
    if verdict:
        (line,) = found[verdict]
        assert line.startswith("test_step[a]: ratio 4.00 -> ")


def test_compare_judges_peaks_of_memory(load: Any, tmp_path: Path) -> None:
    compare, rows = load("compare"), load("rows")
    sizes = (1, 8, 4, 10)
    old = [peak("local", 100 << 20, *sizes), peak("backprop", 100 << 20, *sizes), peak("torch.nn.RNN", 1 << 20, *sizes)]
    new = [peak("local", 120 << 20, *sizes), peak("backprop", 101 << 20, *sizes), peak("torch.nn.RNN", 9 << 20, *sizes)]
    before, after = (rows.read(write(tmp_path / f"{i}.json", r)) for i, r in enumerate((old, new)))
    assert compare.compare(before, after, 0.1).slower == ["test_peak[local-T10]: peak 100 -> 120 MiB"]
    assert compare.compare(after, before, 0.1).faster == ["test_peak[local-T10]: peak 120 -> 100 MiB"]


def test_compare_reports_and_exits(load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare = load("compare")
    old = write(tmp_path / "old.json", [timed("test_step[a]"), timed("test_step[b]"), timed("test_step[gone]")])
    new = write(
        tmp_path / "new.json",
        [timed("test_step[a]", ratio=2.0, seconds=2e-3), timed("test_step[b]"), timed("test_step[new]", torch="3.0")],
    )
    assert compare.main([str(old), str(new)]) == 1
    out = capsys.readouterr().out
    assert "another torch: 2.99 -> 2.99, 3.0" in out
    assert "slower:\n  test_step[a]: ratio 4.00 -> 2.00 (ours 1 -> 2 ms, peer 4 -> 4 ms)" in out
    assert f"only in {old}:\n  test_step[gone]" in out
    assert f"only in {new}:\n  test_step[new]" in out
    assert "2 rows compared, 1 slower, 0 faster" in out
    assert "another processor" not in out
    assert "another GPU" not in out
    assert compare.main([str(old), str(old)]) == 0
    assert compare.main([str(old), str(new), "--tolerance", "1.5"]) == 0


def test_compare_of_nothing_is_no_success(load: Any, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.json", [timed("test_step[a]")]), write(tmp_path / "b.json", [timed("test_step[b]")])
    assert load("compare").main([str(a), str(b)]) == 2


# The suite itself


def test_a_row_is_recorded_a_call(load: Any, tmp_path: Path) -> None:
    """pytest-benchmark's own statistics, the fixture's and the report's are of one call each."""
    pytest.importorskip("pytest_benchmark")
    file = tmp_path / "row.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-enable"]
    row = ROOT / "benchmarks" / "bench_regularized_inverse.py::test_inverse[threads1-16-1]"
    command += [f"--benchmark-json={file}", str(row)]
    # beside other workers nothing is timed
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=alone)
    assert done.returncode == 0, done.stdout
    for recorded, row in zip(json.loads(file.read_text())["benchmarks"], load("rows").read(file).rows, strict=True):
        assert row["repeats"] > 1
        assert recorded["stats"]["median"] == pytest.approx(row["seconds"])
        assert row["ratio"] == pytest.approx(row["peer_median"] / row["seconds"])
        assert row["seconds"] * row["repeats"] < 0.5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("model", "scans", "read"),
    [("checkpointed", 1, 0), ("both directions, checkpointed", 2, 0), ("two layers, checkpointed", 2, 1)],
)
def test_pieces_of_a_long_sequence_take_the_memory_that_they_promise(
    load: Any, model: str, scans: int, read: int
) -> None:
    T, B, H = 20_000, 16, 128
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_memory.py"), model, "1", str(H), str(B), str(T)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    every = load("bench_memory").CHECKPOINT_EVERY
    promised = 4 * B * H * scans * (T / every + 2 * every)
    # outputs that another layer reads stand in memory, and so does their gradient
    assert int(done.stdout) < 2 * promised + 2 * read * 4 * T * B * H


# Report


def test_report_summary(load: Any, tmp_path: Path, suite: list[dict[str, Any]]) -> None:
    text = load("report").summary(load("rows").read(write(tmp_path / "a.json", suite)))
    assert "784 steps of 100 units, batch 16, two threads: how many times as fast as `torch.nn.RNN`\n\n" in text
    for way, ratio in (('credit="local"', "9.0"), ('credit="through_time"', "8.0"), ("Backprop()", "7.0")):
        assert re.search(rf"\| `{re.escape(way)}`[^|]* \| {ratio} \| {ratio} \|\n", text)
    assert "Ours is 51 times as fast as a loop in the style" in text
    assert (
        "\n\nAbacus 9, avx2, torch 2.99, float32, torch's sgemm at 90 and 180 GFLOP/s on 1 and 2 threads.\n\n" in text
    )
    # Only two threads; a column a rule; both limits.
    assert "| 6, 100, 20, 60 | last step | 4.00 | 1.00 **4.0** | 1.00 **3.0** | 1.00 **4.0** | 8.0 / 6.0 |" in text
    assert text.count("6, 100, 20, 60") == 1
    assert "`torch.nn.RNN` 900 MiB, local 500 MiB. One array of all states is 196 MiB" in text
    # Ours is the step by chunks: 125 ms against 100 ms are 1.25 times as long.
    assert "| 1, 128, 16, 10000 | 100 | 300 | 125 | 20 | 1.25 |" in text


def test_report_summary_of_feed_forward_networks(load: Any, tmp_path: Path, suite: list[dict[str, Any]]) -> None:
    text = load("report").summary(load("rows").read(write(tmp_path / "a.json", suite)))
    # Ratios are torch's time by ours; 0.625 of it is 1.6 times as long, which misses 1.5.
    assert "- `RegularizedLeastSquares` 1.60 (1.60)\n- `ConstrainedLeastSquares` 2.00 (2.00)\n" in text
    assert "reconstruction loss 2.50 (2.50)\n- `Backprop()` 0.80 (0.80)\n" in text
    assert "is 7.2 times as fast as the published way" in text
    assert "Without it, ours is 2.5 times as fast as the published way." in text
    network = "784-240-240-240-240-10, batch 100 | back-propagation in torch"
    assert f"| training step of {network} | 0.625 | 1.00 | **0.62** | ≥ 0.667 **missed** |" in text
    stream = "2,000 single samples through 784-32-10 | a layer at a time in torch"
    assert f"| {stream} | 31.0 | 1.00 | **31.0** | ≥ 30 met |" in text
    published = "batch 64 | tensors B x M x N, as published"
    assert (
        f"| update of a layer 784-32 and its input's target, {published} | 4.00 | 1.00 | **4.0** | ≥ 5 **missed** |"
        in text
    )
    assert f"| training step of 784-32-10, {published} | 1.50 | 1.00 | **1.50** |  |" in text
    # Times are those of 1,024, the verdict is that of the least ratio.
    inverses = "| 1,024 regularised inverses, {0} x {0} | the best of `torch.linalg` "
    assert inverses.format(4) + "| 12.0 | 1.00 | **9.0** to 12.0 | ≥ 8 met |" in text
    assert inverses.format(8) + "| 11.0 | 1.00 | **7.0** to 11.0 | ≥ 8 **missed** |" in text


def test_report_leaves_no_row_out(load: Any, tmp_path: Path, suite: list[dict[str, Any]]) -> None:
    report, rows = load("report"), load("rows")
    suite += [
        timed("test_of_tomorrow[a]", seconds=0.25, ratio=2.0),
        {"name": "test_untimed[b]", "extra_info": {"n": 3}},
    ]
    suite += [peak("backprop", 77 << 20, 1, 128, 512, 784)]
    text = report.details(rows.read(write(tmp_path / "a.json", suite)))
    assert "## Other rows" in text
    assert "| test_of_tomorrow[a] | 500 ± 2.50 | 250 ± 1.25 | **2.00** | 1.90 to 2.10 |" in text
    assert "| test_untimed[b] |  |  |  |  |" in text
    table_rows = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("| ---")]
    headers = text.count("\n| ---")
    assert len(table_rows) - headers == len(suite)


# Tests whose rows the report writes elsewhere than in its sections of timed rows.
OTHERS = {
    "test_ensemble_step",
    "test_gated_step",
    "test_gated_inference",
    "test_peak",
    "test_training_batch",
    "test_batch_memory",
}


def test_benchmarks_have_names_of_their_own_and_a_section(load: Any) -> None:
    """The report tells rows apart by their test's name alone."""
    files = sorted((ROOT / "benchmarks").glob("bench_*.py"))
    names = [name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)]
    assert len(names) == len(set(names))
    on_cpu = {name for name in names if not name.startswith("test_gpu_")}
    assert on_cpu == {test for _, test, _ in load("report").SECTIONS} | OTHERS


def test_report_keeps_the_rest_of_the_readme(load: Any, tmp_path: Path, suite: list[dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib")
    report = load("report")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    source = write(tmp_path / "a.json", suite)
    report.write(source, tmp_path)
    first = readme.read_text()
    assert first.startswith(f"before\n{report.BEGIN}\n784 steps")
    assert first.endswith(f"\n{report.END}\nafter\n")
    assert "old" not in first
    details = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "from `a.json`" in details
    titles = re.findall(r"^## (.*)$", details, re.MULTILINE)
    assert titles[:3] == ["Recurrent layers", "Feed-forward networks", "All rows"]
    # A row has as many cells as its table's header: every row is laid out by one list of columns.
    for block in details.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1
    assert (
        "| 6, 100, 20, 60 | 1 | last step | local | 1.25 ± 0.010 | 1.00 ± 0.005 | **1.25** | 1.15 to 1.35 |" in details
    )
    assert (tmp_path / "docs" / "speed.png").read_bytes().startswith(b"\x89PNG")
    report.write(source, tmp_path)
    assert readme.read_text() == first


def test_report_of_gates(load: Any, tmp_path: Path) -> None:
    size, rates = (1, 100, 16, 784), (("local", 3.0), ("through_time", 2.0), ("backprop", 5.0))
    rows = [step("test_gated_step", rule, size, ratio=ratio, cell="GRU") for rule, ratio in rates]
    rows.append(step("test_gated_inference", "", size, ratio=6.0, cell="GRU"))
    report, results = load("report"), load("rows").read(write(tmp_path / "gated.json", rows))
    line = "| GRU | 1, 100, 16, 784 | 3.00 | 1.00 **3.0** | 1.00 **2.0** | 1.00 **5.0** | 1.00 **6.0** |"
    assert line in report.gated(results)
    for title in ("## GRU and LSTM: whole training step", "## GRU and LSTM: inference"):
        assert title in report.gated_details(results, "gated.json")


def test_report_of_ensembles(load: Any, tmp_path: Path) -> None:
    rows = [step("test_ensemble_step", "", (1, 32, 16, 30), ratio=4.0, members=48)]
    report, results = load("report"), load("rows").read(write(tmp_path / "ensemble.json", rows))
    details = report.ensemble_details(results, "ensemble.json")
    assert "## Ensembles: 48 networks together" in details
    assert "| 1, 32, 16, 30 |" in details
    assert "**4.00**" in details


def test_report_of_learned_feedback(load: Any, tmp_path: Path) -> None:
    batch = {"network_name": "lenet", "B": 32, "method": "exact", "threads": 2, "target_ratio": 1 / 22}
    rows = [
        timed("test_training_batch[a]", ratio=0.04, **batch),
        timed("test_training_batch[b]", ratio=0.5, **{**batch, "method": "targets", "target_ratio": 1 / 2.2}),
        {
            "name": "test_batch_memory[c]",
            "extra_info": {"network_name": "lenet", "method": "exact", "B": 32, "peak_bytes": 66 << 20},
        },
    ]
    text = load("feedback_report").summary(load("rows").read(write(tmp_path / "a.json", rows)))
    assert "| network | method | 2 threads | target | peak, MiB |" in text
    # Costs are one over the ratio.
    assert "| LeNet | `LDRL`, the same gradients | 25.0 | ≤ 22 **missed** | 66 |" in text
    assert "| LeNet | targets alone, feedback fixed | 2.0 | ≤ 2.2 met |  |" in text


def test_report_names_rows_of_a_busy_machine(
    load: Any, tmp_path: Path, suite: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    report = load("report")
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    report.write(write(tmp_path / "a.json", suite), tmp_path)
    assert capsys.readouterr().out == ""
    suite[1]["extra_info"]["sgemm_gflops"] = 120.0
    report.write(write(tmp_path / "a.json", suite), tmp_path)
    assert capsys.readouterr().out.splitlines()[1:] == [f"  {suite[1]['name']}"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.234e-5, "0.012"), (9.994e-4, "0.999"), (9.996e-4, "1.00"), (0.012345, "12.3"), (0.1, "100"), (1.2345, "1234")],
)
def test_report_milliseconds(load: Any, seconds: float, text: str) -> None:
    assert load("report").ms(seconds) == text


def test_report_leaves_the_readme_alone_for_a_part_of_the_suite(
    load: Any, tmp_path: Path, suite: list[dict[str, Any]]
) -> None:
    (tmp_path / "README.md").write_text("as it was")
    for rows in (suite[:3], []):
        with pytest.raises(SystemExit, match="is not of a whole run of the suite, nothing is written; missing: test_"):
            load("report").write(write(tmp_path / "a.json", rows), tmp_path)
    assert (tmp_path / "README.md").read_text() == "as it was"
    assert not (tmp_path / "docs").exists()


def test_the_readme_has_one_place_for_the_report(load: Any) -> None:
    report = load("report")
    readme = (ROOT / "README.md").read_text()
    assert readme.count(report.BEGIN) == readme.count(report.END) == 1


# History


def newest(page: str) -> dict[tuple[str, str], tuple[str, str]]:
    """By title and processor: the header of the table and its first line."""
    found = {}
    for section in page.split("\n## ")[1:]:
        tables = re.findall(r"^(.+):\n\n(\|.*)\n\| ---.*\n(\|.*)$", section, re.MULTILINE)
        found |= {(section.partition("\n")[0], processor): lines for processor, *lines in tables}
    return found


def test_the_history_begins_with_the_present_results(load: Any) -> None:
    """Else ``python benchmarks/history.py`` was forgotten."""
    history, file = load("history"), ROOT / "docs" / "benchmark-history.md"
    if not file.is_file():
        pytest.skip("no folder docs beside the tests")
    present = newest(history.page(list(history.runs(history.present()))))
    assert {title for title, _ in present} == {title for title, _, _ in history.GROUPS}
    committed = newest(file.read_text())
    for table, lines in present.items():
        assert committed[table] == lines


def test_the_history_has_every_version_once(load: Any, tmp_path: Path) -> None:
    history, folder = load("history"), tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)

    def result(name: str, cpu: str, day: int, ratio: float, key: str, *, dirty: bool = False) -> None:
        size = dict(zip("IHBT", (1, 100, 16, 784), strict=True))
        row = timed("test_step[a]", ratio=ratio, loss="last", **size, **{key: "local"})
        commit = {"id": f"{day}" * 40, "dirty": dirty}
        data = {"benchmarks": [row], "commit_info": commit, "datetime": f"2026-01-0{day}T10:30:59.123+00:00"}
        (folder / name).write_text(json.dumps({**data, "machine_info": {"cpu": {"brand_raw": cpu}}}))

    def commit() -> None:
        for arguments in (["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
            subprocess.run(["git", *arguments], cwd=tmp_path, check=True)

    if shutil.which("git") is None:
        pytest.skip("no git")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (folder / "counts.json").write_text('{"counts": []}')
    result("cpu.json", "Abacus", 1, 0.5, "credit")  # what a rule was called at first
    commit()
    result("cpu.json", "Slide rule", 2, 3.0, "rule")
    shutil.copy(folder / "cpu.json", folder / "another.json")
    commit()
    result("cpu.json", "Abacus", 3, 4.25, "rule", dirty=True)  # not committed
    page = history.page(list(history.runs([*history.present(tmp_path), *history.past(tmp_path)])))
    lines = [line for line in page.splitlines() if line.endswith(":") or line.startswith("| 2026")]
    assert lines == [
        "Abacus, avx2:",
        "| 2026-01-03 10:30 | 3333333+ |  | 4.25 |  |  |  |  |  |",
        "| 2026-01-01 10:30 | 1111111 |  | 0.500 |  |  |  |  |  |",
        "Slide rule, avx2:",
        "| 2026-01-02 10:30 | 2222222 |  | 3.00 |  |  |  |  |  |",
    ]


# Instruction counts


def test_instructions_compare(load: Any) -> None:
    module = load("instructions")
    old = module.Counts("GNU 12", {"same": 1000, "grew": 1000, "fell": 1000, "gone": 1000})
    new = module.Counts("GNU 12", {"same": 1020, "grew": 1021, "fell": 900, "new": 5})
    lines, grew = module.compare(old, new)
    assert grew
    assert lines == [
        "same: 1,000 -> 1,020 (+2.0%)",
        "grew: 1,000 -> 1,021 (+2.1%) GREW",
        "fell: 1,000 -> 900 (-10.0%) fell",
        "new: 5, not recorded",
        "gone: recorded, not counted",
    ]
    assert not module.compare(old, old)[1]


def test_instructions_of_another_compiler_are_only_printed(load: Any) -> None:
    module = load("instructions")
    lines, grew = module.compare(module.Counts("GNU 12", {"a": 10}), module.Counts("GNU 13", {"a": 99}))
    assert not grew
    assert lines == ["counted with GNU 13, recorded with GNU 12: not compared", "a: 99"]


def test_instructions_recorded(load: Any) -> None:
    module = load("instructions")
    recorded = module.Counts(**json.loads(module.RECORD.read_text()))
    assert set(recorded.counts) == {f"{c}, {k}" for c in module.CAPABILITIES for k in module.KERNELS}
    assert all(counted > 0 for counted in recorded.counts.values())


PTXAS = """\
nvcc warning : something else
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN5tpext4cuda5sweepINS_8Bfloat16ELi64EEEvT_' for 'sm_80'
ptxas info    : Function properties for _ZN5tpext4cuda5sweepINS_8Bfloat16ELi64EEEvT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 90 registers, used 1 barriers, 16 bytes smem, 584 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN5tpext4cuda5sweepINS_8Bfloat16ELi64EEEvT_' for 'sm_90'
ptxas info    : Function properties for _ZN5tpext4cuda5sweepINS_8Bfloat16ELi64EEEvT_
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""


def write_build(build: Path, version: str = "13.0.88", **usage: int) -> Path:
    """A folder as CMake leaves it, with one log."""
    build.mkdir(exist_ok=True)
    (build / "CMakeCUDACompiler.cmake").write_text(f'set(CMAKE_CUDA_COMPILER_VERSION "{version}")\n')
    (build / "scan.cu.o.ptxas").write_text(PTXAS.format(**{"stack": 0, "stores": 0, "loads": 0} | usage))
    return build


needs_demangler = pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt here")


@needs_demangler
def test_ptxas_logs(load: Any, tmp_path: Path) -> None:
    report = load("ptxas").read(write_build(tmp_path, stack=8, stores=4, loads=12))
    assert report.compiler == "nvcc 13.0.88"
    assert report.kernels == {
        "sm_80, sweep<Bfloat16, 64>": (90, 16, 0, 0),
        "sm_90, sweep<Bfloat16, 64>": (255, 0, 16, 8),
    }


@needs_demangler
@pytest.mark.parametrize(("usage", "status"), [({}, 0), ({"stores": 4}, 1), ({"loads": 4}, 1), ({"stack": 8}, 1)])
def test_a_spill_fails_the_check(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, usage: dict[str, int], status: int
) -> None:
    module = load("ptxas")
    monkeypatch.setattr(module, "RECORD", tmp_path / "ptxas.json")
    monkeypatch.setattr(sys, "argv", ["ptxas.py", str(write_build(tmp_path / "build", **usage))])
    assert module.main() == status


@needs_demangler
def test_registers_against_the_record(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, build = load("ptxas"), write_build(tmp_path / "build")
    monkeypatch.setattr(module, "RECORD", tmp_path / "ptxas.json")
    monkeypatch.setattr(sys, "argv", ["ptxas.py", str(build), "--update"])
    assert module.main() == 0
    record = json.loads(module.RECORD.read_text())
    record["kernels"]["sm_80, sweep<Bfloat16, 64>"][0] = 80
    record["kernels"]["sm_80, gone"] = record["kernels"].pop("sm_90, sweep<Bfloat16, 64>")
    module.RECORD.write_text(json.dumps(record))
    monkeypatch.setattr(sys, "argv", ["ptxas.py", str(build)])
    capsys.readouterr()
    assert module.main() == 0
    shown = capsys.readouterr().out
    for text in ("80 -> 90", "sm_90, sweep<Bfloat16, 64> (not recorded)", "sm_80, gone (recorded, not built)"):
        assert text in shown
    write_build(build, version="12.9.1")
    assert module.main() == 0
    assert "built by nvcc 12.9.1, recorded with nvcc 13.0.88: not compared" in capsys.readouterr().out


def test_no_log_of_ptxas(load: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no log of ptxas under"):
        load("ptxas").read(tmp_path)
