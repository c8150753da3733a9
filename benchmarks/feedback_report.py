"""The overview of learned feedback in docs/benchmarks.md, from the rows of bench_learned_feedback.py."""

from __future__ import annotations

from rows import Results, Row, table

METHODS = {
    "published": "`LDRL`, the published formulation in torch",
    "exact": "`LDRL`, the same gradients",
    "expected": '`LDRL(second_term="expected")`',
    "expected-grid": '`LDRL(second_term="expected", pixels="grid")`',
    "tenth": "`LDRL`, a tenth of the iterations",
    "running": "`RunningLDRL`",
    "running-grid": '`RunningLDRL(pixels="grid")`',
    "closed-form": "`ClosedForm`",
    "targets": "targets alone, feedback fixed",
    "backprop": "`Backprop()`",
}
NETWORKS = {"simple-vgg": "SimpleVGG", "lenet": "LeNet"}


def of_target(row: Row) -> str:
    """The most steps of back-propagation that a batch may cost, and whether it does."""
    least = row.get("target_ratio")
    if least is None:
        return ""
    return f"≤ {1 / least:.3g} " + ("met" if row["ratio"] >= least else "**missed**")


def on_a_gpu(results: Results) -> str:
    """The same table of rows on a GPU, called eagerly."""
    rows = results.of("test_gpu_training_batch")
    lines = [
        [NETWORKS[row["network_name"]], METHODS[row["method"]], f"{1 / row['ratio']:.1f}", of_target(row)]
        for row in rows
    ]
    return table([" network", " method", "cost", " target"], lines)


def summary(results: Results) -> str:
    """The cost of a batch in steps of back-propagation, and its peak of memory."""
    rows = results.of("test_training_batch")
    peaks = {(row["network_name"], row["method"]): row["peak_bytes"] for row in results.of("test_batch_memory")}
    counts = sorted({row["threads"] for row in rows})
    lines = []
    for network, title in NETWORKS.items():
        for method, name in METHODS.items():
            found = {row["threads"]: row for row in rows if (row["network_name"], row["method"]) == (network, method)}
            if not found:
                continue
            costs = [f"{1 / found[threads]['ratio']:.1f}" if threads in found else "" for threads in counts]
            target = of_target(found[max(found)])
            peak = peaks.get((network, method))
            lines.append([title, name, *costs, target, "" if peak is None else f"{peak / 2**20:,.0f}"])
    first = rows[0]
    return (
        "The cost of a whole training batch of 32 images, at the published iterations and channels. It is counted in "
        "steps of back-propagation in torch, on the same network in the same run.\n\n"
        f"{results.cpu}, {first['cpu_capability']}, torch {first['torch']}, float32.\n\n"
        + table([" network", " method", *(f"{n} thread{'s' * (n > 1)}" for n in counts), " target", "peak, MiB"], lines)
    )
