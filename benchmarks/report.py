"""Make README.md's line on speed, docs/benchmarks.md and docs/speed.png: ``python benchmarks/report.py NAME.json``.

Results on a GPU are taken from gpu.json beside that file; those of learned feedback, which take as long as all others
together, from learned_feedback.json; those of GRU and LSTM from gated.json, of ensembles from ensemble.json.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import feedback_report
import gpu_report
from rows import RULES, Results, Row, ms, read, sizes, table, verdict

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
GPU_BEGIN, GPU_END = "<!-- gpu benchmarks: begin -->", "<!-- gpu benchmarks: end -->"
# Okabe and Ito: apart in print and for colour-blind readers. Markers and dashes tell the lines apart without colour.
STYLES = {"local": ("#0072B2", "o", "-"), "through_time": ("#D55E00", "s", "--"), "backprop": ("#009E73", "^", ":")}
INK = "#333333"


def mib(count: int) -> str:
    return f"{count / 2**20:,.0f}"


def rates(results: Results) -> dict[int, float]:
    """The median over the rows of the sgemm rate in GFLOP/s, by thread count."""
    found: dict[int, list[float]] = {}
    for row in results.rows:
        if "sgemm_gflops" in row:
            found.setdefault(row["threads"], []).append(row["sgemm_gflops"])
    return {threads: statistics.median(found[threads]) for threads in sorted(found)}


def disturbed(results: Results) -> list[str]:
    """Names of the rows before which sgemm was far below its usual rate: something else was running."""
    usual = rates(results)
    return [r["name"] for r in results.rows if "sgemm_gflops" in r and r["sgemm_gflops"] < 0.8 * usual[r["threads"]]]


def machine(results: Results) -> str:
    """The processor, versions and sgemm rates of a run in one line."""
    first = next(row for row in results.rows if "sgemm_gflops" in row)
    usual = rates(results)
    peaks = " and ".join(f"{rate:.0f}" for rate in usual.values())
    return (
        f"{results.cpu}, {first['cpu_capability']}, torch {first['torch']}, float32, "
        f"torch's sgemm at {peaks} GFLOP/s on {' and '.join(map(str, usual))} threads"
    )


def headline(results: Results) -> str:
    """The step of 784 steps and 100 units, with the loss on the last step and on every one, and the loops over time."""
    flagship = {"threads": 2, "H": 100, "B": 16, "T": 784}
    steps = {(row["rule"], row["loss"]): row["ratio"] for row in results.of("test_step", **flagship)}
    loops = {row["peer"].rpartition(" ")[2]: row["ratio"] for row in results.of("test_eager_loop", **flagship)}
    names = ('`credit="local"`', '`credit="through_time"`, the default', "`Backprop()`")
    ways = dict(zip(RULES, names, strict=True))
    lines = [
        "784 steps of 100 units, batch 16, two threads: how many times as fast as `torch.nn.RNN`",
        "",
        "| rule | loss on the last step | loss on every step |",
        "|---|---|---|",
        *(f"| {way} | {steps[rule, 'last']:.1f} | {steps[rule, 'every']:.1f} |" for rule, way in ways.items()),
        "",
        "The step with local credit was also written as two loops of torch operations. Ours is "
        f"{loops['published_style']:.0f} times as fast as a loop in the style of the published codes, and "
        f"{loops['tuned']:.1f} times as fast as a loop with large products and closed-form gradients.",
    ]
    return "\n".join(lines)


def grouped(rows: Iterable[Row], key: Callable[[Row], object]) -> list[dict[str, Row]]:
    """Rows of equal key together, by rule, in the order in which they first appear."""
    groups: dict[object, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(key(row), {})[row["rule"]] = row
    return list(groups.values())


def first_look(results: Results) -> str:
    """README.md's part; the picture stands above it, on the first screen."""
    return f"{headline(results)}\n\n{machine(results)}."


STEP_COLUMNS = (
    "One training step is the forward pass, the target pass or back-propagation, and the gradients of the weights. "
    "The peer is `torch.nn.RNN` under back-propagation. The two take turns in the same run.\n\n"
    "The last column is a limit, with local credit / through time. It is the speed-up of a step that costs nothing but "
    "its matrix products and its inverse, at the rate of torch's own sgemm.\n\n"
    "With the loss on the last step alone, displacements decay to exactly zero, and the kernel skips the rest. With a "
    "loss on every step it skips nothing. So the rows with a loss on every step are the fairer ones."
)


TABLE = "Times in the table are in ms, on two threads. In bold stands **torch's time by ours**."


def summary(results: Results) -> str:
    """The overview of recurrent and feed-forward steps: times on two threads, memory, long sequences, inverses."""
    lines = []
    for rules in grouped(results.of("test_step", threads=2), lambda r: (sizes(r), r["loss"])):
        first = next(iter(rules.values()))
        cells = [sizes(first), f"{first['loss']} step", ms(statistics.median(r["peer_median"] for r in rules.values()))]
        cells += [f"{ms(rules[n]['seconds'])} **{rules[n]['ratio']:.1f}**" if n in rules else "" for n in RULES]
        cells += [" / ".join(f"{rules[n]['limit_ratio']:.1f}" for n in ("local", "through_time") if n in rules)]
        lines.append(cells)
    parts = ["## Recurrent layers", headline(results), STEP_COLUMNS]
    parts += [f"{machine(results)}.", f"{TABLE} All are medians of interleaved rounds."]
    parts += [table([" I, H, B, T", " loss on", "`torch.nn.RNN`", *RULES.values(), "at sgemm's rate"], lines)]
    parts += ["![How many times faster than torch.nn.RNN, over T and over H](speed.png)"]
    return "\n\n".join([*parts, *memory(results), "## Feed-forward networks", *feed_forward(results)])


def gated(results: Results) -> str:
    """The overview of GRU and LSTM beside torch's: steps with a loss on every step, and inference."""
    lines = []
    for rules in grouped(results.of("test_gated_step"), lambda r: (r["cell"], sizes(r))):
        first = next(iter(rules.values()))
        inference = results.of("test_gated_inference", **{key: first[key] for key in ("cell", *"IHBT")})
        cells = [first["cell"], sizes(first), ms(statistics.median(r["peer_median"] for r in rules.values()))]
        cells += [f"{ms(rules[n]['seconds'])} **{rules[n]['ratio']:.1f}**" if n in rules else "" for n in RULES]
        cells += [f"{ms(inference[0]['seconds'])} **{inference[0]['ratio']:.1f}**" if inference else ""]
        lines.append(cells)
    said = (
        "`tpext.nn.GRU` and `LSTM` beside torch's: a training step with a loss on every step, and inference alone.\n\n"
        f"{machine(results)}.\n\n{TABLE}"
    )
    return f"{said}\n\n{table([' cell', ' I, H, B, T', 'step of torch', *RULES.values(), 'inference'], lines)}"


def memory(results: Results) -> list[str]:
    """Peak memory beside torch's, and long sequences whole and by chunks."""
    parts = []
    peaks = {(row["model"], sizes(row)): row for row in results.of("test_peak")}
    torch_rows = results.of("test_peak", model="torch.nn.RNN")
    for reference in torch_rows:
        size = sizes(reference)
        said = [f"{RULES[name]} {mib(peaks[name, size]['peak_bytes'])} MiB" for name in RULES if (name, size) in peaks]
        array = 4 * reference["T"] * reference["B"] * reference["H"]
        parts.append(
            f"Peak memory of one step at {size}, beyond what was resident before it: `torch.nn.RNN` "
            f"{mib(reference['peak_bytes'])} MiB, {', '.join(said)}. One array of all states is {mib(array)} MiB."
        )
    lines = []
    for row in results.of("test_long_sequence"):
        size = sizes(row)
        found = [peaks.get((model, size)) for model in ("through_time", "checkpointed")]
        whole, chunked = [mib(peak["peak_bytes"]) if peak else "" for peak in found]
        times = f"{1 / row['ratio']:.2f}"
        lines.append([size, ms(row["peer_median"]), whole, ms(row["seconds"]), chunked, times])
    if lines:
        every = results.of("test_long_sequence")[0]["checkpoint_every"]
        parts.append(
            "Long sequences, with credit through time. The sequence is taken as a whole, and by chunks, with "
            f"`checkpoint_every={every}`."
        )
        parts.append(table([" I, H, B, T", "whole, ms", "MiB", "by chunks, ms", "MiB", "times as long"], lines))
    return parts


# What the overview shows of feed-forward networks beside the inverses by size: label, against what, test, its row.
MLP: Row = {"sizes": [784, 240, 240, 240, 240, 10], "B": 100, "threads": 2, "optimizer": "SGD", "rule": "regularized"}
FEED_FORWARD: list[tuple[str, str, str, Row]] = [
    (
        "{samples:,} single samples through 784-32-10",
        "a layer at a time in torch",
        "test_stream",
        {"sizes": [784, 32, 10], "peer": "a layer at a time in torch, products"},
    ),
    (
        "update of a layer 784-32 and its input's target, batch 64",
        "tensors B x M x N, as published",
        "test_layer_step",
        {"N": 784, "M": 32, "B": 64, "threads": 2},
    ),
    (
        "training step of 784-32-10, batch 64",
        "tensors B x M x N, as published",
        "test_network",
        {"sizes": [784, 32, 10], "B": 64, "threads": 2},
    ),
    ("training step of 784-240-240-240-240-10, batch 100", "back-propagation in torch", "test_mlp_step", MLP),
]
MLP_RULES = {
    "regularized": "`RegularizedLeastSquares`",
    "constrained": "`ConstrainedLeastSquares`",
    "dtp": "`DifferenceTargetPropagation` with its reconstruction loss",
    "backprop": "`Backprop()`",
}
OPTIMIZERS = ("SGD", "Adam")


def feed_forward(results: Results) -> list[str]:
    """The overview of feed-forward networks: whole steps by rule, then a table beside what is asked for."""
    times = []
    for rule, name in MLP_RULES.items():
        steps = [results.of("test_mlp_step", **MLP | {"rule": rule, "optimizer": o})[0] for o in OPTIMIZERS]
        times.append("- {} {:.2f} ({:.2f})".format(name, *(1 / row["ratio"] for row in steps)))
    published, without_first = (
        results.of("test_published_step", **MLP | {"first_layer": first})[0]["ratio"] for first in (True, False)
    )
    lines = []
    for shown in results.of("test_small_inverses", batch=1024):
        n, batches = shown["n"], results.of("test_small_inverses", n=shown["n"])
        least, most = (pick(batches, key=lambda row: row["ratio"]) for pick in (min, max))
        what = [f"1,024 regularised inverses, {n} x {n}", "the best of `torch.linalg`"]
        ratios = f"**{least['ratio']:.1f}** to {most['ratio']:.1f}"
        lines.append([*what, ms(shown["peer_median"]), ms(shown["seconds"]), ratios, verdict(least)])
    for what, against, test, wanted in FEED_FORWARD:
        row = results.of(test, **wanted)[0]
        ratio = f"**{row['ratio']:.{1 if row['ratio'] >= 2 else 2}f}**"
        lines.append([what.format_map(row), against, ms(row["peer_median"]), ms(row["seconds"]), ratio, verdict(row)])
    return [
        "A step of 784-240-240-240-240-10, batch 100, takes so many times as long as back-propagation in torch, with "
        "SGD (with Adam):",
        "\n".join(times),
        f"The step of `RegularizedLeastSquares` is {published:.1f} times as fast as the published way, which forms an "
        "explicit inverse for each layer. That of the first layer is of no use. Without it, ours is "
        f"{without_first:.1f} times as fast as the published way.",
        "Times in the table are in ms, on two threads, and those of single samples on one. The inverses have two "
        "ratios: the least and the greatest over all batches. Their target is for the least.",
        table([" what", " against", "torch", "ours", "ratio", " target"], lines),
    ]


def timing(row: Row) -> list[str]:
    """Peer, ours, ratio with its quartiles."""
    low, _, high = row["ratio_quartiles"]
    return [
        f"{ms(row['peer_median'])} ± {ms(row['peer_iqr'] / 2)}",
        f"{ms(row['seconds'])} ± {ms(row['iqr'] / 2)}",
        f"**{row['ratio']:.2f}**",
        f"{low:.2f} to {high:.2f}",
    ]


TIMING = ["peer, ms", "ours, ms", "ratio", "quartiles"]
LIMIT = ["at sgemm's rate, ms", "ratio", "of sgemm"]


def limit(row: Row) -> list[str]:
    return [ms(row["limit_seconds"]), f"{row['limit_ratio']:.1f}", f"{row['fraction_of_sgemm']:.0%}"]


def network(row: Row) -> str:
    return "-".join(map(str, row["sizes"]))


# What stands in a column that is not a value of the row by its name.
CELLS: dict[str, Callable[[Row], str]] = {
    "I, H, B, T": sizes,
    "H, B, T": lambda row: f"{row['H']}, {row['B']}, {row['T']}",
    "N, M, B": lambda row: f"{row['N']}, {row['M']}, {row['B']}",
    "batch x n x n": lambda row: f"{row['batch']} x {row['n']} x {row['n']}",
    "loss on": lambda row: f"{row['loss']} step",
    "network": network,
    "right-hand sides": lambda row: str(row["count"]),
    "shape": lambda row: f"{row['rows']} x {row['M']}",
    "B, C, H, W": lambda row: ", ".join(str(row[name]) for name in ("B", "C", "H", "W")),
    "pool": lambda row: f"{row['kernel']} by {row['stride']}" if row["kernel"] else "none",
}


def cell(row: Row, column: str) -> str:
    return CELLS[column](row) if column in CELLS else str(row[column])


STEPS = "Whole training step against `torch.nn.RNN` with BPTT"
STEP = ("I, H, B, T", "threads", "loss on", "rule")
INVERSE = ("batch x n x n", "threads", "peer")
MLP_STEP = ("network", "B", "threads", "optimizer", "rule")
# The tables of docs/benchmarks.md: title, test, first columns.
SECTIONS: list[tuple[str, str, tuple[str, ...]]] = [
    (STEPS, "test_step", STEP),
    (f"{STEPS}: over T and over H", "test_sweep", STEP),
    ("Whole training step against loops of torch operations", "test_eager_loop", ("I, H, B, T", "threads", "peer")),
    ("Forward scan alone", "test_forward", ("H, B, T", "threads", "peer")),
    ("A step by chunks against the whole sequence", "test_long_sequence", ("I, H, B, T", "threads")),
    ("Regularised inverse", "test_inverse", INVERSE),
    ("Many small regularised inverses", "test_small_inverses", INVERSE),
    (
        "Many small regularised solutions",
        "test_small_solutions",
        ("batch x n x n", "right-hand sides", "threads", "peer"),
    ),
    ("Feed-forward training step against back-propagation in torch", "test_mlp_step", MLP_STEP),
    ("Feed-forward training step against the published way", "test_published_step", (*MLP_STEP, "peer")),
    (
        "Regularised inverse of an activation",
        "test_act_inverse",
        ("op", "shape", "activation", "displacement", "threads", "peer"),
    ),
    ("Inverse of a linear map", "test_linear_inverse", ("N, M, B", "method", "threads", "peer")),
    ("Inverse of a tanh layer", "test_layer", ("N, M, B", "op", "method", "threads", "peer")),
    ("Counter-based normal noise", "test_noise", ("shape", "dtype", "threads", "peer")),
    ("Differences of codes behind a pool", "test_difference", ("op", "B, C, H, W", "pool", "K", "threads", "peer")),
    ("Direct weight solves, a pass over single samples", "test_stream", ("network", "samples", "threads", "peer")),
    ("Direct weight solves, a layer's update and its input's target", "test_layer_step", ("N, M, B", "threads")),
    ("Direct weight solves, the published network's training step", "test_network", ("network", "B", "threads")),
]


def timed_table(rows: list[Row], columns: Iterable[str]) -> str:
    """The columns, times and ratio; a target where a row has one, what the products cost where all have that."""
    header = [*(f" {name}" for name in columns), *TIMING]
    cells = [[*(cell(row, name) for name in columns), *timing(row)] for row in rows]
    if any(row.get("target_ratio") is not None for row in rows):
        header.append(" target")
        cells = [[*line, verdict(row)] for line, row in zip(cells, rows, strict=True)]
    if all("limit_ratio" in row for row in rows):
        header += LIMIT
        cells = [[*line, *limit(row)] for line, row in zip(cells, rows, strict=True)]
    return table(header, cells)


def details(results: Results) -> str:
    """Every row of docs/benchmarks.md; none is left out, those without a section of their own come last."""
    parts = [
        "## All rows",
        f"{machine(results)}.",
        "Each row runs its peer right before every round of ours. Either is called as often in a row as fills 20 ms. "
        "The heads of the files `benchmarks/bench_*.py` say what the two are. Times are medians of a call ± half the "
        "interquartile range. The ratio is the peer's median by ours. Beside it are the quartiles of single rounds.",
        "*At sgemm's rate* is what a row's products and inverses cost at the rate of torch's own sgemm, and the ratio "
        "that this would be. That rate is measured just before the row, on matrices of 1024 x 1024. Of a recurrent "
        "step the products with weights count, those with a head's do not.",
        "This is a yardstick, not the machine's peak. Our kernels outrun that sgemm where MKL does not use the "
        "processor's widest vectors. And they skip products of zeros where the loss is on the last step: with "
        "orthogonal weights and reg = 1 a displacement halves at every step, and is exactly zero after some 150.",
    ]
    for title, test, columns in SECTIONS:
        if rows := results.of(test):
            parts += [f"## {title}", timed_table(rows, columns)]
    if peaks := results.of("test_peak"):
        cells = [[r["model"], sizes(r), mib(r["peak_bytes"]), f"{r['peak_arrays']:.2f}"] for r in peaks]
        parts.append("## Peak memory of a step")
        parts.append("Beyond what was resident before it, in a process of its own; and in arrays of all states.")
        parts.append(table([" model", " I, H, B, T", "MiB", "arrays [T, B, H]"], cells))
    known = {test for _, test, _ in SECTIONS} | {"test_peak"}
    if others := [row for row in results.rows if row["test"] not in known]:
        cells = [[row["name"], *(timing(row) if "ratio_quartiles" in row else [""] * len(TIMING))] for row in others]
        parts += ["## Other rows", table([" name", *TIMING], cells)]
    return "\n\n".join(parts) + "\n"


def ensemble_details(results: Results, source: str) -> str:
    """The part of docs/benchmarks.md on ensembles."""
    rows = results.of("test_ensemble_step")
    parts = [
        f"## Ensembles: {rows[0]['members']} networks together against one after another",
        f"From `{source}`: {results.cpu}, torch {rows[0]['torch']}.",
        "A training step of `tpext.nn.Ensemble` beside the calls of its members, one after another. Each member has "
        "numbers and inputs of its own. The loss is on the last step. Both ways give the same bits.",
        timed_table(rows, ("I, H, B, T", "threads")),
    ]
    return "\n\n".join(parts) + "\n"


def gated_details(results: Results, source: str) -> str:
    """The part of docs/benchmarks.md on GRU and LSTM."""
    parts = [
        "## GRU and LSTM: whole training step against torch's, loss on every step",
        f"From `{source}`: {results.cpu}, torch {results.rows[0]['torch']}.",
        timed_table(results.of("test_gated_step"), ("cell", "I, H, B, T", "threads", "rule")),
        "## GRU and LSTM: inference against torch's",
        timed_table(results.of("test_gated_inference"), ("cell", "I, H, B, T", "threads")),
    ]
    return "\n\n".join(parts) + "\n"


FEEDBACK = ("network_name", "method", "threads")


def feedback_details(results: Results, source: str) -> str:
    """The part of docs/benchmarks.md on learned feedback."""
    return (
        "\n\n".join(
            [
                "## A training batch with learned feedback against back-propagation in torch",
                f"From `{source}`: {results.cpu}, torch {results.rows[0]['torch']}.",
                timed_table(results.of("test_training_batch"), FEEDBACK),
            ]
        )
        + "\n"
    )


def draw(results: Results, path: Path) -> None:
    """The ratio over T and over H as a picture; shaded: the middle half of single rounds."""
    from matplotlib.figure import Figure

    sweep = results.of("test_sweep")
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, over, fixed in zip(panels, ("T", "H"), ("H", "T"), strict=True):
        # The rows that vary `over` are those whose other size is the commonest.
        others = [row[fixed] for row in sweep]
        value = max(set(others), key=others.count)
        rows = sorted((row for row in sweep if row[fixed] == value), key=lambda row: row[over])
        for rule, (colour, marker, dashes) in STYLES.items():
            line = [row for row in rows if row["rule"] == rule]
            x = [row[over] for row in line]
            axes.plot(x, [r["ratio"] for r in line], color=colour, marker=marker, ls=dashes, lw=2, ms=6, label=rule)
            low, high = ([row["ratio_quartiles"][end] for row in line] for end in (0, 2))
            axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        ticks = sorted({row[over] for row in rows})
        axes.axhline(1, color="#999999", lw=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.tick_params(colors=INK, labelsize=9)
        axes.minorticks_off()
        axes.grid(visible=True, color="#e6e6e6", lw=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        names = {"T": "time steps T", "H": "hidden units H"}
        axes.set_xlabel(names[over], color=INK)
        axes.set_title(f"{fixed} = {value}, B = {rows[0]['B']}", fontsize=10, color=INK)
    ratios = [row["ratio"] for row in sweep]
    marks = [mark for mark in (0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100) if min(1, *ratios) <= mark <= 2 * max(ratios)]
    panels[0].set_yticks(marks, [f"{mark:g}" for mark in marks])
    panels[0].set_ylabel("torch.nn.RNN's time by ours", color=INK)
    panels[1].legend(frameon=False, labelcolor=INK)
    threads = sweep[0]["threads"]
    figure.suptitle(
        f"One training step against torch.nn.RNN with BPTT, {threads} threads, loss on the last step",
        fontsize=12,
        color=INK,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def missing_rows(results: Results) -> list[str]:
    """What the README needs and the results lack."""
    flagship = {"threads": 2, "H": 100, "B": 16, "T": 784}
    needed = [("test_step", {**flagship, "rule": rule, "loss": loss}) for rule in RULES for loss in ("last", "every")]
    needed += [("test_eager_loop", flagship), ("test_sweep", {}), ("test_peak", {}), ("test_long_sequence", {})]
    needed += [("test_small_inverses", {"batch": 1024})]
    needed += [(test, wanted) for _, _, test, wanted in FEED_FORWARD]
    needed += [("test_mlp_step", MLP | {"rule": rule, "optimizer": name}) for rule in MLP_RULES for name in OPTIMIZERS]
    needed += [("test_published_step", MLP | {"first_layer": first}) for first in (True, False)]
    return [f"{test} {wanted}" for test, wanted in needed if not results.of(test, **wanted)]


def put(text: str, begin: str, end: str, into: str) -> str:
    before, rest = into.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def write(source: Path, root: Path = ROOT) -> None:
    """The rows on a GPU come from gpu.json beside ``source``, if there is one."""
    results = read(source)
    missing = missing_rows(results)
    if missing:
        raise SystemExit(
            f"{source} is not of a whole run of the suite, nothing is written; missing: {', '.join(missing)}"
        )
    readme = put(first_look(results), BEGIN, END, (root / "README.md").read_text())
    made = f"Made by `python benchmarks/report.py` from `{source.name}`."
    overview = ["# Benchmarks", f"{made} [History](benchmark-history.md) has earlier runs.", summary(results)]
    rows = [details(results)]
    gates = source.with_name("gated.json")
    if gates.is_file():
        of_gates = read(gates)
        overview += ["## GRU and LSTM", gated(of_gates)]
        rows += [gated_details(of_gates, gates.name)]
    ensembles = source.with_name("ensemble.json")
    if ensembles.is_file():
        rows.append(ensemble_details(read(ensembles), ensembles.name))
    learned = source.with_name("learned_feedback.json")
    if learned.is_file():
        on_images = read(learned)
        overview += ["## Learned feedback", feedback_report.summary(on_images)]
        rows += [feedback_details(on_images, learned.name)]
    gpu = source.with_name("gpu.json")
    if gpu.is_file():
        on_gpu = read(gpu)
        if GPU_BEGIN not in readme:
            readme = readme.replace(END, f"{END}\n\n{GPU_BEGIN}\n{GPU_END}")
        readme = put(gpu_report.summary(on_gpu), GPU_BEGIN, GPU_END, readme)
        rows += [gpu_report.details(on_gpu)]
    (root / "docs").mkdir(exist_ok=True)
    (root / "README.md").write_text(readme)
    (root / "docs" / "benchmarks.md").write_text("\n\n".join(part.strip() for part in [*overview, *rows]) + "\n")
    draw(results, root / "docs" / "speed.png")
    if names := disturbed(results):
        print("the machine was busy before these rows, which makes them worthless:", *names, sep="\n  ")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
