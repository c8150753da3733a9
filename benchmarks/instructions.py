"""Instruction counts of the kernels under callgrind, against the committed ones: a regression check without noise.

``python benchmarks/instructions.py [BUILD]`` links ``instructions.cpp`` with the kernels that a build of the module has
(``pip install .`` leaves it in build/temp.*; by default they are built anew, in build/kernel_driver), counts each
kernel on one thread for the instruction sets that valgrind knows (not AVX-512), and compares the counts with
results/instructions.json; ``--update`` writes that file. Counts belong to a compiler: those of another name or version
are only printed. Exit status 1 if a count grew by more than 2 %.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "results" / "instructions.json"
BUILD = ROOT / "build" / "kernel_driver"
CAPABILITIES = ("baseline", "avx2")
KERNELS = (
    "act_inverse small",
    "act_inverse any",
    "act_displacement",
    "code_difference",
    "code_difference any pool",
    "counter_normal",
    "gru_layer",
    "gru_layer_backward",
    "kaczmarz_step",
    "kaczmarz_train",
    "lstm_layer",
    "lstm_layer_backward",
    "probe_difference",
    "regularized_inverse",
    "regularized_inverse batch",
    "regularized_solve",
    "rnn_layer",
    "rnn_layer_backward local",
    "rnn_layer_backward through_time",
    "rnn_scan",
    "rnn_scan_backward",
    "rnn_weight_gradients",
    "rnn_target_scan local",
    "rnn_target_scan through_time",
    "rnn_target_scan difference",
    "rnn_target_scan learned",
)
TOLERANCE = 0.02


class Counts(NamedTuple):
    compiler: str
    counts: dict[str, int]  # "instruction set, kernel" -> instructions


def build(module: Path | None) -> Path:
    """The driver, built anew where a source changed; of a module's objects, where they were built in that folder."""
    folder = module or BUILD
    options = ["-DTPEXT_KERNEL_DRIVER=ON"]
    if module is not None:
        # as in setup.py: those of pip's isolated environment are gone
        options = [
            "-U*Python*",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
    for command in (
        ["cmake", "-S", ROOT, "-B", folder, *options],
        ["cmake", "--build", folder, "--parallel", "--target", "kernel_driver"],
    ):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout}")
    return folder / "kernel_driver"


def count(driver: Path, capability: str, kernel: str) -> int | None:
    """Instructions of one call, or None where this processor lacks the instruction set."""
    environment = {**os.environ, "TPEXT_CPU_CAPABILITY": capability}
    command = [
        *("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"),
        *("--collect-atstart=no", "--toggle-collect=*run_kernel*", driver, kernel),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "does not support it" in done.stderr:
        return None
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode != 0 or found is None or int(found[1]) == 0:
        raise RuntimeError(f"valgrind {kernel} ({capability}) failed:\n{done.stderr}")
    return int(found[1])


def measure(driver: Path) -> Counts:
    compiler = subprocess.run([driver, "compiler"], check=True, capture_output=True, text=True).stdout.strip()
    counts = {}
    for capability in CAPABILITIES:
        for kernel in KERNELS:
            counted = count(driver, capability, kernel)
            if counted is None:
                print(f"skipped: this processor has no {capability}")
                break
            counts[f"{capability}, {kernel}"] = counted
    return Counts(compiler, counts)


def compare(old: Counts, new: Counts) -> tuple[list[str], bool]:
    """A line for each count, and whether one grew too much."""
    if old.compiler != new.compiler:
        lines = [f"counted with {new.compiler}, recorded with {old.compiler}: not compared"]
        return [*lines, *(f"{name}: {counted:,}" for name, counted in new.counts.items())], False
    lines, grew = [], False
    for name, counted in new.counts.items():
        recorded = old.counts.get(name)
        if recorded is None:
            lines.append(f"{name}: {counted:,}, not recorded")
            continue
        change = counted / recorded - 1
        too_many = counted > recorded * (1 + TOLERANCE)
        grew = grew or too_many
        verdict = " GREW" if too_many else " fell" if change < -TOLERANCE else ""
        lines.append(f"{name}: {recorded:,} -> {counted:,} ({change:+.1%}){verdict}")
    lines += [f"{name}: recorded, not counted" for name in old.counts if name not in new.counts]
    return lines, grew


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="record the counts instead of comparing them")
    parser.add_argument("build", nargs="?", type=Path, help="a folder that CMake built the module in")
    arguments = parser.parse_args()
    for tool in ("valgrind", "cmake"):
        if shutil.which(tool) is None:
            print(f"instruction counts skipped: no {tool}")
            return 0
    new = measure(build(arguments.build))
    if arguments.update:
        RECORD.write_text(json.dumps(new._asdict(), indent=1) + "\n")
        print(*(f"{name}: {counted:,}" for name, counted in new.counts.items()), sep="\n")
        return 0
    lines, grew = compare(Counts(**json.loads(RECORD.read_text())), new)
    print(*lines, sep="\n")
    if grew:
        print(f"grew by more than {TOLERANCE:.0%}; where that is wanted: python benchmarks/instructions.py --update")
    return int(grew)


if __name__ == "__main__":
    raise SystemExit(main())
