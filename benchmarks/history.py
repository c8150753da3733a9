"""Make docs/benchmark-history.md, how the ratios changed from commit to commit: ``python benchmarks/history.py``.

Its runs are the files benchmarks/results/*.json, and every version of them that git has.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from report import MLP, MLP_RULES, ROOT, rates
from rows import RULES, Results, Row, results_of, table

HEAD = """# Benchmark history

Made by `python benchmarks/history.py` from every version of `benchmarks/results/*.json` in git.
[Benchmarks](benchmarks.md) has all rows of the newest runs.

A ratio is the peer's time by ours, both measured in the same run. Above 1 we are faster. Each line is a run, and the
newest is first. The commit is the one that was measured, and `+` means that files had changed since that commit. A
cell is empty where a run did not have this row.

Compare the lines of one table only. There is a table for each processor and each instruction set that our kernels
used there, because torch's speed differs between processors by other factors than ours. The column sgemm is the rate
of torch's matrix product in GFLOP/s, on the most threads of the run. Where it is low, others used the machine too."""

Columns = dict[str, tuple[str, Row]]  # header: test function, values of its row
FLAGSHIP = {"I": 1, "H": 100, "B": 16, "T": 784, "threads": 2}
WIDE = {"I": 56, "H": 512, "B": 512, "T": 14, "threads": 2, "loss": "every"}
METHODS = {
    "`LDRL`": "exact",
    '`LDRL(second_term="expected")`': "expected",
    '`LDRL(second_term="expected", pixels="grid")`': "expected-grid",
    "`RunningLDRL`": "running",
    "`ClosedForm`": "closed-form",
}


# The rows that the page shows, all on two threads but single samples: title, what it says, columns.
GROUPS: list[tuple[str, str, Columns]] = [
    (
        "Recurrent layers",
        "A training step of 784 steps of 100 units, batch 16, beside `torch.nn.RNN`, with the loss on the last step or "
        "on every step.",
        {
            f"{name}, {loss}": ("test_step", {**FLAGSHIP, "rule": rule, "loss": loss})
            for loss in ("last", "every")
            for rule, name in RULES.items()
        },
    ),
    (
        "Wide recurrent layers",
        "14 steps of 512 units, batch 512, beside `torch.nn.RNN`, with a loss on every step. Matrix products are "
        "most of the work.",
        {name: ("test_step", {**WIDE, "rule": rule}) for rule, name in RULES.items()},
    ),
    (
        "Loops of torch operations",
        "784 steps of 100 units with local credit, beside the same step as a loop of torch operations. One loop is "
        "in the style of the published codes, the other has large products and closed-form gradients.",
        {
            name: ("test_eager_loop", {**FLAGSHIP, "peer": peer})
            for name, peer in (("published", "eager loop, published_style"), ("tuned", "eager loop, tuned"))
        },
    ),
    (
        "GRU and LSTM",
        "A training step of 784 steps of 100 units, batch 16, beside torch's layer, with a loss on every step; and "
        "inference alone.",
        {
            f"{cell}, {name}": (test, {**FLAGSHIP, "cell": cell, "rule": rule})
            for cell in ("GRU", "LSTM")
            for test, rules in (("test_gated_step", RULES), ("test_gated_inference", {None: "inference"}))
            for rule, name in rules.items()
        },
    ),
    (
        "Ensembles",
        "A training step of 48 networks together, beside a call of each. The loss is on the last step.",
        {
            f"{H} units, {T} steps": ("test_ensemble_step", {"H": H, "T": T, "threads": 2})
            for H, T in ((32, 30), (100, 784))
        },
    ),
    (
        "Feed-forward networks",
        "A training step of 784-240-240-240-240-10 by SGD, batch 100, beside back-propagation in torch. The last "
        "column is a pass of `Kaczmarz` over single samples through 784-32-10, beside a layer at a time in torch.",
        {
            **{name: ("test_mlp_step", MLP | {"rule": rule}) for rule, name in MLP_RULES.items()},
            "single samples": (
                "test_stream",
                {"sizes": [784, 32, 10], "peer": "a layer at a time in torch, products"},
            ),
        },
    ),
    (
        "Learned feedback",
        "A training batch of 32 images on SimpleVGG, beside back-propagation in torch. These methods do more work than "
        "back-propagation, so the ratios are below 1.",
        {
            name: ("test_training_batch", {"network_name": "simple-vgg", "threads": 2, "method": method})
            for name, method in METHODS.items()
        },
    ),
]


class Run(NamedTuple):
    """A result file: its rows, the processor, when it was written, the commit that it measured."""

    results: Results
    processor: str
    date: str
    commit: str


def runs(texts: Iterable[str]) -> Iterator[Run]:
    """Of files that hold no run, such as counts of instructions, none."""
    for data in map(json.loads, texts):
        if "benchmarks" not in data:
            continue
        results, commit = results_of(data), data["commit_info"]
        for row in results.rows:  # the first runs named a step by its credit
            row.setdefault("rule", row.get("credit"))
        capability = next(row["cpu_capability"] for row in results.rows if "cpu_capability" in row)
        name = commit["id"][:7] + "+" * commit["dirty"]
        yield Run(results, f"{results.cpu}, {capability}", data["datetime"][:16].replace("T", " "), name)


def line(run: Run, columns: Columns) -> list[str]:
    """Date, commit, rate of sgemm and the ratios; nothing for a run without any of these rows."""
    found = [run.results.of(test, **wanted) for test, wanted in columns.values()]
    if not any(found):
        return []
    sgemm = [f"{rate:.0f}" for rate in rates(run.results).values()]
    ratios = [f"{rows[0]['ratio']:.{2 if rows[0]['ratio'] >= 1 else 3}f}" if rows else "" for rows in found]
    return [run.date, run.commit, sgemm[-1] if sgemm else "", *ratios]


def page(found: list[Run]) -> str:
    parts = [HEAD]
    for title, said, columns in GROUPS:
        parts += [f"## {title}", said]
        for processor in sorted({run.processor for run in found}):
            # A version of a file may lie under two names.
            lines = {tuple(line(run, columns)) for run in found if run.processor == processor} - {()}
            if lines:
                parts += [f"{processor}:", table([" date", " commit", "sgemm", *columns], sorted(lines, reverse=True))]
    return "\n\n".join(parts) + "\n"


def present(root: Path = ROOT) -> list[str]:
    """The texts of the result files."""
    return [path.read_text() for path in sorted((root / "benchmarks" / "results").glob("*.json"))]


def past(root: Path = ROOT) -> list[str]:
    """The texts of all their versions in git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout

    changes = git("log", "--raw", "--no-abbrev", "--format=", "--diff-filter=AM", "--", "benchmarks/results/*.json")
    return [git("cat-file", "blob", change.split()[3]) for change in changes.splitlines()]


if __name__ == "__main__":
    (ROOT / "docs" / "benchmark-history.md").write_text(page(list(runs([*present(), *past()]))))
