"""How much of the machine's memory may still be taken, as far as the system says."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")  # below which Linux tells of itself


def available() -> int | None:
    """Bytes that may still be taken: of the machine, and within the limits of a container or a batch job.

    None where the system does not say.
    """
    machine = _of_machine()
    return None if machine is None else max(0, min([machine, *_left_by_limits()]))


def _of_machine() -> int | None:
    try:
        for line in (ROOT / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    if (windows := getattr(ctypes, "windll", None)) is not None:
        status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
        return int(status.free) if windows.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else None
    try:  # macOS tells what there is, and not what is free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return None


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of Windows' sysinfoapi.h."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("length", "load")),
        *(
            (name, ctypes.c_uint64)
            for name in ("all", "free", "paged", "free_paged", "space", "free_space", "extended")
        ),
    )


def _left_by_limits() -> Iterator[int]:
    """What the control groups of this process leave it: its own, as of a batch job, and each one above."""
    try:
        lines = os.fsdecode((ROOT / "proc/self/cgroup").read_bytes()).splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            mounted, limit, used = "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mounted, limit, used = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for folder in (ROOT / mounted / one for one in (group, *group.parents)):
            with contextlib.suppress(OSError, ValueError):  # not to be seen in a container; no limit
                yield int((folder / limit).read_text()) - int((folder / used).read_text()) + _idle_files(folder)


def _idle_files(group: Path) -> int:
    """Bytes of files that were read or written and are kept, for as long as nothing else wants the room."""
    with contextlib.suppress(OSError, ValueError):
        found = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(found.get("total_inactive_file", found.get("inactive_file", "0")))  # the total is version 1's
    return 0
