"""Every script and notebook in examples/ runs and learns."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import write_mnist
from loading import load_module
from torch.nn.functional import cross_entropy

import tpext

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DOCS = EXAMPLES.parent / "docs"
# The accuracy that each is to reach in how many epochs, steps or iterations. Chance is a half at most; the text's most
# frequent character is right in a fifth of the places.
LEAST = {
    "ensemble": (150, 0.9),
    "export_onnx": (150, 0.9),
    "ldrl_images": (2, 0.8),
    "lightning_module": (3, 0.9),
    "long_sequence": (40, 0.9),
    "lstm_text": (100, 0.7),
    "minimal": (100, 0.9),
    "own_feedback_trainer": (200, 0.9),
    "own_layer_rule": (200, 0.9),
    "own_module_feedback": (5, 0.8),
    "own_network_rule": (200, 0.9),
    "own_recurrent_rule": (400, 0.9),
    "sklearn_classifier": (5, 0.9),
    "training_loop": (150, 0.9),
}
NEEDS = {
    "lightning_module": "pytorch_lightning",
    "own_module_feedback": "sklearn",
    "sklearn_classifier": "sklearn",
}
BY_TORCHRUN = {"ddp"}
NOTEBOOKS = ["first_steps", "runs_from_python"]

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="no folder examples beside the tests")


def load(name: str) -> Any:
    return load_module(name, EXAMPLES / f"{name}.py", keep=True)


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*LEAST, *BY_TORCHRUN}
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == set(NOTEBOOKS)


@pytest.mark.skipif(not DOCS.is_dir(), reason="no folder docs beside the tests")
def test_the_page_lists_every_example_once_and_shows_every_script() -> None:
    page = (DOCS / "examples.md").read_text()
    listed = re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.glob("*.*"))
    included = r'^\?\?\? example "(.*)"\n\n    ```python\n    --8<-- "examples/\1"\n    ```$'
    shown = re.findall(included, page, re.MULTILINE)
    assert shown == [name for name in listed if name.endswith(".py")]


@pytest.mark.parametrize("name", LEAST)
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    duration, accuracy = LEAST[name]
    assert load(name).main(duration) >= accuracy


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(tpext.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def test_the_example_for_several_processes(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(EXAMPLES / "ddp.py"), "120"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r"2 processes, the same weights: (\w+), test accuracy (\S+), chance 0.25\n", done.stdout)
    assert found is not None, done.stdout
    assert found[1] == "True"
    assert float(found[2]) >= 0.9


def test_the_long_sequence_stands_in_little_memory() -> None:
    example = load("long_sequence")
    torch.manual_seed(0)
    checkpointed, whole = (tpext.nn.RNN(1, 32, return_sequence=False, checkpoint_every=every) for every in (100, None))
    whole.load_state_dict(checkpointed.state_dict())
    head, batch = torch.nn.Linear(32, 2), example.make_noise(2)
    few, gradient = example.numbers_kept(checkpointed, head, batch)
    many, expected = example.numbers_kept(whole, head, batch)
    # the input, and of the states those before every 100th step or all
    assert few <= example.STEPS * 2 * (1 + 32 / 100) + 1000
    assert many >= example.STEPS * 2 * (1 + 32)
    torch.testing.assert_close(gradient, expected)


def test_an_export_without_onnx(tmp_path: Path) -> None:
    example = load("export_onnx")
    example.HAS_ONNX = False
    assert example.main(150, str(tmp_path / "net.pt2")) >= 0.9
    assert torch.export.load(tmp_path / "net.pt2")


def test_the_text_and_the_images_may_be_files(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abc" * 500)
    assert load("lstm_text").main(50, str(tmp_path / "text.txt")) > 0.9
    write_mnist(tmp_path)  # random pixels, of which nothing is to be learned
    assert 0 <= load("ldrl_images").main(1, str(tmp_path)) <= 1


@pytest.mark.parametrize(("reg", "target_step", "margin"), [(1.0, 1.0, 1e-3), (0.3, 0.05, 0.2)])
def test_the_minimal_example_has_the_gradients_of_the_package(reg: float, target_step: float, margin: float) -> None:
    torch.manual_seed(0)
    double = torch.float64
    rule = tpext.RegularizedInverse(reg=reg, target_step=target_step, margin=margin)
    rnn = tpext.nn.RNN(3, 5, dtype=double, rule=rule)
    with torch.no_grad():
        rnn.weight_ih_l0 *= 3  # states beyond 1 - margin too
    head, labels = torch.randn(5, 4, dtype=double), torch.randint(4, (7 * 6,))
    x = torch.randn(7, 6, 3, dtype=double)

    def loss_of_states(states: torch.Tensor) -> torch.Tensor:
        return cross_entropy((states @ head).flatten(0, 1), labels)

    loss_of_states(rnn(x)[0]).backward()
    parameters = rnn.weight_ih_l0.detach(), rnn.weight_hh_l0.detach(), (rnn.bias_ih_l0 + rnn.bias_hh_l0).detach()
    *found, _ = load("minimal").target_gradients(*parameters, x, loss_of_states, reg, target_step, margin)
    for gradient, parameter in zip(found, (rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-10, atol=1e-13)


def test_the_minimal_example_does_without_the_package() -> None:
    tree = ast.parse((EXAMPLES / "minimal.py").read_text())
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert "torch" in names
    assert not any(name.startswith("tpext") for name in names)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_stored_without_outputs(name: str) -> None:
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text())["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name: str, tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    for module in ("matplotlib", "pandas"):
        pytest.importorskip(module)
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment())
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    if name == "first_steps":
        (accuracy,) = [
            float(o.data["text/plain"]) for o in outputs if re.match(r"\d", o.get("data", {}).get("text/plain", ""))
        ]
    else:
        printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
        accuracy = min(float(last) for last in re.findall(r" 150 accuracy (\S+),", printed))
        assert printed.count(" 150 accuracy") == 2
    assert accuracy >= 0.9
