"""Name what got slower beyond noise between two result files: ``python benchmarks/compare.py OLD.json NEW.json``.

A timed row is judged by its ratio to the peer of the same run, which another day's clock changes least: it moved if the
middle halves of the single rounds' ratios do not overlap and the median changed by more than the tolerance. It got
slower if its own time grew as well; a ratio that falls while our time does too is the peer's doing, and only named.
Peaks of memory have no spread and are judged by the tolerance alone. Exit status 1 if anything got slower, 2
if nothing could be compared.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from rows import Results, Row, read


class Comparison(NamedTuple):
    """One line of text a row, by verdict."""

    slower: list[str]
    faster: list[str]
    peer: list[str]
    only_old: list[str]
    only_new: list[str]


def figures(row: Row) -> tuple[float, float, float, float] | None:
    """Quartiles of what is better when higher, and a cost; None for a row without them, or of torch alone."""
    if row.get("model") == "torch.nn.RNN":
        return None
    if "peak_bytes" in row:
        goodness = 1 / row["peak_bytes"]
        return goodness, goodness, goodness, row["peak_bytes"]
    if "ratio_quartiles" in row:
        low, median, high = row["ratio_quartiles"]
        return low, median, high, row["seconds"]
    return None


def describe(old: Row, new: Row) -> str:
    if "peak_bytes" in new:
        return f"{new['name']}: peak {old['peak_bytes'] / 2**20:.0f} -> {new['peak_bytes'] / 2**20:.0f} MiB"
    return (
        f"{new['name']}: ratio {old['ratio_quartiles'][1]:.2f} -> {new['ratio_quartiles'][1]:.2f} "
        f"(ours {old['seconds'] * 1e3:.3g} -> {new['seconds'] * 1e3:.3g} ms, "
        f"peer {old['peer_median'] * 1e3:.3g} -> {new['peer_median'] * 1e3:.3g} ms)"
    )


def compare(old: Results, new: Results, tolerance: float) -> Comparison:
    olds = {row["name"]: row for row in old.rows if figures(row)}
    news = {row["name"]: row for row in new.rows if figures(row)}
    found = Comparison([], [], [], [name for name in olds if name not in news], [n for n in news if n not in olds])
    for name in olds.keys() & news.keys():
        old_figures, new_figures = figures(olds[name]), figures(news[name])
        assert old_figures is not None
        assert new_figures is not None
        old_low, old_median, old_high, old_cost = old_figures
        new_low, new_median, new_high, new_cost = new_figures
        fell = new_high < old_low and new_median < old_median / (1 + tolerance)
        rose = new_low > old_high and new_median > old_median * (1 + tolerance)
        if not fell and not rose:
            continue
        with_cost = new_cost > old_cost if fell else new_cost < old_cost
        verdict = found.peer if not with_cost else found.slower if fell else found.faster
        verdict.append(describe(olds[name], news[name]))
    for verdict in found:
        verdict.sort()
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1, help="least change that counts (default %(default)s)")
    options = parser.parse_args(arguments)
    old, new = read(options.old), read(options.new)
    machines = [("processor", old.cpu, new.cpu), ("GPU", old.gpu.get("name", "none"), new.gpu.get("name", "none"))]
    for what, before, after in [(what, {before}, {after}) for what, before, after in machines] + [
        (field, {r[field] for r in old.rows if field in r}, {r[field] for r in new.rows if field in r})
        for field in ("torch", "cpu_capability")
    ]:
        if before != after:
            print(f"another {what}: {', '.join(sorted(before))} -> {', '.join(sorted(after))}")
    found = compare(old, new, options.tolerance)
    titles = Comparison(
        "slower",
        "faster",
        "ratio moved by the peer's time, not ours",
        f"only in {options.old}",
        f"only in {options.new}",
    )
    for title, lines in zip(titles, found, strict=True):
        if lines:
            print(f"{title}:", *lines, sep="\n  ")
    compared = sum(1 for row in old.rows if figures(row)) - len(found.only_old)
    print(f"{compared} rows compared, {len(found.slower)} slower, {len(found.faster)} faster")
    if compared == 0:
        print("the files have no row in common that can be compared")
        return 2
    return 1 if found.slower else 0


if __name__ == "__main__":
    raise SystemExit(main())
