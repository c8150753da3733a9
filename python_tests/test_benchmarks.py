"""Report, comparison and instruction counts on made-up results; one row of the suite that is really run."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``load(name)`` imports a module of the folder ``benchmarks``, which is no package."""
    if not (ROOT / "benchmarks").is_dir():
        pytest.skip("no folder benchmarks beside the tests")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def timed(name: str, *, seconds: float = 1e-3, ratio: float = 4.0, spread: float = 0.1, **extra: Any) -> dict[str, Any]:
    """A row of a result file as the suite writes it; the peer took ``seconds * ratio``."""
    info = {
        "peer": "torch.nn.RNN with BPTT",
        "seconds": seconds,
        "iqr": 0.01 * seconds,
        "peer_median": seconds * ratio,
        "peer_iqr": 0.02 * seconds,
        "ratio": ratio,
        "ratio_quartiles": [ratio - spread, ratio, ratio + spread],
        "threads": 2,
        "torch": "2.99",
        "cpu_capability": "avx2",
        **extra,
    }
    return {"name": name, "extra_info": info}


def peak(model: str, bytes: int, *sizes: int) -> dict[str, Any]:
    info = dict(zip("IHBT", sizes, strict=True), model=model, peak_bytes=bytes, peak_arrays=2.0)
    return {"name": f"test_peak[{model}-T{sizes[-1]}]", "extra_info": info}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"benchmarks": rows, "machine_info": {"cpu": {"brand_raw": "Abacus 9"}}}))
    return path


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
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    for recorded, row in zip(json.loads(file.read_text())["benchmarks"], load("rows").read(file).rows, strict=True):
        assert row["repeats"] > 1
        assert recorded["stats"]["median"] == pytest.approx(row["seconds"])
        assert row["ratio"] == pytest.approx(row["peer_median"] / row["seconds"])
        assert row["seconds"] * row["repeats"] < 0.5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_pieces_of_a_long_sequence_take_the_memory_that_they_promise(load: Any) -> None:
    T, B, H = 20_000, 16, 128
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "bench_memory.py"),
        "checkpointed",
        "1",
        str(H),
        str(B),
        str(T),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    every = load("bench_memory").CHECKPOINT_EVERY
    promised = 4 * B * H * (T / every + 2 * every)
    assert int(done.stdout) < 2 * promised


# Report


def step(test: str, rule: str, sizes: tuple[int, int, int, int], *, threads: int = 2, **extra: Any) -> dict[str, Any]:
    limits = {"sgemm_gflops": 90.0 * threads, "limit_seconds": 5e-4, "limit_ratio": 8.0, "fraction_of_sgemm": 0.5}
    named = {**dict(zip("IHBT", sizes, strict=True)), "rule": rule, "loss": "last", "threads": threads, **limits}
    return timed(f"{test}[{threads}-{rule}-{sizes}]", **{**named, **extra})


@pytest.fixture
def suite() -> list[dict[str, Any]]:
    long = (1, 128, 16, 10_000)
    rows = [step("test_step", rule, (6, 100, 20, 60)) for rule in ("local", "through_time", "backprop")]
    rows[1]["extra_info"].update(ratio=3.0, limit_ratio=6.0)
    rows.append(step("test_step", "local", (6, 100, 20, 60), threads=1, ratio=1.25))
    flagship = (1, 100, 16, 784)
    for number, rule in enumerate(("local", "through_time", "backprop")):
        rows += [step("test_step", rule, flagship, loss=loss, ratio=9.0 - number) for loss in ("last", "every")]
    for loop, ratio in (("published_style", 51.0), ("tuned", 7.0)):
        rows.append(step("test_eager_loop", "local", flagship, ratio=ratio, peer=f"eager loop, {loop}"))
    for rule in ("local", "through_time", "backprop"):
        rows += [step("test_sweep", rule, (1, 100, 16, time)) for time in (30, 100, 300)]
        rows += [step("test_sweep", rule, (1, hidden, 16, 200)) for hidden in (16, 64)]
    rows += [peak("torch.nn.RNN", 900 << 20, 1, 128, 512, 784), peak("local", 500 << 20, 1, 128, 512, 784)]
    rows += [peak("through_time", 300 << 20, *long), peak("checkpointed", 20 << 20, *long)]
    chunked = {**dict(zip("IHBT", long, strict=True)), "checkpoint_every": 316}
    return [*rows, timed("test_long_sequence[a]", seconds=0.125, ratio=0.8, **chunked)]


def test_report_summary(load: Any, tmp_path: Path, suite: list[dict[str, Any]]) -> None:
    text = load("report").summary(load("rows").read(write(tmp_path / "a.json", suite)))
    assert text.startswith(
        "784 steps of 100 units, batch 16, two threads, loss on the last step (on every step): 9.0 (9.0)"
    )
    assert "8.0 (8.0) through time, 7.0 (7.0) with `Backprop()`" in text
    assert ": 51 times as fast as one in the style" in text
    assert "\n\nAbacus 9, avx2, torch 2.99, float32, torch's sgemm at 90 and 180 GFLOP/s on 1 and 2 threads; " in text
    # Only two threads; a column a rule; both limits.
    assert "| 6, 100, 20, 60 | last step | 4.00 | 1.00 **4.0** | 1.00 **3.0** | 1.00 **4.0** | 8.0 / 6.0 |" in text
    assert text.count("6, 100, 20, 60") == 1
    assert "`torch.nn.RNN` 900 MiB, local 500 MiB; one array of all states is 196 MiB" in text
    # Ours is the step by chunks: 125 ms against 100 ms are 1.25 times as long.
    assert "| 1, 128, 16, 10000 | 100 | 300 | 125 | 20 | 1.25 |" in text


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
