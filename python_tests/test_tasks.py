"""Tasks: encodings as published, data as a pure function of (seed, iteration), MNIST files."""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pooch
import pytest
import torch
from image_files import PARTS, write_cifar10, write_idx, write_mnist

from tpext.tasks import (
    TASKS,
    Adding,
    FlatMnist,
    MissingDataError,
    MnistAutoencoder,
    RandomPermutation,
    SequentialMnist,
    TemporalOrder,
    ToySet,
    load_cifar10,
    load_digits,
    load_mnist,
    make_task,
    register,
    registry,
)
from tpext.tasks.idx import MNIST, STEMS, read_idx
from tpext.tasks.images import CIFAR_FILES, CIFAR_FOLDER
from tpext.tasks.toys import ToyName


@pytest.fixture
def mnist_folder(tmp_path: Path) -> Path:
    write_mnist(tmp_path / "mnist")
    return tmp_path / "mnist"


# --- synthetic tasks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "bits"), [(10, 1), (35, 1), (60, 1), (120, 1), (10, 3), (37, 3), (60, 3)])
def test_temporal_order_encoding(length: int, bits: int) -> None:
    input, target = TemporalOrder(length, bits=bits).batch(seed=3, iteration=5, batch_size=3000)
    assert input.shape == (length, 3000, 6)
    assert input.dtype == torch.float32
    assert torch.equal(input.sum(2), torch.ones(length, 3000))
    assert torch.equal(input.max(2).values, torch.ones(length, 3000))
    symbols = input.argmax(2)
    marked = symbols < 2
    # The published ranges, as the published code computes them.
    firsts = [int(length * 0.1), int(length * 0.5), int(length * 0.6)][: 2 if bits == 1 else 3]
    assert torch.equal(marked.sum(0), torch.full((3000,), len(firsts)))
    label = torch.zeros(3000, dtype=torch.int64)
    for index, first in enumerate(firsts):
        places = slice(first, first + int(length * 0.1))
        assert torch.equal(marked[places].sum(0), torch.ones(3000, dtype=torch.int64))
        assert marked[places].any(1).all(), "every place of the range must occur"
        label += (symbols[places] * marked[places]).sum(0) << index
    assert torch.equal(target, label)
    assert target.unique().tolist() == list(range(4 if bits == 1 else 8))
    assert symbols[~marked].unique().tolist() == [2, 3, 4, 5]
    counts = symbols[~marked].bincount()[2:].double()
    assert (counts / counts.mean() - 1).abs().max() < 0.05


@pytest.mark.parametrize("length", [10, 30, 57])
def test_adding_encoding(length: int) -> None:
    input, target = Adding(length).batch(seed=1, iteration=0, batch_size=4000)
    assert input.shape == (length, 4000, 2)
    assert target.shape == (4000, 1)
    mask, values = input[:, :, 0], input[:, :, 1]
    assert mask.unique().tolist() == [0.0, 1.0]
    first = int(length * 0.1)
    end = first + int(length * 0.4)
    assert torch.equal(mask[:first].sum(0), torch.ones(4000))
    assert torch.equal(mask[first:end].sum(0), torch.ones(4000))
    assert mask[end:].sum() == 0
    assert mask[:end].any(1).all()
    torch.testing.assert_close(target.squeeze(1), (mask * values).sum(0) / 2)
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean().item() - 0.5) < 0.01


def test_random_permutation_encoding() -> None:
    input, target = RandomPermutation(40).batch(seed=1, iteration=0, batch_size=2000)
    assert input.shape == (40, 2000, 100)
    assert torch.equal(input.sum(2), torch.ones(40, 2000))
    symbols = input.argmax(2)
    assert torch.equal(symbols[0], target)
    assert target.unique().tolist() == [0, 1]
    assert symbols[1:].unique().tolist() == list(range(2, 100))


@pytest.mark.parametrize("name", ["temporal-order", "temporal-order-3bit", "adding", "random-permutation"])
def test_batches_are_a_function_of_seed_and_iteration(name: str) -> None:
    task = make_task(name)
    first = task.batch(7, 3, 20)
    task.batch(7, 4, 20)
    again = make_task(name).batch(7, 3, 20)
    assert torch.equal(first.input, again.input)
    assert torch.equal(first.target, again.target)
    others = [task.batch(7, 4, 20), task.batch(8, 3, 20), task.batch(7 + 2**32, 3, 20), task.test_set(7, 20)]
    for other in others:
        assert not torch.equal(first.input, other.input)
    test = task.test_set(7, 20)
    assert torch.equal(test.input, make_task(name).test_set(7, 20).input)
    assert not any(torch.equal(test.input, task.batch(7, iteration, 20).input) for iteration in range(3))


def test_batches_leave_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    make_task("adding").batch(1, 1, 4)
    assert torch.equal(before, torch.get_rng_state())


def test_loss_and_correctness() -> None:
    adding = Adding(30)
    output, target = torch.tensor([[0.5], [0.5], [0.5]]), torch.tensor([[0.53], [0.55], [0.465]])
    assert adding.correct(output, target).tolist() == [True, False, True]
    torch.testing.assert_close(adding.loss(output, target), ((output - target) ** 2).mean())
    order = TemporalOrder()
    logits = torch.tensor([[0.0, 3.0, 0.0, 1.0], [2.0, 0.0, 0.0, 0.0]])
    assert order.correct(logits, torch.tensor([1, 3])).tolist() == [True, False]
    expected = -logits.log_softmax(1)[[0, 1], [1, 3]].mean()
    torch.testing.assert_close(order.loss(logits, torch.tensor([1, 3])), expected)


@pytest.mark.parametrize("name", TASKS)
def test_sizes_agree_with_the_data(name: str, mnist_folder: Path) -> None:
    if name == "digits-mlp":
        pytest.importorskip("sklearn")
    write_cifar10(mnist_folder / CIFAR_FOLDER)
    folder = mnist_folder if "mnist" in name or "cifar" in name else None
    (mnist_folder / "text.txt").write_text("It is what it is. " * 400)
    task = make_task(name, data_dir=folder, **({"file": str(mnist_folder / "text.txt")} if name == "text" else {}))
    for batch in (task.batch(1, 0, 4), task.test_set(1, 4)):
        steps = () if task.length is None else (task.length,)
        judged = steps if task.every_step else ()
        numbers = task.make_embedding()(batch.input)
        assert numbers.shape == (*steps, 4, task.input_size)
        assert numbers.dtype == torch.float32
        assert batch.input.is_contiguous()
        output = torch.zeros(*judged, 4, task.output_size)
        assert task.loss(output, batch.target).ndim == 0
        assert task.correct(output, batch.target).shape == (*judged, 4)
    assert (task.epoch_length(4) is None) == (folder is None and name not in ("digits-mlp", "text"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "temporal"}, "task must be one of .*temporal-order"),
        ({"name": "mnist"}, "got 'mnist'; mnist is called sequential-mnist now"),
        ({"name": "temporal-order", "length": 9}, "length must be >= 10, got 9"),
        ({"name": "adding", "length": 9}, "length must be >= 10, got 9"),
        ({"name": "random-permutation", "length": 0}, "length must be >= 1, got 0"),
        ({"name": "sequential-mnist", "chunk": 5}, "chunk must divide 784"),
        ({"name": "sequential-mnist", "chunk": 0}, "chunk must divide 784"),
        ({"name": "sequential-mnist", "length": 784}, "length does not belong to sequential-mnist"),
        ({"name": "adding", "chunk": 2}, r"chunk does not belong to adding \(options of that task: length\)"),
        ({"name": "adding", "data_dir": "x"}, "data_dir does not belong to adding"),
        ({"name": "adding", "order": "shuffled"}, "order does not belong to adding"),
        ({"name": "sequential-mnist", "train_size": 5}, "train_size does not belong to sequential-mnist"),
        ({"name": "mnist-mlp", "chunk": 1}, "chunk does not belong to mnist-mlp"),
        ({"name": "mnist-mlp", "length": 1}, "length does not belong to mnist-mlp"),
        ({"name": "digits-mlp", "data_dir": "x"}, "data_dir does not belong to digits-mlp"),
        ({"name": "spiral", "train_size": 5}, "train_size does not belong to spiral"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(**arguments)


def test_a_name_belongs_to_one_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "TASKS", {})
    register("order", bits=1)(TemporalOrder)
    with pytest.raises(ValueError, match=r"'order' for .*\.Adding\(\), it is .*\.TemporalOrder\(bits=1\)'s$"):
        register("order")(Adding)
    with pytest.raises(ValueError, match=r"'order' for .*\.TemporalOrder\(bits=3\), it is .*\(bits=1\)'s$"):
        register("order", bits=3)(TemporalOrder)
    register("order", bits=1)(TemporalOrder)  # as by a module that is loaded again
    assert registry.find_task("order") == (TemporalOrder, {"bits": 1})


def test_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed must be in 0"):
        make_task("adding").batch(-1, 0, 4)
    with pytest.raises(ValueError, match="bits must be 1 or 3"):
        TemporalOrder(bits=2)


# --- toy sets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", get_args(ToyName))
def test_toy_sets_are_drawn_afresh_and_balanced(name: str) -> None:
    task = make_task(name)
    assert task.length is None
    assert task.epoch_length(10) is None
    first = task.batch(7, 3, 4000)
    assert torch.equal(first.input, make_task(name).batch(7, 3, 4000).input)
    assert torch.equal(first.target, make_task(name).batch(7, 3, 4000).target)
    for other in (task.batch(7, 4, 4000), task.batch(8, 3, 4000), task.test_set(7, 4000)):
        assert not torch.equal(first.input, other.input)
    assert first.target.unique().tolist() == [0, 1]
    assert abs(first.target.double().mean().item() - 0.5) < 0.04


def points(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    input, target = make_task(name).batch(seed=1, iteration=0, batch_size=20_000)
    return input.double()[target == 0], input.double()[target == 1]


def assert_uniform(values: torch.Tensor) -> None:
    """Values in [0, 1] with each tenth of it as likely, to five standard deviations."""
    assert values.min() > -1e-5
    assert values.max() < 1 + 1e-5
    share = torch.histc(values, 10, 0, 1) / len(values)
    assert (share - 0.1).abs().max() < 5 * (0.09 / len(values)) ** 0.5


def test_ball_and_sphere() -> None:
    inner, outer = points("sphere")
    assert_uniform((2 * inner.norm(dim=1)) ** 3)
    torch.testing.assert_close(outer.norm(dim=1), torch.ones(len(outer)).double(), rtol=0, atol=1e-6)
    for part in (inner, outer):
        assert_uniform((part[:, 0] / part.norm(dim=1) + 1) / 2)  # Archimedes: uniform on the axis


def test_disc_and_annulus() -> None:
    inner, outer = points("annulus")
    assert_uniform((2 * inner.norm(dim=1)) ** 2)
    assert_uniform((outer.norm(dim=1) ** 2 - 1) / 3)
    for part in (inner, outer):
        assert_uniform((torch.atan2(part[:, 0], part[:, 1]) / torch.pi + 1) / 2)


def test_ball_and_torus() -> None:
    inner, outer = points("torus")
    assert_uniform((2 * inner.norm(dim=1)) ** 3)
    across = torch.stack([outer[:, :2].norm(dim=1) - 1, outer[:, 2]], dim=1)
    torch.testing.assert_close(across.norm(dim=1), torch.full((len(outer),), 0.25).double(), rtol=0, atol=1e-6)
    for angle in (torch.atan2(across[:, 0], across[:, 1]), torch.atan2(outer[:, 0], outer[:, 1])):
        assert_uniform((angle / torch.pi + 1) / 2)


def test_xor_sets() -> None:
    same, different = points("xor")
    assert torch.equal(same.unique(dim=0), torch.tensor([[-1.0, -1.0], [1.0, 1.0]]).double())
    assert torch.equal(different.unique(dim=0), torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).double())
    same, different = points("xor-full")
    assert (same.prod(dim=1) >= 0).all()
    assert (different.prod(dim=1) <= 0).all()
    for part in (same, different):
        for column in part.T:
            assert_uniform((column + 1) / 2)


def test_spiral_arms() -> None:
    for half, arm in enumerate(points("spiral")):
        radius = arm.norm(dim=1)
        assert_uniform((radius / 2) ** 2)
        angle = 3 * torch.pi * radius + half * torch.pi
        expected = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
        torch.testing.assert_close(arm, expected, rtol=0, atol=2e-5)


def test_an_unknown_toy_set_is_named() -> None:
    with pytest.raises(ValueError, match=r"ToySet: name must be one of sphere, .*, got 'cube'"):
        ToySet("cube")  # type: ignore[arg-type]


# --- images as vectors -----------------------------------------------------------------------------------------------


def test_digits() -> None:
    pytest.importorskip("sklearn")
    data = load_digits()
    assert (data.train_images.shape, data.test_images.shape) == ((1437, 64), (360, 64))
    assert data.train_labels[:10].tolist() == list(range(10))
    input, target = make_task("digits-mlp").test_set(1, 360)
    assert torch.equal(input * 16, data.test_images.float())
    assert (input.min(), input.max()) == (0, 1)
    assert torch.equal(target, data.test_labels)


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    load_digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingDataError, match=r'scikit-learn, which is not installed: pip install "tpext\[exp'):
        make_task("digits-mlp").batch(1, 0, 4)


@pytest.mark.parametrize("place", [".", CIFAR_FOLDER])
def test_cifar10_files(place: str, tmp_path: Path) -> None:
    arrays = write_cifar10(tmp_path / place)
    data = load_cifar10(tmp_path)
    train = np.concatenate([arrays[name] for name in CIFAR_FILES[:5]])
    assert np.array_equal(data.train_images, train[:, 1:])
    assert np.array_equal(data.train_labels, train[:, 0])
    assert np.array_equal(data.test_images, arrays["test_batch.bin"][:, 1:])
    assert np.array_equal(data.test_labels, arrays["test_batch.bin"][:, 0])
    batch = make_task("cifar-mlp", data_dir=tmp_path).test_set(1, 4)
    assert torch.equal(batch.input, data.test_images.float() / 255)


def test_wrong_cifar10_files_are_named(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    path = tmp_path / "data_batch_2.bin"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1], r"data_batch_2\.bin: must hold records of 3073 bytes, got 12291 bytes"),
        (b"", r"data_batch_2\.bin: must hold records of 3073 bytes, got 0 bytes"),
        (b"\x0a" + whole[1:], r"data_batch_2\.bin: labels must be 0\.\.9, got 10"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_cifar10(tmp_path)
    path.unlink()
    with pytest.raises(MissingDataError, match=r"lacks data_batch_2\.bin\. Unpack .*--data-dir DIR"):
        load_cifar10(tmp_path)


def rows_of(task: FlatMnist, iteration: int, size: int, seed: int = 1) -> list[int]:
    """Which training images a batch holds."""
    images = task.data.train_images.float() / 255
    return [int((images == row).all(1).nonzero().item()) for row in task.batch(seed, iteration, size).input]


def test_orders_of_an_epoch(mnist_folder: Path) -> None:
    first = FlatMnist(order="sequential_first", data_dir=mnist_folder)
    assert first.epoch_length(8) == 3
    assert [rows_of(first, index, 8) for index in range(3)] == [list(range(at, at + 8)) for at in (0, 8, 16)]
    second = [row for index in (3, 4, 5) for row in rows_of(first, index, 8)]
    assert len(set(second)) == 24
    shuffled = FlatMnist(data_dir=mnist_folder)
    assert second == [row for index in (3, 4, 5) for row in rows_of(shuffled, index, 8)]
    assert second != list(range(24))
    assert rows_of(first, 3, 8) != rows_of(first, 3, 8, seed=2)
    assert rows_of(shuffled, 0, 8) != list(range(8))
    assert rows_of(FlatMnist(order="sequential", data_dir=mnist_folder), 7, 8) == list(range(8, 16))


def test_part_of_the_training_images(mnist_folder: Path) -> None:
    task = FlatMnist(train_size=10, order="sequential", data_dir=mnist_folder)
    assert task.epoch_length(5) == 2
    assert rows_of(task, 2, 5) == list(range(5))
    assert len(task.data.test_labels) == PARTS["t10k"]
    for size in (0, 26):
        with pytest.raises(ValueError, match=rf"train_size must be 1 \.\. 25 .*, got {size}"):
            FlatMnist(train_size=size, data_dir=mnist_folder).batch(1, 0, 1)
    with pytest.raises(ValueError, match="batch_size must be at most 10"):
        task.batch(1, 0, 11)


def test_an_autoencoder_has_its_input_for_a_target(mnist_folder: Path) -> None:
    task = MnistAutoencoder(data_dir=mnist_folder)
    input, target = task.test_set(1, 7)
    assert torch.equal(input, target)
    output = torch.randn(7, 784)
    p = output.double().sigmoid()
    expected = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    torch.testing.assert_close(task.loss(output, target).double(), expected, rtol=1e-5, atol=0)
    assert task.correct(10 * (target - 0.5), target).tolist() == [1.0] * 7
    assert task.correct(10 * (0.5 - target), target).max() < 0.02  # a pixel of exactly 1/2 there is none of


# --- sequential MNIST ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [".", "MNIST/raw"])
def test_mnist_files_compressed_and_plain(layout: str, tmp_path: Path) -> None:
    arrays = write_mnist(tmp_path / layout)
    data = load_mnist(tmp_path)
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels.dtype == torch.int64
    assert np.array_equal(data.train_images, arrays["train-images-idx3-ubyte"].reshape(-1, 784))
    assert np.array_equal(data.train_labels, arrays["train-labels-idx1-ubyte"])
    assert np.array_equal(data.test_images, arrays["t10k-images-idx3-ubyte"].reshape(-1, 784))
    assert np.array_equal(data.test_labels, arrays["t10k-labels-idx1-ubyte"])


@pytest.mark.parametrize("chunk", [1, 4, 28, 196, 784])
def test_chunks_read_the_image_in_order(chunk: int, mnist_folder: Path) -> None:
    task = SequentialMnist(chunk=chunk, data_dir=mnist_folder)
    assert task.length * chunk == 784
    input, target = task.test_set(1, 7)
    pixels = load_mnist(mnist_folder).test_images.float() / 255
    assert torch.equal(input.transpose(0, 1).reshape(7, 784), pixels)
    assert torch.equal(target, load_mnist(mnist_folder).test_labels)
    if chunk == 28:
        assert torch.equal(input[3], pixels.view(7, 28, 28)[:, 3])


def test_clothes_are_read_as_digits_are(tmp_path: Path) -> None:
    arrays = write_mnist(tmp_path / "fashion-mnist")
    task = make_task("sequential-mnist", dataset="fashion-mnist", chunk=28, data_dir=tmp_path)
    input, target = task.test_set(1, 7)
    assert input.shape == (28, 7, 28)
    pixels = torch.from_numpy(arrays["t10k-images-idx3-ubyte"]).double()
    # as published; the files are 28 x 28 images, read by rows
    expected = ((pixels / 255 - 0.2860) / 0.3202).transpose(0, 1)
    torch.testing.assert_close(input.double(), expected, rtol=0, atol=1e-6)
    assert target.tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()
    with pytest.raises(MissingDataError, match="Fashion-MNIST"):
        make_task("sequential-mnist", dataset="fashion-mnist", data_dir=tmp_path / "fashion-mnist").batch(1, 0, 1)
    with pytest.raises(ValueError, match="dataset must be mnist or fashion-mnist, got 'cifar10'"):
        make_task("permuted-mnist", dataset="cifar10")


@pytest.mark.parametrize("chunk", [1, 32, 3072])
def test_colours_are_read_one_plane_after_another(chunk: int, tmp_path: Path) -> None:
    arrays = write_cifar10(tmp_path)
    task = make_task("sequential-cifar", chunk=chunk, data_dir=tmp_path)
    assert (task.length, task.input_size) == (3072 // chunk, chunk)
    records = arrays["test_batch.bin"]
    planes = torch.from_numpy(records[:, 1:].reshape(4, 3, 1024)).double() / 255
    mean, deviation = torch.tensor([0.4914, 0.4822, 0.4465]).double(), torch.tensor([0.247, 0.243, 0.261]).double()
    expected = ((planes - mean[:, None]) / deviation[:, None]).flatten(1)
    input, target = task.test_set(1, 4)
    torch.testing.assert_close(input.transpose(0, 1).flatten(1).double(), expected, rtol=0, atol=1e-6)
    assert target.tolist() == records[:, 0].tolist()
    assert task.epoch_length(4) == 5
    with pytest.raises(ValueError, match=r"SequentialCifar10: chunk must divide 3072 \(1, 2, 3, 4, .*\), got 28"):
        make_task("sequential-cifar", chunk=28)


def test_permuted_pixels_follow_the_seed(mnist_folder: Path) -> None:
    task = SequentialMnist(permuted=True, data_dir=mnist_folder)
    pixels = load_mnist(mnist_folder).test_images.float() / 255
    read = task.test_set(1, 7).input.squeeze(2).t()
    # Which pixel each step reads: the 784 columns of 7 random values are all different.
    order = [(pixels == column[:, None]).all(0).nonzero().item() for column in read.t()]
    assert sorted(order) == list(range(784))
    assert order != list(range(784))
    batch, plain = task.batch(1, 0, 25).input, SequentialMnist(data_dir=mnist_folder).batch(1, 0, 25).input
    assert torch.equal(batch, plain[order])
    assert not torch.equal(task.test_set(2, 7).input, task.test_set(1, 7).input)


def test_epochs_shuffle_without_repeats(mnist_folder: Path) -> None:
    task = SequentialMnist(chunk=784, data_dir=mnist_folder)
    images = load_mnist(mnist_folder).train_images.float() / 255

    def epoch(number: int, seed: int = 1) -> list[int]:
        batches = [task.batch(seed, number * 3 + index, 8).input[0] for index in range(3)]
        return [int((images == row).all(1).nonzero().item()) for batch in batches for row in batch]

    first, second = epoch(0), epoch(1)
    assert len(set(first)) == len(set(second)) == 24, "25 images make 3 batches of 8; the last image waits"
    assert first != second
    assert first == epoch(0)
    assert first != epoch(0, seed=2)


def test_mnist_sizes_out_of_range(mnist_folder: Path) -> None:
    task = SequentialMnist(data_dir=mnist_folder)
    with pytest.raises(ValueError, match="batch_size must be at most 25"):
        task.batch(1, 0, 26)
    with pytest.raises(ValueError, match=r"test_size must be 1 \.\. 7"):
        task.test_set(1, 8)


def test_missing_files_say_how_to_get_them(mnist_folder: Path) -> None:
    (mnist_folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(MissingDataError, match=r"lacks t10k-labels-idx1-ubyte\[.gz\].*--data-dir DIR"):
        load_mnist(mnist_folder)


def test_failed_download_says_how_to_get_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: object, **options: object) -> str:
        raise ConnectionError("no network")

    monkeypatch.setenv("TPEXT_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(pooch, "retrieve", offline)
    with pytest.raises(MissingDataError, match=r"--data-dir DIR.*download failed.*ConnectionError"):
        load_mnist()


def test_download_is_checked_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "origin")
    asked = []

    def fetch(url: str, known_hash: str, fname: str, path: Path) -> str:
        asked.append((fname, known_hash))
        if len(asked) == 1:
            raise ValueError("wrong checksum from the first mirror")
        stem = fname.removesuffix(".gz")
        source = tmp_path / "origin" / stem
        data = gzip.compress(source.read_bytes()) if source.exists() else (tmp_path / "origin" / fname).read_bytes()
        path.mkdir(exist_ok=True)
        (path / fname).write_bytes(data)
        return str(path / fname)

    monkeypatch.setenv("TPEXT_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(pooch, "retrieve", fetch)
    assert len(load_mnist().train_labels) == PARTS["train"]
    assert asked[1:] == [(f"{stem}.gz", f"md5:{md5}") for stem, md5 in zip(STEMS, MNIST.md5, strict=True)]
    load_mnist()
    assert len(asked) == 5, "what is there is not fetched again"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file of unsigned bytes .it starts with nothing"),
        (b"\x1f\x8b\x08\x00", "not an IDX file"),
        (b"\0\0\x0d\1" + struct.pack(">I", 2) + bytes(8), "not an IDX file"),
        (b"\0\0\x08\3" + struct.pack(">II", 2, 2), "not an IDX file"),
        (b"\0\0\x08\1" + struct.pack(">I", 5) + bytes(4), r"announces \[5\] = 5 bytes, the file holds 4"),
        (b"\0\0\x08\1" + struct.pack(">I", 3) + bytes(4), r"announces \[3\] = 3 bytes, the file holds 4"),
    ],
)
def test_broken_idx_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "some-idx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"some-idx: .*{message}"):
        read_idx(path)


def test_cut_gzip_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "some-idx.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\1" + struct.pack(">I", 500) + bytes(500))[:-9])
    with pytest.raises(ValueError, match=r"some-idx\.gz: broken gzip file"):
        read_idx(path)
    path.write_bytes(b"plain")
    with pytest.raises(ValueError, match=r"some-idx\.gz: broken gzip file"):
        read_idx(path)


@pytest.mark.parametrize(
    ("stem", "values", "message"),
    [
        ("t10k-images-idx3-ubyte", np.zeros((7, 27, 28)), r"images must be \[N > 0, 28, 28\], got \[7, 27, 28\]"),
        ("t10k-images-idx3-ubyte", np.zeros((0, 28, 28)), r"images must be \[N > 0, 28, 28\]"),
        ("t10k-labels-idx1-ubyte", np.zeros(6), r"labels must be \[N=7\], got \[6\]"),
        ("t10k-labels-idx1-ubyte", np.full(7, 10), r"labels must be 0..9, got 10"),
    ],
)
def test_wrong_contents_are_named(stem: str, values: np.ndarray, message: str, mnist_folder: Path) -> None:
    write_idx(mnist_folder / stem, values)
    with pytest.raises(ValueError, match=f"{stem}: {message}"):
        load_mnist(mnist_folder)


def test_real_mnist(shared: Path) -> None:
    data = load_mnist(shared / "data")
    assert data.train_images.shape == (60_000, 784)
    assert data.test_images.shape == (10_000, 784)
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.test_labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
