"""Memory that stays taken: weights lie apart from what comes and goes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from whisper_moe.heap import heap_info

MAPPED = """
import os
import torch
from whisper_moe.heap import heap_info, weights_apart

mapped = lambda: heap_info().hblks

def made(count):
    before = mapped()
    tensors = [torch.empty(256 << 10) for _ in range(count)]
    return tensors, mapped() - before

with weights_apart():
    weights, inside = made(20)
passing, outside = made(20)
large, apart = [torch.empty(5 << 20)], mapped()
del large
print(inside, outside, apart - mapped(), os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_only_weights_and_large_tensors_are_mapped_by_themselves() -> None:
    if heap_info() is None:
        pytest.skip("this C library does not tell")
    done = subprocess.run([sys.executable, "-c", MAPPED], capture_output=True, text=True, check=False)
    inside, outside, large, kernels = done.stdout.split() or pytest.fail(done.stderr)
    assert int(inside) == 20, "each weight of a megabyte has a mapping of its own"
    assert int(outside) == 0, "what comes and goes shares the heap"
    assert int(large) == 1, "and what is large is given back when it is freed"
    assert int(kernels) < 1024


def test_a_limit_that_the_user_has_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from whisper_moe.heap import weights_apart

    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    with weights_apart():
        pass
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"


GIVEN_BACK = """
import resource, torch
from whisper_moe.heap import give_back_memory, weights_apart

with weights_apart():
    pass
page = resource.getpagesize()
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * page >> 20
pieces = [torch.ones(1 << 20) for _ in range(40)]  # 160 MB in the heap, every other of them freed: holes
kept = pieces[::2]
del pieces
full = resident()
give_back_memory(200 << 20)
spared = resident()
give_back_memory(40 << 20)
holes = resident()
top = [torch.ones(1 << 20) for _ in range(12)]  # 48 MB at the heap's end
raised = resident()
del top
print(full - spared, spared - holes, raised - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_free_memory_goes_back_where_there_is_more_of_it_than_is_spared() -> None:
    if heap_info() is None:
        pytest.skip("this C library does not tell")
    done = subprocess.run([sys.executable, "-c", GIVEN_BACK], capture_output=True, text=True, check=True)
    spared, given_back, top = map(int, done.stdout.split())
    assert spared < 20
    assert given_back > 60
    assert top < 10, "a pack's next tensor finds its pages"
