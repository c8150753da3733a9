"""The text task: windows, vocabulary, files, evaluation of every step, generation; runs that resume bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import Killed, assert_same_run, checkpoint, kill_after, metrics
from torch import nn

from tpext.experiments import Config, ConfigError, make_config
from tpext.experiments import train as train_module
from tpext.experiments.cli import main
from tpext.experiments.model import SequenceModel, make_model
from tpext.experiments.progress import describe
from tpext.experiments.run_folder import RunFolder
from tpext.experiments.train import train
from tpext.rules import RegularizedInverse
from tpext.tasks import MissingDataError, Text, make_task
from tpext.tasks.text import SAMPLE_SIZES
from tpext.testing import check_task

pytestmark = pytest.mark.usefixtures("unrendered")


def written(folder: Path, text: str, name: str = "text.txt") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def drawn(size: int, symbols: str = "abcde \n") -> str:
    """A text in which every symbol after the first is one of two that follow the last."""
    random = np.random.default_rng(3)
    numbers = np.cumsum(random.integers(1, 3, size=size)) % len(symbols)
    return "".join(symbols[number] for number in numbers)


def decoded(task: Text, numbers: torch.Tensor) -> list[str]:
    return [task.data.symbols[number] for number in numbers.tolist()]


@pytest.fixture
def file(tmp_path: Path) -> str:
    return written(tmp_path, drawn(1000))


def small(file: str, **options: Any) -> Config:
    settings: dict[str, Any] = {
        "file": file, "length": 6, "embedding_size": 5, "hidden_size": 8, "batch_size": 4, "iterations": 20,
        "eval_interval": 6, "checkpoint_interval": 4, "threads": 1,
    }  # fmt: skip
    return make_config("text", **{**settings, **options})


# --- data ------------------------------------------------------------------------------------------------------------


def test_a_batch_is_windows_of_the_training_part(file: str) -> None:
    text = Path(file).read_text()
    task = Text(file, length=6)
    windows = [text[at : at + 7] for at in range(900 - 6)]  # nine tenths of 1,000 characters
    assert task.epoch_length(10) == len(windows) // 10
    seen = []
    for iteration in range(89):
        input, target = task.batch(1, iteration, 10)
        assert input.shape == target.shape == (6, 10)
        assert input.is_contiguous()
        assert target.is_contiguous()
        assert torch.equal(input[1:], target[:-1])
        seen += ["".join(decoded(task, torch.cat([input[:1, row], target[:, row]]))) for row in range(10)]
    # the last 4 of 894 windows are left over
    assert sorted(seen) != seen
    counts = {window: windows.count(window) - seen.count(window) for window in {*windows, *seen}}
    assert sum(counts.values()) == 4
    assert min(counts.values()) >= 0


def test_orders_of_windows(file: str) -> None:
    text = Path(file).read_text()
    for order, size in (("sequential", None), ("sequential_first", None), ("sequential", 100)):
        task = Text(file, length=6, order=order, train_size=size)
        input = task.batch(1, 3, 10).input
        assert ["".join(decoded(task, row)) for row in input.t()] == [text[at : at + 6] for at in range(30, 40)]
    assert Text(file, length=6, train_size=100).epoch_length(10) == 9
    shuffled, again = (Text(file, length=6).batch(1, 3, 10).input for _ in range(2))
    assert torch.equal(shuffled, again)
    assert not torch.equal(shuffled, Text(file, length=6).batch(2, 3, 10).input)


@pytest.mark.parametrize("length", [6, 7, 49, 64])
def test_evaluation_asks_for_every_symbol_but_the_first_once(length: int, file: str) -> None:
    text = Path(file).read_text()
    task = Text(file, length=length)
    # 50 characters each: 49 to predict, which make whole windows of 7 and of 49
    for (input, target), part in ((task.validation_set(1, 99), text[900:950]), (task.test_set(1, 99), text[950:])):
        assert input.shape == target.shape == (length, math.ceil(49 / length))
        asked = target.t()[target.t() >= 0]
        assert task.judged(target) == len(asked) == 49
        assert "".join(decoded(task, asked)) == part[1:]
        assert "".join(decoded(task, input.t()[target.t() >= 0])) == part[:-1]
    assert torch.equal(task.test_set(1, 2).input, task.test_set(5, 99).input[:, :2])


def test_words_of_a_file(tmp_path: Path) -> None:
    lines = ["the cat sat", "", "  the  dog\tsat on", "the mat"] * 30
    task = Text(written(tmp_path, "\n".join(lines)), level="word", length=4)
    assert task.data.symbols == ("the", "cat", "sat", "<eos>", "dog", "on", "mat", "<unk>")
    words = [word for line in lines for word in [*line.split(), "<eos>"]]
    parts = task.data.train, task.data.validation, task.data.test
    assert len(words) == 390  # of which a twentieth is 19
    assert [decoded(task, part) for part in parts] == [words[:352], words[352:371], words[371:]]


def test_rare_symbols_are_one(tmp_path: Path) -> None:
    text = "a b c a b a\n" * 5 + "d a b b\n" + "a b z\n" * 8
    file = written(tmp_path, "x <unk>\n" + text, "some.train.txt")
    written(tmp_path, "a q <unk>\n", "some.valid.txt")
    written(tmp_path, "c a b", "some.test.txt")
    # of a, b, <eos>, z and c, most frequent first, the first three; the text's own <unk> stays where it appears
    task = Text(file, level="word", length=4, vocabulary_size=4)
    assert task.data.symbols == ("<unk>", "<eos>", "a", "b")
    assert decoded(task, task.data.train[:10]) == ["<unk>", "<unk>", "<eos>", "a", "b", "<unk>", "a", "b", "a", "<eos>"]
    assert decoded(task, task.data.validation) == ["a", "<unk>", "<unk>", "<eos>"]
    assert decoded(task, task.data.test) == ["<unk>", "a", "b", "<eos>"]
    characters = Text(file, level="character", length=4)
    assert characters.data.symbols[:4] == ("x", " ", "<", "u")
    assert characters.data.symbols[-1] == "\N{REPLACEMENT CHARACTER}"
    assert "".join(decoded(characters, characters.data.validation)) == "a \N{REPLACEMENT CHARACTER} <unk>\n"


def test_ends_of_lines_and_a_byte_order_mark_are_no_symbols(tmp_path: Path) -> None:
    plain = Text(written(tmp_path, "ä b\nc\n" * 40, "plain.txt"), length=4)
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + "ä b\r\nc\r".encode() * 40)
    marked = Text(str(tmp_path / "marked.txt"), length=4)
    assert plain.data.symbols == marked.data.symbols == ("ä", " ", "b", "\n", "c", "\N{REPLACEMENT CHARACTER}")
    assert torch.equal(plain.data.train, marked.data.train)


@pytest.mark.parametrize("level", ["word", "character"])
def test_the_task_passes_its_check(level: Any, file: str) -> None:
    before = torch.get_rng_state()
    check_task(Text(file, level=level, length=3))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, r"text\.txt is empty"),
        (b"caf\xe9 au lait", {}, r"text\.txt: must be a text in UTF-8, got the byte 0xe9 at 3"),
        (b"abcdefgh", {}, "too short: for sequences of 6 its validation part must have at least 2 characters, got 0"),
        (b"a b\n" * 5, {"level": "word"}, "its validation part must have at least 2 words, got 0"),
        (b"ab" * 30, {"length": 54}, "for sequences of 54 its training part must have at least 55 characters, got 54"),
        (b"ab" * 30, {"train_size": 6}, "its training part must have at least 7 characters, got 6"),
        (b"ab" * 30, {"train_size": 55}, r"train_size must be 1 \.\. 54 \(the training characters\), got 55"),
        (b"ab" * 30, {"batch_size": 49}, r"batch_size must be at most 48 \(the training samples\), got 49"),
    ],
)
def test_a_text_that_does_not_do_is_named(
    content: bytes, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        train(small(str(tmp_path / "text.txt"), **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_text_is_named(tmp_path: Path) -> None:
    file = written(tmp_path, "a b", "some.train.txt")
    written(tmp_path, "a b", "some.valid.txt")
    for name, message in (
        (
            None,
            r"text: name a text with --file FILE: any file in UTF-8, .*; or NAME\.train\.txt, with NAME\.valid\.txt",
        ),
        ("nowhere.txt", r"text: there is no file nowhere\.txt"),
        (str(tmp_path), "text: there is no file"),
        (file, r"text: there is no file .*some\.test\.txt"),
    ):
        with pytest.raises(MissingDataError, match=message):
            Text(name).batch(1, 0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "byte"}, "level must be one of word, character, got 'byte'"),
        ({"embedding": "tied"}, "embedding must be one of frozen, trained, got 'tied'"),
        ({"order": "random"}, "order must be one of shuffled, sequential_first, sequential, got 'random'"),
        ({"length": 0}, "length must be an integer >= 1, got 0"),
        ({"length": 2.5}, "length must be an integer >= 1, got 2.5"),
        ({"vocabulary_size": 1}, "vocabulary_size must be an integer >= 2, got 1"),
        ({"embedding_size": 0}, "embedding_size must be an integer >= 1, got 0"),
        ({"train_size": "all"}, "train_size must be an integer >= 1, got 'all'"),
        ({"file": 3}, "file must be a path, a str, got 3"),
        ({"temperature": "hot"}, "temperature must be a number >= 0, got 'hot'"),
        ({"temperature": -0.5}, "temperature must be a number >= 0, got -0.5"),
        ({"temperature": math.nan}, "temperature must be a number >= 0, got nan"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config("text", **options)


# --- outputs ---------------------------------------------------------------------------------------------------------


def test_loss_and_correctness_are_of_the_steps_that_are_asked_for() -> None:
    output = torch.tensor([[[0.0, 2.0], [1.0, 0.0]], [[0.0, 1.0], [5.0, 0.0]]])
    target = torch.tensor([[1, 1], [0, -100]])
    task = Text()
    assert task.judged(target) == 3
    assert task.correct(output, target).tolist() == [[True, False], [False, False]]
    losses = [math.log(1 + math.exp(-2)), math.log(1 + math.e), math.log(1 + math.e)]
    assert task.loss(output, target).item() == pytest.approx(sum(losses) / 3, rel=1e-6)


def test_measures() -> None:
    assert Text(level="character").measures(3 * math.log(2)) == {"bits per character": pytest.approx(3, rel=1e-15)}
    assert Text(level="word").measures(math.log(50)) == {"perplexity": pytest.approx(50, rel=1e-12)}
    assert Text(level="word").measures(1e4) == {"perplexity": math.inf}
    assert make_task("adding").measures(1.0) == {}


def test_generation_draws_from_the_softmax(file: str) -> None:
    task, hot, cold = (Text(file, length=6, temperature=temperature) for temperature in (1.0, 3.0, 0.0))
    logits = torch.linspace(-1, 1, task.output_size)
    lengths = []

    def network(input: torch.Tensor) -> torch.Tensor:
        assert input.shape == (len(input), 1)
        lengths.append(len(input))
        return logits.expand(len(input), 1, -1)

    symbols = task.data.symbols
    for one in (task, hot):
        text = one.generate(network, 1)
        assert len(text) == SAMPLE_SIZES["character"]
        assert one.generate(network, 1) == text != one.generate(network, 2)
        for symbol, share in zip(symbols, (logits / one.temperature).softmax(0).tolist(), strict=True):
            spread = math.sqrt(share * (1 - share) / len(text))
            assert abs(text.count(symbol) / len(text) - share) < 5 * spread
    assert lengths[:8] == [1, 2, 3, 4, 5, 6, 6, 6]
    assert cold.generate(network, 1) == symbols[-1] * SAMPLE_SIZES["character"]


def test_generation_goes_on_from_what_was_drawn(tmp_path: Path) -> None:
    words = "one two three\n" * 40
    task = Text(written(tmp_path, words), level="word", length=4, temperature=0.0)

    def network(input: torch.Tensor) -> torch.Tensor:
        """The next of four words; of an end of line comes the first."""
        following = torch.nn.functional.one_hot((input + 1) % 4, task.output_size).float()
        return following + (torch.arange(len(input)) == len(input) - 1)[:, None, None] * following

    assert task.data.symbols == ("one", "two", "three", "<eos>", "<unk>")
    assert task.generate(network, 1) == "one two three\n" * (SAMPLE_SIZES["word"] // 4)


# --- runs ------------------------------------------------------------------------------------------------------------


def test_settings() -> None:
    config = make_config("text")
    assert (config.batch_size, config.hidden_size, config.task.length, config.cell) == (32, 256, 64, "rnn")
    assert config.task == Text(level="character")
    assert [Text(level=level).input_size for level in ("word", "character")] == [1024, 128]
    for rule, lr, expected in (
        ("regularized-inverse", 1e-1, RegularizedInverse(reg=1.0, target_step=1e-3, normalize=False)),
        ("backprop", 1e-2, None),
    ):
        full = make_config("text", rule=rule, level="word", preset="published")
        assert (full.lr, full.head_lr, full.momentum, full.optimizer) == (lr, lr, 0.0, "sgd")
        assert (full.batch_size, full.hidden_size, full.iterations) == (512, 256, 24_000)
        assert expected in (None, full.rule)
        assert full.task == Text(level="word", order="sequential", train_size=39_999)
    for options in ({}, {"level": "word", "length": 32}, {"level": "word", "embedding": "trained"}):
        with pytest.raises(ConfigError, match="no settings were published for preset=published, task=text"):
            make_config("text", preset="published", **options)


def test_the_published_windows_make_77_batches(tmp_path: Path) -> None:
    task = make_config("text", level="word", preset="published", file=written(tmp_path, "a b c\n" * 12_000)).task
    assert isinstance(task, Text)
    assert task.epoch_length(512) == 77


@pytest.mark.parametrize("level", ["word", "character"])
@pytest.mark.parametrize("windows", [1, 4, 1000])
def test_evaluation_is_that_of_each_window_by_itself(
    windows: int, level: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path, drawn(3000))
    config = small(file, level=level, precision="64", iterations=5)
    made = config.task
    assert isinstance(made, Text)
    numbers = 6 * (8 + 5 + made.output_size)
    monkeypatch.setattr(train_module, "EVALUATION_NUMBERS", windows * numbers)
    result = train(config, tmp_path / "run")
    model = make_model(config, made).double()
    model.load_state_dict(checkpoint(tmp_path / "run")["model"])
    found = {}
    for name, part in (("validation", made.data.validation), ("test", made.data.test)):
        losses, correct = [], []
        for at in range(0, len(part) - 1, 6):
            window = part[at : at + 7]
            with torch.no_grad():
                output = model(window[:-1, None])[:, 0].log_softmax(1)
            losses += (-output.gather(1, window[1:, None])[:, 0]).tolist()
            correct += (output.argmax(1) == window[1:]).tolist()
        assert len(losses) == len(part) - 1
        found[name] = math.fsum(losses) / len(losses), sum(correct) / len(correct)
    assert result.validation_loss == pytest.approx(found["validation"][0], rel=1e-12)
    assert (result.test_loss, result.accuracy) == pytest.approx(found["test"], rel=1e-12)
    name = "perplexity" if level == "word" else "bits per character"
    measures = {f"{part} {name}": made.measures(loss)[name] for part, (loss, _) in found.items()}
    assert result.measures == pytest.approx(measures, rel=1e-11)
    row = metrics(tmp_path / "run")[-1]
    assert (float(row["validation_loss"]), float(row["test_loss"])) == (result.validation_loss, result.test_loss)


@pytest.mark.parametrize("embedding", ["frozen", "trained"])
def test_a_step_is_that_of_autograd(embedding: Any, file: str, tmp_path: Path) -> None:
    """Under back-propagation, by torch's own modules; the table learns at the head's rate, or not at all."""
    rates = {"lr": 0.25, "head_lr": 0.5}
    config = small(file, rule="backprop", optimizer="sgd", iterations=1, precision="64", embedding=embedding, **rates)
    torch.manual_seed(config.seed)
    start = SequenceModel(config, config.task).double().state_dict()
    train(config, tmp_path / "run")
    trained = checkpoint(tmp_path / "run")["model"]
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    rnn = nn.RNN(5, 8, dtype=torch.float64)
    input, target = config.task.batch(config.seed, 0, 4)
    states = torch.func.functional_call(
        rnn,
        {name.removeprefix("rnn."): leaf for name, leaf in leaves.items() if name.startswith("rnn.")},
        leaves["embedding.weight"][input],
    )[0]
    output = states @ leaves["head.weight"].t() + leaves["head.bias"]
    nn.functional.cross_entropy(output.reshape(24, -1), target.reshape(24)).backward()
    assert leaves["embedding.weight"].std().item() == pytest.approx(1, abs=0.5)
    for name, leaf in leaves.items():
        rate = rates["lr"] if name.startswith("rnn.") else rates["head_lr"]
        if name == "rnn.bias_hh_l0" or (name == "embedding.weight" and embedding == "frozen"):
            rate = 0.0
        assert leaf.grad is not None
        assert bool((leaf.grad != 0).any())
        torch.testing.assert_close(trained[name], (leaf - rate * leaf.grad).detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", ["backprop", "regularized-inverse", "learned-inverse"])
def test_every_rule_lowers_the_loss(rule: str, file: str, tmp_path: Path) -> None:
    """Two symbols may follow: to tell which costs one bit, and to guess log2 7."""
    result = train(small(file, rule=rule, iterations=300, eval_interval=300, hidden_size=16), tmp_path / "run")
    assert result.measures["test bits per character"] < 1.5


@pytest.mark.parametrize("stop", [1, 9, 18])
@pytest.mark.parametrize(
    "options",
    [{}, {"level": "word", "rule": "backprop", "embedding": "trained"}, {"optimizer": "sgd", "momentum": 0.9}],
)
def test_resuming_changes_nothing(
    options: dict[str, Any], stop: int, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(file, **options)
    train(config, tmp_path / "whole")
    kill_after(stop, train_module.TrainingRun, monkeypatch)
    with pytest.raises(Killed):
        train(config, tmp_path / "stopped")
    monkeypatch.undo()
    train(config, tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    samples = [(tmp_path / run / "sample.txt").read_bytes() for run in ("whole", "stopped")]
    assert samples[0] == samples[1] != b""


def test_a_run_resumes_on_its_text_wherever_that_is(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = (
        "train text --length 6 --hidden-size 8 --batch-size 4 --iterations 8 --eval-interval 4 --checkpoint-interval 4"
    )
    line += f" --threads 1 --cell lstm --precision bf16 --out {tmp_path / 'run'}"
    assert main([*line.split(), "--file", Path(file).name]) == 0
    (tmp_path / "run" / "result.json").unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(["train", "text", "--resume", "--out", str(tmp_path / "run")]) == 0
    (tmp_path / "run" / "result.json").unlink()
    Path(file).rename(elsewhere / "moved.txt")
    assert main([*line.split(), "--resume", "--file", "moved.txt"]) == 0
    (tmp_path / "run" / "result.json").unlink()
    with open("moved.txt", "a") as text:
        text.write("a")
    capsys.readouterr()
    assert main([*line.split(), "--resume", "--file", "moved.txt"]) == 1
    assert "moved.txt by characters) must be what the run began with, and has changed" in capsys.readouterr().err


def test_command_line(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    line = f"train text --file {file} --length 6 --hidden-size 8 --batch-size 4 --iterations 20 --eval-interval 10 "
    line += f"--threads 1 --temperature 0.5 --level character --embedding trained --cell rnn --out {folder}"
    assert main(line.split()) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "text, text.txt by characters, T=6, 8 tanh units, regularized-inverse" in out
    result = RunFolder(folder).read_result()
    assert result is not None
    for part in ("validation", "test"):
        assert f"{part} bits per character {result.measures[f'{part} bits per character']:.4g}" in out
    assert f"text: {folder / 'sample.txt'}" in out
    assert len((folder / "sample.txt").read_text()) == SAMPLE_SIZES["character"]
    config = json.loads((folder / "config.json").read_text())
    assert config["task"]["options"]["temperature"] == 0.5
    assert config["cell"] == "rnn"
    assert main([*line.split(), "--resume"]) == 0
    assert "complete already" in capsys.readouterr().out
    assert main([*line.split(), "--resume", "--level", "word"]) == 1
    assert "level is character there, word was asked for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("text", "tpext: text: name a text with --file FILE"),
        ("text --file nowhere.txt", "tpext: text: there is no file /"),
        ("text --data-dir nowhere", "data_dir does not belong to text"),
        ("adding --file nowhere.txt", "file does not belong to adding"),
        ("adding --cell transformer", "cell must be one of rnn, gru, lstm, got 'transformer'"),
        ("spiral --cell rnn", "cell does not belong to spiral"),
    ],
)
def test_wrong_lines_are_one_line(
    line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *line.split()]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_runs_of_different_texts_do_not_share_a_figure(tmp_path: Path) -> None:
    titles = {small(str(tmp_path / name), level=level).title for name in ("a", "b") for level in ("word", "character")}
    assert titles == {f"text, {name} by {level}s, T=6" for name in "ab" for level in ("word", "character")}


# --- cells -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cell", "gates"), [("gru", 3), ("lstm", 4)])
@pytest.mark.parametrize("rule", ["backprop", "regularized-inverse"])
@pytest.mark.parametrize("task", ["adding", "text"])
def test_cells_with_gates(task: str, rule: str, cell: str, gates: int, file: str, tmp_path: Path) -> None:
    """Each gate is drawn by itself, and trains; of two biases that act as their sum one stays zero."""
    options: dict[str, Any] = {"file": file, "embedding_size": 5} if task == "text" else {}
    sizes = {"hidden_size": 8, "length": 10, "batch_size": 4, "iterations": 10, "layers": 2, "threads": 1}
    config = make_config(task, cell=cell, rule=rule, test_size=40, optimizer="adam", **sizes, **options)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert f"8 {cell} units" in describe(config)
    torch.manual_seed(config.seed)
    model = make_model(config, config.make_task())
    assert isinstance(model, SequenceModel)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("weight_hh_l0", "weight_hh_l1", "weight_ih_l1"):
        for gate in start[f"rnn.{name}"].chunk(gates):
            torch.testing.assert_close(gate @ gate.t(), torch.eye(8), rtol=0, atol=1e-5)
    train(config, tmp_path / "run")
    trained = checkpoint(tmp_path / "run")["model"]
    for name, value in start.items():
        # what a GRU's candidate adds to W h is multiplied by its gate
        summed = "bias_hh" in name and cell == "lstm"
        assert torch.equal(trained[name], value) == (summed or name == "embedding.weight"), name


def test_what_a_cell_cannot_do_is_named() -> None:
    for options, message in (
        ({"cell": "gru", "nonlinearity": "relu"}, "nonlinearity must be one of tanh with cell=gru, got relu"),
        ({"cell": "lstm", "rule": "learned-inverse"}, "rule=learned-inverse does not go with cell=lstm, "),
        (
            {"cell": "rnn", "inverse": "cell", "slope_reg": 1.0},
            "rule=regularized-inverse does not go with cell=rnn, nonlinearity=tanh: ",
        ),
        ({"cell": "none"}, "cell must be one of rnn, gru, lstm, got 'none'"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_config("adding", **options)
