"""Language models: name the next word, or the next character, of a text."""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from tpext.tasks.base import (
    GENERATION_STREAM,
    NOT_ASKED,
    Batch,
    Criterion,
    Order,
    Task,
    epoch_batches,
    epoch_rows,
    random_generator,
)
from tpext.tasks.idx import MissingDataError
from tpext.tasks.registry import option, register

Level = Literal["word", "character"]
Embedding = Literal["frozen", "trained"]

END = "<eos>"
"""The word that ends a line."""
UNKNOWN: dict[Level, str] = {"word": "<unk>", "character": "\N{REPLACEMENT CHARACTER}"}
"""What a word or character that is not in the vocabulary becomes."""
EMBEDDING_SIZES: dict[Level, int] = {"word": 1024, "character": 128}
SAMPLE_SIZES: dict[Level, int] = {"word": 200, "character": 1000}
"""Symbols in ``sample.txt``."""
HELD_OUT = 20
"""One in so many symbols of a single file is in the validation part, and as many in the test part."""


class Corpus(NamedTuple):
    """The symbols of a vocabulary, and the parts of a text as their numbers, int64."""

    symbols: tuple[str, ...]
    train: Tensor
    validation: Tensor
    test: Tensor


@register("text")
@dataclass(frozen=True)
class Text(Task):
    """Name the next word, or character, of a text after every step.

    Input ``[T, B]`` int64, the symbols of ``B`` windows of the text; target ``[T, B]``, the symbols that follow each.
    Cross-entropy, mean over all steps; every window starts from the state zero. A module of the task's embeds the
    symbols, by rows of a normally distributed table that stay as they are or are trained.

    **Training** takes windows that start at any symbol, so a symbol is in up to ``T`` of them and an epoch takes each
    window once. **Evaluation** cuts a part into windows one after another, the last of which may be shorter: each
    symbol but the first is predicted once, from those before it in its window.

    **Files** are UTF-8. One file is split: its last twentieth is the test part, the twentieth before that the
    validation part. Of three files ``NAME.train.txt``, ``NAME.valid.txt`` and ``NAME.test.txt`` (``ptb.train.txt``,
    say), name the first. Words are what white space separates, with ``<eos>`` at the end of every line.

    The **vocabulary** is that of the training part, in order of appearance. What is not in it is one symbol: ``<unk>``
    if words are the symbols, so that it is the text's own in files that have it, U+FFFD if characters are.

    Args:
        file: the text. It is read when the first batch is asked for.
        level: what the symbols are, "word" or "character".
        length: symbols of a window T, >= 1.
        vocabulary_size: at most so many symbols, >= 2, that for unknown ones among them: those that occur most often.
        embedding: "frozen" or "trained", at the rate of the output layer.
        embedding_size: numbers that a symbol is embedded in, >= 1; None is 1024 for words, as published, and 128 for
            characters.
        train_size: number of symbols to train on, the first ones; None takes all. The vocabulary is that of all.
        order: of an epoch's windows: see :class:`tpext.tasks.ImageTask`.
        temperature: divides the outputs when a text is drawn from a trained network, >= 0; 0 takes the likeliest.

    Raises:
        ValueError: an argument out of its range. Of the methods that give data: a file that is empty, not UTF-8 or too
            short, named; MissingDataError, no file.

    Source: windows, frozen table, loss, and 64 words a window as in Roulet and Harchaoui's code, 2023, whose windows
    come in the order of the text and of its first 40,000 words only (``order="sequential"``, ``train_size``), and whose
    target pass counts the last step twice, which is not copied.
    """

    criterion: ClassVar[Criterion] = "cross_entropy"
    correct_when: ClassVar[str] = "the largest output is the next symbol"
    every_step: ClassVar[bool] = True
    # all windows of any usual file
    default_test_size: ClassVar[int] = 100_000
    max_threads: ClassVar[int] = 4
    defaults: ClassVar[Mapping[str, object]] = {
        "hidden_size": 256,
        "batch_size": 32,
        "iterations": 3_000,
        "eval_interval": 500,
    }

    free_options: ClassVar[tuple[str, ...]] = ("file",)

    file: str | None = option(None, "The text: any file, or NAME.train.txt beside NAME.valid.txt and NAME.test.txt.")
    level: Level = option("character", "What the symbols of a text are.")
    length: int = option(64, "Number of steps.")
    vocabulary_size: int = option(10_000, "Most symbols of a vocabulary; rarer ones count as one, unknown.")
    embedding: Embedding = option("frozen", "Whether the table of embeddings stays as drawn, or is trained.")
    embedding_size: int | None = option(None, "Size of an embedding; by default 1024 for words, 128 for characters.")
    train_size: int | None = option(None, "Number of training images (text: symbols), the first ones; by default all.")
    order: Order = option("shuffled", "Order of an epoch's samples: shuffled, as stored in the first epoch, or always.")
    temperature: float = option(1.0, "Divides the outputs when sample.txt is drawn; 0 takes the likeliest symbol.")

    def __post_init__(self) -> None:
        for name, hint in (("level", Level), ("embedding", Embedding), ("order", Order)):
            if getattr(self, name) not in get_args(hint):
                known = ", ".join(get_args(hint))
                raise ValueError(f"Text: {name} must be one of {known}, got {getattr(self, name)!r}")
        if self.file is not None and not isinstance(self.file, str):
            raise ValueError(f"Text: file must be a path, a str, got {self.file!r}")
        for name, least in (("length", 1), ("vocabulary_size", 2), ("embedding_size", 1), ("train_size", 1)):
            value = getattr(self, name)
            if value is None and name in ("embedding_size", "train_size"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"Text: {name} must be an integer >= {least}, got {value!r}")
        number = isinstance(self.temperature, (int, float)) and not isinstance(self.temperature, bool)
        if not number or not 0 <= self.temperature < math.inf:
            raise ValueError(f"Text: temperature must be a number >= 0, got {self.temperature!r}")

    @property
    def subject(self) -> str | None:
        return None if self.file is None else f"{Path(self.file).name} by {self.level}s"

    @property
    def input_size(self) -> int:
        return EMBEDDING_SIZES[self.level] if self.embedding_size is None else self.embedding_size

    @property
    def output_size(self) -> int:
        return len(self.data.symbols)

    @functools.cached_property
    def data(self) -> Corpus:
        """The vocabulary and the text, read when first asked for."""
        corpus = read_corpus(self.file, self.level, self.vocabulary_size)
        size, least = self.train_size, self.length + 1
        if size is not None and size > len(corpus.train):
            raise ValueError(f"train_size must be 1 .. {len(corpus.train)} (the training {self.level}s), got {size}")
        corpus = corpus._replace(train=corpus.train[:size])
        for name, part, shortest in (
            ("training", corpus.train, least),
            ("validation", corpus.validation, 2),
            ("test", corpus.test, 2),
        ):
            if len(part) < shortest:
                raise ValueError(
                    f"{self.file} is too short: for sequences of {self.length} its {name} part must have at least "
                    f"{shortest} {self.level}s, got {len(part)}"
                )
        return corpus

    def fingerprint(self) -> str:
        """Return the SHA-256 of the vocabulary and the three parts of the text."""
        digest = hashlib.sha256("\0".join(self.data.symbols).encode("utf-8", "surrogatepass"))
        for part in self.data[1:]:
            digest.update(part.numpy().tobytes() + b"\0")
        return digest.hexdigest()

    def epoch_length(self, batch_size: int) -> int:
        return epoch_batches(batch_size, len(self.data.train) - self.length)

    def batch(self, seed: int, iteration: int, batch_size: int) -> Batch:
        windows = self.data.train.unfold(0, self.length + 1, 1)
        windows = windows[epoch_rows(seed, iteration, batch_size, len(windows), self.order)].t()
        return Batch(windows[:-1].contiguous(), windows[1:].contiguous())

    def test_set(self, seed: int, size: int) -> Batch:
        """Return the first windows of the test part, all if there are no more."""
        return self._in_turn(self.data.test, size)

    def validation_set(self, seed: int, size: int) -> Batch:
        """Return the first windows of the validation part, all if there are no more."""
        return self._in_turn(self.data.validation, size)

    def _in_turn(self, text: Tensor, size: int) -> Batch:
        """Windows one after another; what the last one lacks is not judged."""
        count = -(-(len(text) - 1) // self.length)
        steps = torch.full((2, count * self.length), NOT_ASKED)
        steps[0, : len(text) - 1], steps[1, : len(text) - 1] = text[:-1], text[1:]
        steps[0, len(text) - 1 :] = 0
        input, target = steps.view(2, count, self.length)[:, :size].transpose(1, 2)
        return Batch(input.contiguous(), target.contiguous())

    def make_embedding(self) -> nn.Module:
        table = nn.Embedding(self.output_size, self.input_size)
        table.weight.requires_grad_(self.embedding == "trained")
        return table

    def measures(self, loss: float) -> dict[str, float]:
        if self.level == "character":
            return {"bits per character": loss / math.log(2)}
        return {"perplexity": math.exp(loss) if loss < math.log(np.finfo(float).max) else math.inf}

    def generate(self, network: Callable[[Tensor], Tensor], seed: int) -> str:
        """Return a text that begins with a line, each symbol drawn from the softmax of ``output / temperature``.

        The network sees the last T symbols, from the state zero, as in training.
        """
        symbols = self.data.symbols
        first = END if self.level == "word" else "\n"
        written = [symbols.index(first) if first in symbols else 0]
        random = random_generator(seed, GENERATION_STREAM)
        for _ in range(SAMPLE_SIZES[self.level]):
            output = network(torch.tensor(written[-self.length :])[:, None])[-1, 0].double().cpu().numpy()
            # the largest of outputs with noise of a Gumbel distribution is a draw from their softmax
            written.append(int((output + self.temperature * random.gumbel(size=len(symbols))).argmax()))
        found = [symbols[index] for index in written[1:]]
        if self.level == "character":
            return "".join(found)
        return re.sub(" ?\n ?", "\n", " ".join("\n" if word == END else word for word in found))


def read_corpus(file: str | Path | None, level: Level, vocabulary_size: int) -> Corpus:
    """Return the vocabulary and the three parts of a text: see :class:`Text`.

    Raises:
        MissingDataError: there is no such file.
        ValueError: it is empty or not UTF-8; names it.
    """
    if file is None:
        raise MissingDataError(
            "text: name a text with --file FILE: any file in UTF-8, of which the last tenth is held out; or "
            "NAME.train.txt, with NAME.valid.txt and NAME.test.txt beside it"
        )
    path = Path(file)
    name, separator, suffix = path.name.rpartition(".train.")
    if separator:
        others = (path.with_name(f"{name}.{part}.{suffix}") for part in ("valid", "test"))
        train, validation, test = (_symbols(_read(one), level) for one in (path, *others))
    else:
        whole = _symbols(_read(path), level)
        held_out = len(whole) // HELD_OUT
        middle, last = len(whole) - 2 * held_out, len(whole) - held_out
        train, validation, test = whole[:middle], whole[middle:last], whole[last:]
    symbols = _vocabulary(train, UNKNOWN[level], vocabulary_size)
    numbers = {symbol: number for number, symbol in enumerate(symbols)}
    unknown = numbers[UNKNOWN[level]]

    def encoded(text: Sequence[str]) -> Tensor:
        return torch.from_numpy(np.fromiter((numbers.get(one, unknown) for one in text), np.int64, len(text)))

    return Corpus(symbols, encoded(train), encoded(validation), encoded(test))


def _read(path: Path) -> str:
    """Return a text, without a byte order mark and with the same ends of lines on all systems."""
    if not path.is_file():
        raise MissingDataError(f"text: there is no file {path}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: must be a text in UTF-8, got the byte {error.object[error.start]:#04x} at {error.start}"
        ) from error
    if not text:
        raise ValueError(f"{path} is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _symbols(text: str, level: Level) -> Sequence[str]:
    if level == "character":
        return text
    return [word for line in text.removesuffix("\n").split("\n") for word in (*line.split(), END)]


def _vocabulary(text: Sequence[str], unknown: str, size: int) -> tuple[str, ...]:
    """Return the symbols of a text in order of appearance, at most ``size``: the unknown one and the most frequent."""
    counts = Counter(text)
    kept = {unknown, *[symbol for symbol, _ in counts.most_common() if symbol != unknown][: size - 1]}
    return tuple(symbol for symbol in dict.fromkeys([*counts, unknown]) if symbol in kept)
