"""What ptxas says of each CUDA kernel of a build: registers, shared memory, spills. A check that needs no GPU.

``python benchmarks/ptxas.py [BUILD]`` reads the logs that a build with CUDA keeps beside its objects (by default every
build under build/, and of each kernel the newest log), prints a line a kernel with what changed against
results/ptxas.json, and exits with status 1 if a kernel spills registers or has a stack frame; ``--update`` writes that
file. Registers belong to a compiler: against the record of another version nothing is compared.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "results" / "ptxas.json"
# Bytes a thread. Local memory would cost every step of a scan its latency.
ALLOWED_STACK = 0

KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


class Usage(NamedTuple):
    registers: int  # a thread
    shared: int  # static bytes a block
    spilled: int  # bytes stored and loaded
    stack: int  # bytes a thread


class Report(NamedTuple):
    compiler: str
    kernels: dict[str, Usage]  # "architecture, kernel" -> usage


def demangled(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True)
    return [shortened(name) for name in done.stdout.splitlines()]


def shortened(name: str) -> str:
    """Without namespaces, parameters and return type: "sweep<MatrixUnit<Float16, 512, 1>, ForwardStep<Float16>>"."""
    name = re.sub(r"\b(tpext|cuda|_GLOBAL__N__\w+)::|\(anonymous namespace\)::", "", name)
    name = re.sub(r"\(\w+\)(?=\d)", "", name)  # the type of a constant
    return re.sub(r" >", ">", name.split("(")[0].removeprefix("void "))


def read_log(log: str) -> dict[str, Usage]:
    found = list(KERNEL.finditer(log))
    names = demangled([kernel["name"] for kernel in found])
    return {
        f"{kernel['architecture']}, {name}": Usage(
            int(kernel["registers"]),
            sum(map(int, re.findall(r"(\d+) bytes smem", kernel["rest"]))),
            int(kernel["stores"]) + int(kernel["loads"]),
            int(kernel["stack"]),
        )
        for kernel, name in zip(found, names, strict=True)
    }


def read(build: Path) -> Report:
    """All kernels of the build. Its newest log and its newest description of the compiler count."""

    def newest_last(pattern: str) -> list[Path]:
        return sorted(build.rglob(pattern), key=lambda path: path.stat().st_mtime)

    logs, descriptions = newest_last("*.cu.o.ptxas"), newest_last("CMakeCUDACompiler.cmake")
    if not logs or not descriptions:
        raise SystemExit(f"no log of ptxas under {build}: build there with CUDA first (pip install .)")
    version = re.search(r'CMAKE_CUDA_COMPILER_VERSION "([\d.]+)"', descriptions[-1].read_text())
    kernels = {name: usage for log in logs for name, usage in read_log(log.read_text()).items()}
    return Report(f"nvcc {version[1]}" if version else "nvcc", dict(sorted(kernels.items())))


def architecture_of(name: str) -> str:
    return name.split(",")[0]


def table(old: Report | None, new: Report) -> list[str]:
    """A line for each kernel, its changed numbers with the recorded ones."""
    recorded = old.kernels if old is not None and old.compiler == new.compiler else {}
    built = {architecture_of(name) for name in new.kernels}

    def cell(now: int, before: int | None) -> str:
        return str(now) if before in (now, None) else f"{before} -> {now}"

    def is_gone(name: str) -> bool:
        return name not in new.kernels and architecture_of(name) in built

    rows = [("registers", "shared", "spilled", "stack", "kernel")]
    for name, usage in new.kernels.items():
        before = recorded.get(name, (None,) * len(usage))
        rows.append((*map(cell, usage, before), name if not recorded or name in recorded else f"{name} (not recorded)"))
    rows += [("", "", "", "", f"{name} (recorded, not built)") for name in recorded if is_gone(name)]
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    lines = ["  ".join((*(f"{c:>{w}}" for c, w in zip(row, widths, strict=False)), row[-1])) for row in rows]
    if old is not None and not recorded:
        lines.append(f"built by {new.compiler}, recorded with {old.compiler}: not compared")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", nargs="?", type=Path, default=ROOT / "build", help="a folder that CMake built in")
    parser.add_argument("--update", action="store_true", help="record the numbers")
    arguments = parser.parse_args()
    new, old = read(arguments.build), None
    if RECORD.exists():
        record = json.loads(RECORD.read_text())
        old = Report(record["compiler"], {name: Usage(*usage) for name, usage in record["kernels"].items()})
    print(*table(old, new), sep="\n")
    if arguments.update:
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(usage)}" for name, usage in new.kernels.items())
        header = f' "compiler": {json.dumps(new.compiler)},\n "columns": {json.dumps(Usage._fields)},\n'
        RECORD.write_text(f'{{\n{header} "kernels": {{\n{lines}\n }}\n}}\n')
    bad = [name for name, usage in new.kernels.items() if usage.spilled > 0 or usage.stack > ALLOWED_STACK]
    if bad:
        print(
            f"{len(bad)} kernels spill registers or have a stack frame of more than {ALLOWED_STACK} bytes:",
            *bad,
            sep="\n",
        )
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
