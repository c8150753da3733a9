"""Memory of large outputs: handed from call to call, by whoever frees it, never to two at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import tpext
from tpext import _C
from tpext.ops._memory import new_empty

LARGE = (9 << 20,)  # of float32 36 MiB

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux")
    or os.environ.get("TPEXT_HUGE_PAGES") == "0"
    or _C.large_array([1], 32) is None,
    reason="this system has no memory in huge pages",
)


def test_what_is_freed_comes_again() -> None:
    like = torch.empty(())
    first = new_empty(like, LARGE)
    place = first.data_ptr()
    assert (first.shape, first.dtype, first.requires_grad) == (torch.Size(LARGE), torch.float32, False)
    assert place % (2 << 20) == 0
    first.fill_(1)
    part = first[5:]
    del first
    second = new_empty(like, LARGE)
    assert second.data_ptr() != place, "a view still has it"
    second.fill_(2)
    assert bool((part == 1).all())
    del part
    third = new_empty(like, (3, 3 << 20))
    assert third.data_ptr() == place
    assert third.shape == (3, 3 << 20)
    del third
    # for half as many bytes it is too large
    assert new_empty(torch.empty((), dtype=torch.float64), (2 << 20,)).data_ptr() != place


OTHERS = {
    "float32": torch.empty(()),
    "bfloat16": torch.empty((), dtype=torch.bfloat16),
    "int64": torch.empty((), dtype=torch.int64),
    "meta": torch.empty((), device="meta"),
}


@pytest.mark.parametrize("like", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("shape", [(), (0, 5), (2, 3), LARGE])
def test_what_it_is_like(like: torch.Tensor, shape: tuple[int, ...]) -> None:
    made, expected = new_empty(like, shape), like.new_empty(shape)
    assert (made.shape, made.dtype, made.device, made.stride()) == (
        expected.shape,
        expected.dtype,
        expected.device,
        expected.stride(),
    )


def test_under_a_mode_arrays_are_torchs() -> None:
    with torch._subclasses.FakeTensorMode():
        assert type(new_empty(torch.empty(()), LARGE)) is torch._subclasses.FakeTensor


def test_few_blocks_wait() -> None:
    like, before = torch.empty(()), huge_mappings()
    for size in range(40):
        held = [new_empty(like, (LARGE[0] * (1 + (size + i) % 7),)) for i in range(20)]
        assert len({one.data_ptr() for one in held}) == 20
    del held
    assert huge_mappings() <= before + 16


def huge_mappings() -> int:
    """Blocks of this module's that are mapped: none is smaller than 32 MiB, and neighbours may count as one."""
    count = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(place, 16) for place in line.split()[0].split("-"))
        count += len(line.split()) == 5 and end - begin >= 32 << 20 and begin % (2 << 20) == 0 and end % (2 << 20) == 0
    return count


def test_a_capsule_that_nobody_takes_is_freed() -> None:
    place = new_empty(torch.empty(()), LARGE).data_ptr()
    for _ in range(50):
        _C.large_array(list(LARGE), 32)
    assert new_empty(torch.empty(()), LARGE).data_ptr() == place


@pytest.mark.parametrize(
    ("shape", "bits", "wrong"), [([-1], 32, "negative"), ([1], 16, "bits must be 32 or 64, got 16")]
)
def test_bad_requests(shape: list[int], bits: int, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        _C.large_array(shape, bits)


@pytest.mark.parametrize("shape", [[1 << 62, 1 << 62], [1 << 58], [0]])
def test_what_no_system_has(shape: list[int]) -> None:
    assert _C.large_array(shape, 32) is None


def test_threads() -> None:
    wrong = []

    def work(number: int) -> None:
        for _ in range(20):
            mine = new_empty(torch.empty(()), LARGE)
            mine[::4096] = number
            if bool((mine[::4096] != number).any()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_waits_makes_room(tmp_path: Path) -> None:
    """Where the address space is full."""
    program = (
        "import resource, torch\n"
        "from tpext.ops._memory import new_empty\n"
        "like = torch.empty(())\n"
        "held = [new_empty(like, (8 << 20,)) for _ in range(4)]; del held\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), resource.RLIM_INFINITY))\n"
        "assert new_empty(like, (25 << 20,)).data_ptr() % (2 << 20) == 0\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=120)


def test_what_waits_is_bounded_by_what_was_in_use(tmp_path: Path) -> None:
    """Arrays one at a time, each too large for what waits, as of sequences sorted by their lengths."""
    program = (
        "import re, torch\n"
        "from tpext.ops._memory import new_empty\n"
        "def mapped(): return int(re.search(r'VmSize:\\s+(\\d+)', open('/proc/self/status').read())[1]) << 10\n"
        "like, before = torch.empty(()), mapped()\n"
        "for size in range(32, 64): new_empty(like, (size << 18,))\n"
        "assert mapped() <= before + (2 * 63 + 2 << 20), mapped() - before\n"
        "places = set()\n"
        "for turn in range(20):\n"
        "    for size in (150, 70): places.add(new_empty(like, (size << 18,)).data_ptr())\n"
        "assert len(places) == 2, 'those that take turns find their memory again'\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=120)


def test_a_forked_process_has_its_own(tmp_path: Path) -> None:
    program = (
        "import os, threading, torch\n"
        "from tpext.ops._memory import new_empty\n"
        "like, stop = torch.empty(()), threading.Event()\n"
        "def churn():\n"
        "    while not stop.is_set(): new_empty(like, (9 << 20,))\n"
        "thread = threading.Thread(target=churn); thread.start()\n"
        "for _ in range(50):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        new_empty(like, (9 << 20,))[::4096] = 1\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "stop.set(); thread.join()\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, check=True, timeout=120)


@pytest.mark.parametrize("make", [tpext.nn.RNN, tpext.nn.GRU, tpext.nn.LSTM])
def test_layers(make: type[torch.nn.Module]) -> None:
    """Steps whose arrays are large give the same numbers in fresh memory and in memory that was used."""
    torch.manual_seed(0)
    x = torch.randn(330, 256, 1)
    module = make(1, 128, rule=tpext.Backprop())

    def step() -> tuple[int, list[torch.Tensor]]:
        module.zero_grad()
        output, _ = module(x)
        place = output.untyped_storage().data_ptr()
        output.square().mean().backward()
        return place, [output.detach().clone(), *(parameter.grad.clone() for parameter in module.parameters())]

    first, found = step()
    # what lies there now is not what an earlier step left
    new_empty(torch.empty(()), (330 * 256 * 128,)).fill_(torch.nan)
    again, same = step()
    assert first == again
    for a, b in zip(found, same, strict=True):
        assert torch.equal(a, b)
