"""What the rows on a GPU say: a section of docs/benchmarks.md and README.md, and the summary of gpu_check.sh.

``python benchmarks/gpu_report.py FOLDER`` writes FOLDER/summary.md from the logs and the gpu.json in it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import feedback_report
from rows import RULES, Results, Row, met, ms, read, sizes, table, verdict

PARTS = ("build", "test", "sanitize", "bench", "cpu")
Columns = dict[str, Callable[[Row], str]]


def machine(results: Results) -> str:
    gpu = results.gpu
    return (
        f"{gpu['name']} ({gpu['multiprocessors']} multiprocessors at {gpu['clock_ghz']:.2f} GHz), torch "
        f"{gpu['torch']}, CUDA {gpu['cuda']}, cuDNN {gpu['cudnn']}; a copy on the device moves "
        f"{gpu['copy_gbs']:,.0f} GB/s, torch's products of random 8192 x 8192 matrices reach {gpu['fp32_tflops']:.0f} "
        f"TFLOP/s in float32 and {gpu['bf16_tflops']:.0f} in bfloat16"
    )


def side(row: Row, name: str, mode: str) -> str:
    """Median of a side in ms; a dash where it was not timed so."""
    quartiles = row["sides"].get(name, {}).get(mode)
    return "-" if quartiles is None else ms(quartiles[1])


def peer_side(mode: str) -> Callable[[Row], str]:
    """The same of the side that the peer's time is of."""
    return lambda row: side(row, row["peer"].rpartition(", ")[0], mode)


def host(row: Row, name: str) -> str:
    return f"{row['sides'][name]['host'] * 1e6:.0f}"


def ratio(row: Row) -> str:
    low, _, high = row["ratio_quartiles"]
    return f"**{row['ratio']:.2f}** ({low:.2f} to {high:.2f})"


SIZE: Columns = {" I, H, B, T": sizes}
RULE: Columns = {" rule": lambda row: RULES[row["rule"]]}
LOSS: Columns = {" loss on": lambda row: f"{row['loss']} step"}
PEER: Columns = {" best peer": lambda row: row["peer"]}
TIMES: Columns = {
    "peer eager, ms": peer_side("eager"),
    "graph": peer_side("graph"),
    "ours eager": lambda row: side(row, "ours", "eager"),
    "graph ": lambda row: side(row, "ours", "graph"),
    "ratio (quartiles)": ratio,
    " target": verdict,
}


def laid_out(rows: Iterable[Row], columns: Columns) -> str:
    return table(list(columns), [[get(row) for get in columns.values()] for row in rows])


def missed_captures(results: Results) -> list[str]:
    return [f"{row['name']}, {side}: {e}" for row in results.rows for side, e in row.get("graph_errors", {}).items()]


def kernels_alone(rows: list[Row]) -> str:
    """Microseconds a step, by regime; in brackets what the model predicts."""
    regimes = list(dict.fromkeys(row["regime"] for row in rows))
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = (row["op"], row["dtype"], f"{row['H']}, {row['B']}, {row['T']}")
        groups.setdefault(key, {})[row["regime"]] = row

    def cell(row: Row | None) -> str:
        if row is None:
            return "-"
        predicted = row["predicted_us_per_step"]
        return f"{row['us_per_step']:.3f}" + ("" if predicted is None else f" ({predicted:.3f})")

    cells = [[*key, *(cell(found.get(regime)) for regime in regimes)] for key, found in groups.items()]
    return table([" kernel", " dtype", " H, B, T", *regimes], cells)


def sections(results: Results, level: str = "###") -> list[str]:
    """All rows, as paragraphs of Markdown."""
    parts = []

    def section(title: str, said: str, rows: list[Row], columns: Columns) -> None:
        if rows:
            parts.extend([f"{level} {title}", said, laid_out(rows, columns)])

    section(
        "Whole training step in float32 against `torch.nn.RNN` (cuDNN)",
        "TF32 off; cuDNN's default, on, is in the column after the peer's. The host's time is that until an eager "
        "call returns from an idle device: Python and launches.",
        results.of("test_gpu_step"),
        {
            **SIZE,
            **LOSS,
            **RULE,
            **dict(list(TIMES.items())[:2]),
            "TF32, graph": lambda row: side(row, "cuDNN, TF32", "graph"),
            **dict(list(TIMES.items())[2:]),
            "host, peer, us": lambda row: host(row, "cuDNN"),
            "ours": lambda row: host(row, "ours"),
        },
    )

    def faster(row: Row) -> str:
        """How much the graph of ours gains over that in float32."""
        found = [row["sides"][name].get("graph") for name in ("ours, float32", "ours")]
        return f"{found[0][1] / found[1][1]:.2f}" if all(found) else "-"

    def errors(field: str) -> Callable[[Row], str]:
        return lambda row: " / ".join(f"{rms:.1e} ({largest:.1e})" for rms, largest in row[field].values())

    section(
        "Whole training step in bfloat16 against cuDNN in bfloat16",
        "Errors are those of states / of the recurrent weights' gradient against the same step in float64, relative: "
        "root-mean-square (largest). The last column is the largest of ours by cuDNN's; wanted: at most 2.",
        results.of("test_gpu_low_precision"),
        {
            **SIZE,
            **RULE,
            **dict(list(TIMES.items())[:5]),
            "float32 by it": faster,
            "cuDNN's errors": errors("peer_errors"),
            "ours ": errors("errors"),
            "by cuDNN's": lambda row: f"{row['error_ratio']:.2f}" + ("" if row["error_ratio"] <= 2 else " **missed**"),
        },
    )
    section(
        "Training step of GRU and LSTM in float32 against cuDNN",
        "Forward and backward pass with a loss on every step; TF32 off, in the column after the peer's on.",
        results.of("test_gpu_gated_step"),
        {
            " cell": lambda row: row["cell"],
            **SIZE,
            **RULE,
            **dict(list(TIMES.items())[:2]),
            "TF32, graph": lambda row: side(row, "cuDNN, TF32", "graph"),
            **dict(list(TIMES.items())[2:]),
        },
    )
    loops = results.of("test_gpu_eager_loop")
    section("Whole training step against loops of torch operations", "Eagerly.", loops, {**SIZE, **PEER, **TIMES})
    inverse: Columns = {" batch x n x n": lambda row: f"{row['batch']} x {row['n']} x {row['n']}"}
    section(
        "Regularised inverse",
        "Against the best of `torch.linalg.solve_ex`, `cholesky_ex` with `cholesky_solve`, and `inv_ex`.",
        results.of("test_gpu_inverse"),
        {**inverse, **PEER, **TIMES},
    )
    feedback = results.of("test_gpu_training_batch")
    if feedback:
        parts += [
            f"{level} Learned feedback",
            f"Cost of a whole training batch of {feedback[0]['B']} images at the published iterations and channels, in "
            "steps of back-propagation in torch on the same network; eagerly, float32, TF32 off.",
            feedback_report.on_a_gpu(results),
        ]
    alone = [row for row in results.rows if "us_per_step" in row]
    if alone:
        parts += [
            f"{level} Scans alone",
            "Microseconds a step by regime, and what the model of csrc/cuda/sweep.h predicts.",
        ]
        parts.append(kernels_alone(alone))
    traced = results.of("test_gpu_kernels_of_a_step")
    if traced:
        lines = []
        for row in traced:
            for name, found in row["kernels"].items():
                longest = ", ".join(f"{k['calls']} x `{k['name']}` {k['us']:.0f} us" for k in found["longest"][:3])
                lines.append([sizes(row), row["dtype"], name, str(found["launches"]), longest.replace("|", "\\|")])
        parts += [f"{level} Kernels of a step", "By torch's profiler, through_time."]
        parts.append(table([" I, H, B, T", " dtype", " side", "launches", " longest"], lines))
    if failed := missed_captures(results):
        parts += [f"{level} Not captured", "\n".join(f"- {line}" for line in failed)]
    return parts


def details(results: Results) -> str:
    """The part of docs/benchmarks.md."""
    said = (
        "Times are medians by CUDA events, the sides in turns. The step is forward, target pass or back-propagation, "
        "weight gradients and an SGD update, called eagerly and replayed from a CUDA graph of it; the ratio is the "
        "peer's better time by ours in the graph."
    )
    return "\n\n".join(["## On a GPU", f"{machine(results)}.", said, *sections(results)])


def targets_met(results: Results) -> str:
    found = [ok for row in results.rows for ok in met(row)]
    return f"{sum(found)} of {len(found)} targets met"


def summary(results: Results) -> str:
    """README.md's part."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in results.of("test_gpu_step"):
        groups.setdefault((sizes(row), row["loss"]), {})[row["rule"]] = row
    lines = []
    for (size, loss), rules in groups.items():
        peers = " to ".join(dict.fromkeys(ms(pick(r["peer_median"] for r in rules.values())) for pick in (min, max)))
        cells = [f"{ms(rules[n]['seconds'])} **{rules[n]['ratio']:.1f}**" if n in rules else "" for n in RULES]
        lines.append([size, f"{loss} step", peers, *cells])
    said = (
        f"{machine(results)}. One training step in float32 (TF32 off) from a CUDA graph, ms, and **cuDNN's better "
        "time, eager or from a graph, by ours**:"
    )
    return f"{said}\n\n{table([' I, H, B, T', ' loss on', '`torch.nn.RNN`', *RULES.values()], lines)}"


def of_logs(folder: Path) -> list[str]:
    """What the parts of gpu_check.sh came to."""
    lines = []
    for part in PARTS:
        log = folder / f"{part}.log"
        if not log.is_file():
            continue
        text = log.read_text(errors="replace")
        ended = re.findall(rf"^gpu_check: {part}: exit status (\d+) after (\d+) s$", text, re.MULTILINE)
        status, took = ended[-1] if ended else ("?", "?")
        found = re.findall(
            r"^=*\s*((?:\d+ \w+, )*\d+ (?:passed|failed|skipped|deselected|errors?)\b.*?)\s*=*$", text, re.M
        )
        if part == "sanitize":
            found = [" ".join(line) for line in re.findall(r"^== (\w+)$|^=+ (\w+ SUMMARY: .*)$", text, re.MULTILINE)]
        said = "; ".join(line.strip() for line in (found if part == "sanitize" else found[-1:]))
        lines.append([part, {"0": "passed", "124": "timed out"}.get(status, f"**status {status}**"), took, said])
    return [table([" part", " outcome", "s", " what it says"], lines)]


def write_summary(folder: Path) -> None:
    parts = ["# GPU check", *of_logs(folder)]
    source = folder / "gpu.json"
    try:
        results = read(source)
        parts += [f"{machine(results)}.", f"{targets_met(results)}.", *sections(results, "##")]
    except (OSError, json.JSONDecodeError, KeyError, IndexError) as error:
        parts.append(f"No benchmark results: {error!r}")
    (folder / "summary.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    write_summary(Path(sys.argv[1]))
