"""Train a layer once and print the OpenMP runtimes in this process; exit status 1 unless there is one, torch's own."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import tpext

# isort: split
# After tpext, as a user might.
import torch

torch.set_num_threads(2)
rnn = tpext.nn.RNN(3, 64)
rnn(torch.rand(100, 16, 3))[0].sum().backward()
maps = Path("/proc/self/maps").read_text()
runtimes = sorted(set(re.findall(r"(/.*/lib(?:gomp|iomp5|omp)[^/\s]*\.so\S*)", maps)))
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {tpext.__file__}")
print("OpenMP runtimes:", *runtimes)
sys.exit(len(runtimes) != 1 or not Path(runtimes[0]).is_relative_to(Path(torch.__file__).resolve().parents[1]))
