"""Write README.md's table from a JSON file of pytest-benchmark: ``python benchmarks/table.py results/NAME.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def table(results: Path) -> str:
    """The whole-step rows of a result file as Markdown."""
    data = json.loads(results.read_text())
    steps = [b for b in data["benchmarks"] if b["name"].startswith("test_step")]
    first = steps[0]["extra_info"]
    lines = [
        f"{data['machine_info']['cpu']['brand_raw']}, {first['cpu_capability']}, torch {first['torch']}, float32, "
        "medians of interleaved rounds:",
        "",
        "| I, H, B, T | threads | loss on | `torch.nn.RNN`, ms | local, ms | ratio | through_time, ms | ratio |",
        "|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    rows: dict[tuple[object, ...], dict[str, tuple[float, float, float]]] = {}
    for benchmark in steps:
        info = benchmark["extra_info"]
        key = (f"{info['I']}, {info['H']}, {info['B']}, {info['T']}", info["threads"], f"{info['loss']} step")
        timing = (info["peer_median"] * 1e3, benchmark["stats"]["median"] * 1e3, info["ratio"])
        rows.setdefault(key, {})[info["credit"]] = timing
    for (sizes, threads, loss), credits in rows.items():
        peer = (credits["local"][0] + credits["through_time"][0]) / 2
        ours = " | ".join(f"{credits[c][1]:.2f} | **{credits[c][2]:.1f}**" for c in ("local", "through_time"))
        lines.append(f"| {sizes} | {threads} | {loss} | {peer:.1f} | {ours} |")
    return "\n".join(lines)


def main() -> None:
    text = README.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{table(Path(sys.argv[1]))}\n{END}{after}")


if __name__ == "__main__":
    main()
