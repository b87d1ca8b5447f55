"""Large fresh results sit on large pages where the kernel grants them, and hold the same numbers."""

import sys
from pathlib import Path

import pytest
import torch

from lightning_n2uq.compression import NUQCodec
from lightning_n2uq.ops.kernels import pages

NUMEL = (pages._SMALLEST + (4 << 20)) // 4


def advised_range(address: int) -> bool:
    """Whether the mapping around `address` carries the advice (flag `hg`)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(part, 16) for part in head.split("-"))
            inside = low <= address < high
        elif inside and head == "VmFlags:":
            return "hg" in line.split()
    return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise is Linux's")
def test_large_results_ask_for_large_pages():
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("this kernel has no large pages")
    codec = NUQCodec(bits=2)
    payload = torch.zeros(codec.nbytes(NUMEL), dtype=torch.uint8)
    decoded = codec.decode(payload, NUMEL)
    assert advised_range(decoded.data_ptr() + 2 * NUMEL)  # in the middle
    assert not decoded.any()


def test_small_results_are_left_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(pages, "_madvise", lambda: lambda *arguments: calls.append(arguments))
    pages.advise_large_pages(torch.empty(1000))
    assert not calls
    pages.advise_large_pages(torch.empty(NUMEL))
    ((start, size, _),) = calls
    assert start % pages._HUGE == size % pages._HUGE == 0


def test_platforms_without_madvise_decode_as_well(monkeypatch):
    monkeypatch.setattr(pages, "_madvise", lambda: None)
    codec = NUQCodec(bits=2)
    payload = torch.zeros(codec.nbytes(NUMEL), dtype=torch.uint8)
    assert not codec.decode(payload, NUMEL).any()
