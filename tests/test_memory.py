"""How much memory may still be taken: Linux's files as they stand on real machines, and what other systems say."""

import ctypes
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cifar100cli import memory

MACHINE = {"proc/meminfo": "MemTotal:  64000000 kB\nMemFree:  100 kB\nMemAvailable:  50000000 kB\n"}
FREE = 50_000_000 * 1024
GROUP = "sys/fs/cgroup"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the place of /."""
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    return tmp_path


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_this_machine_tells_a_sensible_number() -> None:
    free = memory.available()
    assert free is not None
    assert 2**26 < free < 2**44


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {}, FREE),
        ("0::/\n", {"memory.max": "1000\n", "memory.current": "400\n"}, 600),  # a container with its own namespace
        ("0::/\n", {"memory.max": "max\n", "memory.current": "400\n"}, FREE),
        ("0::/\n", {"memory.max": "1000\n", "memory.current": "1400\n"}, 0),
        (  # files that were read are given up
            "0::/\n",
            {"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 500\ninactive_file 300\n"},
            400,
        ),
        (
            "4:memory:/\n",
            {
                **{"memory/memory.limit_in_bytes": "1000", "memory/memory.usage_in_bytes": "900"},
                "memory/memory.stat": "inactive_file 100\ntotal_inactive_file 300\n",
            },
            400,
        ),
        ("0::/job_7/step_0\n", {"job_7/memory.max": "1000", "job_7/memory.current": "400"}, 600),
        ("0::/job_7/step_0\n", {"job_8/memory.max": "1000", "job_8/memory.current": "400"}, FREE),
        (
            "0::/user.slice/run.service\n",
            {
                **{"user.slice/memory.max": "1000", "user.slice/memory.current": "900"},
                **{"user.slice/run.service/memory.max": "500", "user.slice/run.service/memory.current": "300"},
            },
            100,
        ),
        (
            "9:cpu,cpuacct:/\n4:memory:/slurm/job_7\n0::/\n",
            {"memory/slurm/memory.limit_in_bytes": "1000", "memory/slurm/memory.usage_in_bytes": "400"},
            600,
        ),
        (  # a container that is told its path on the host, and sees its own folder alone
            "4:memory:/docker/a:b\n",
            {"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "400"},
            FREE,
        ),
        (
            "4:memory:/docker/a:b\n",
            {"memory/memory.limit_in_bytes": "1000", "memory/memory.usage_in_bytes": "400"},
            600,
        ),
    ],
)
def test_the_least_that_a_limit_above_the_process_leaves(
    root: Path, groups: str, limits: dict[str, str], expected: int
) -> None:
    write(root, {**MACHINE, "proc/self/cgroup": groups, **{f"{GROUP}/{name}": text for name, text in limits.items()}})
    assert memory.available() == expected


@pytest.mark.usefixtures("root")
def test_macos_tells_what_there_is_and_half_of_it_is_taken_to_be_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 16384}.__getitem__)
    assert memory.available() == 1000 * 16384 // 2


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(("answer", "expected"), [(1, 123456789012), (0, None)])
def test_windows_is_asked(monkeypatch: pytest.MonkeyPatch, answer: int, expected: int | None) -> None:
    """The structure is that of sysinfoapi.h: 64 bytes, its own length first, what is free from byte 16 on."""

    def told(status: Any) -> int:
        place = ctypes.addressof(status._obj)
        assert ctypes.c_uint32.from_address(place).value == ctypes.sizeof(status._obj) == 64
        ctypes.c_uint64.from_address(place + 16).value = 123456789012
        return answer

    windows = SimpleNamespace(kernel32=SimpleNamespace(GlobalMemoryStatusEx=told))
    monkeypatch.setattr(ctypes, "windll", windows, raising=False)
    assert memory.available() == expected


@pytest.mark.usefixtures("root")
def test_where_nothing_is_known_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sysconf")
    assert memory.available() is None
