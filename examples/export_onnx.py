"""Export: a trained network without tpext, by ``to_torch()`` and ONNX, or by ``torch.export`` where ONNX is not there.

Prints the file's format and the test accuracy of what is read back from it; ONNX needs ``pip install onnx onnxscript``.

Run: python examples/export_onnx.py [ITERATIONS] [FILE]
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import tpext
from tpext.tasks import make_task

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript"))


class Classifier(nn.Module):
    def __init__(self, rnn: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.rnn, self.head = rnn, head

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.rnn(input)[0][-1])


def export(net: nn.Module, input: Tensor, file: Path) -> Callable[[Tensor], Tensor]:
    """Write a network to a file, and return what is read back from it, as a function."""
    if not HAS_ONNX:
        torch.export.save(torch.export.export(net, (input,)), file)
        return torch.export.load(file).module()
    from onnx.reference import ReferenceEvaluator

    torch.onnx.export(net, (input,), file, input_names=["input"], dynamo=True, external_data=False, verbose=False)
    evaluator = ReferenceEvaluator(str(file))
    return lambda rows: torch.from_numpy(evaluator.run(None, {"input": rows.numpy()})[0])


def main(iterations: int, file: str | None = None) -> float:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    task = make_task("temporal-order", length=12)
    rule = tpext.RegularizedInverse(slope="derivative")
    net = Classifier(tpext.nn.RNN(task.input_size, 64, rule=rule), nn.Linear(64, task.output_size))
    nn.init.orthogonal_(net.rnn.weight_hh_l0)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for iteration in range(iterations):
        batch = task.batch(seed=1, iteration=iteration, batch_size=32)
        optimizer.zero_grad()
        task.loss(net(batch.input), batch.target).backward()
        optimizer.step()
    plain = Classifier(net.rnn.to_torch(), net.head).eval()
    input, target = task.test_set(seed=1, size=200)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder, "net.onnx" if HAS_ONNX else "net.pt2") if file is None else Path(file)
        output = export(plain, input, path)(input)
    assert torch.allclose(output, net(input), atol=1e-4)
    accuracy = task.correct(output, target).float().mean().item()
    print(f"{path.suffix}: test accuracy {accuracy:.3f}, chance 0.25")
    return accuracy


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200, *sys.argv[2:3])
