#!/usr/bin/env bash
# Build, test, check and time the CUDA side on a machine with a GPU:  benchmarks/gpu_check.sh OUT [PART...]
#
# Parts: build, test, sanitize, bench, cpu; by default all but cpu, which times the rows without a GPU and takes most of
# 10 minutes alone. Leaves in OUT a log a part, gpu.json (cpu.json) and summary.md. Needs nvcc, torch with CUDA, pytest,
# pytest-benchmark, hypothesis, pybind11, cmake, ninja and setuptools, for sanitize compute-sanitizer; no network. What
# is built goes to build/gpu-check of the checkout, which later calls with other parts find again; nothing is installed.
# A part that fails or runs out of time does not stop the others; the exit status tells.
# shellcheck disable=SC2329  # the parts are called by their names
set -uo pipefail

if (($# == 0)); then
  echo "usage: $0 OUT [build|test|sanitize|bench|cpu]..." >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
shift
parts=("$@")
(($#)) || parts=(build test sanitize bench)
for part in "${parts[@]}"; do
  case $part in
    build | test | sanitize | bench | cpu) ;;
    *) echo "gpu_check: no part '$part'" >&2 && exit 2 ;;
  esac
done

python=${PYTHON:-python3}
work=$root/build/gpu-check
# From a folder where Python does not find the sources before what is built.
mkdir -p "$work" && cd "$work" || exit 2
scripts=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
export PYTHONPATH=$work/site PYTHONUNBUFFERED=1 PATH=$scripts:$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
pytest=("$python" -m pytest -c "$root/pyproject.toml" -p no:cacheprovider)

# limited SECONDS COMMAND...: at most so long, and no longer than all parts together have.
limited() {
  local most=$1 left=$((560 - SECONDS))
  shift
  # Interrupted rather than terminated, pytest still says what failed and writes what it measured.
  timeout -s INT -k 10 "$((left < 1 ? 1 : left < most ? left : most))" "$@"
}

part_build() {
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm --format=csv,noheader
  nvcc --version | tail -n 2
  # For the device that is here alone: half the time.
  local architecture='import torch; print("%d%d-real" % torch.cuda.get_device_capability())'
  CUDAARCHS=${CUDAARCHS:-$("$python" -c "$architecture")} TPEXT_CUDA=on PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    limited 120 "$python" -m pip install -v --no-build-isolation --no-deps --upgrade --target "$work/site" "$root" &&
    "$python" -c 'import tpext; print(tpext.__file__, tpext.build_info()); assert tpext.build_info()["cuda_architectures"]'
}

part_test() {
  # Files without such a test are left out: they may need packages that are not there.
  local files
  mapfile -t files < <(grep -lE '^[^"]*pytest\.mark\.gpu' "$root"/python_tests/test_*.py)
  if ((${#files[@]} == 0)); then
    echo "no test is marked gpu"
    return 1
  fi
  # Verbose and with stacks, so that a kernel that never ends has a name; an illegal access spoils all tests after it.
  OMP_NUM_THREADS=4 limited 160 "${pytest[@]}" -m gpu -v --tb=short --maxfail=40 -o faulthandler_timeout=30 \
    --durations=10 "${files[@]}"
}

part_sanitize() {
  local tool status=0
  for tool in memcheck racecheck; do
    echo "== $tool"
    # Torch's allocator would hide accesses beyond the end of a tensor.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited 50 compute-sanitizer --tool "$tool" --target-processes all \
      --kernel-name kns=tpext --error-exitcode 9 --print-limit 50 "$python" "$root/benchmarks/sanitize.py" || status=$?
  done
  return "$status"
}

part_bench() {
  local rows=("$root"/benchmarks/bench_{rnn_target_scan,rnn_scan,gated,regularized_inverse,learned_feedback}.py)
  local left=$((520 - SECONDS))
  TPEXT_BENCHMARK_SECONDS=$((left < 150 ? left : 150)) limited 175 "${pytest[@]}" -m gpu --benchmark-enable \
    --benchmark-columns=median,iqr,rounds --benchmark-json="$out/gpu.json" -s "${rows[@]}"
}

part_cpu() {
  TPEXT_BENCHMARK_SECONDS=500 limited 540 "${pytest[@]}" -m 'not gpu' --benchmark-enable \
    --benchmark-columns=median,iqr,rounds --benchmark-json="$out/cpu.json" -s "$root/benchmarks"
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check: torch of $python sees no CUDA device" >&2
  exit 2
fi
failed=0
for part in "${parts[@]}"; do
  began=$SECONDS
  "part_$part" >"$out/$part.log" 2>&1
  status=$?
  echo "gpu_check: $part: exit status $status after $((SECONDS - began)) s" | tee -a "$out/$part.log"
  if ((status)); then
    failed=1
    tail -n 30 "$out/$part.log"
  fi
done
"$python" "$root/benchmarks/gpu_report.py" "$out" && head -n 60 "$out/summary.md" || failed=1
exit "$failed"
