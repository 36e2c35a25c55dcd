"""What a device is chosen for, and what the process does then."""

import ctypes
import subprocess
import sys

import pytest
import torch

from cifar100cli import devices

KEPT = """
import sys, torch
from cifar100cli import devices

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

if sys.argv[1] == "selected":
    devices.select_device("cpu")
blocks = [torch.ones(4 << 20) for _ in range(8)]
full = resident()
del blocks
print(full - resident())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's alone")
def test_freed_memory_stays_with_the_process() -> None:
    """Of 128 MB in blocks of 16, hardly any goes back once the CPU was chosen, and without that nearly all."""
    given_back = {
        how: int(subprocess.run([sys.executable, "-c", KEPT, how], capture_output=True, check=True, text=True).stdout)
        for how in ("selected", "plain")
    }
    assert given_back["selected"] < 10e6
    assert given_back["plain"] > 80e6


FORGOTTEN = """
import torch
from cifar100cli import devices

cpu = devices.select_device("cpu")
block = torch.ones(64 << 20)
del block
before = devices.peak_memory(cpu)
devices.forget_peak_memory(cpu)
print(before - devices.peak_memory(cpu))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is the process's own")
def test_the_peak_of_a_run_is_not_that_of_the_one_before() -> None:
    """Of 268 MB in use before, most are forgotten."""
    run = subprocess.run([sys.executable, "-c", FORGOTTEN], capture_output=True, check=True, text=True)
    assert int(run.stdout) > 200e6


def test_the_chosen_gpu_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose streams, events and waits PyTorch takes where none is named."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("auto", "cuda", "cuda:1"):
        assert devices.select_device(name) == current[-1]
    assert current == [torch.device("cuda:0"), torch.device("cuda:0"), torch.device("cuda:1")]
