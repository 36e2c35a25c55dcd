"""The machine that a run is made on: device, versions, and the commit of this code."""

import contextlib
import platform
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cifar100cli import __version__, devices, ranks, wording


def environment(device: torch.device, precision: str, data_dir: Path) -> dict[str, Any]:
    """What a run was made with and on."""
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "timm", "numpy", "safetensors")}
    return {
        "cifar100": __version__,
        "command": sys.argv,
        "commit": _commit(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "data_dir": str(data_dir.absolute()),
        "device": str(device),
        "device_name": device_name(device),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "ranks": ranks.count(),
        "launch": ranks.launch(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "versions": versions,
    }


def in_one_line(device: str) -> str:
    """PyTorch and the device that it would use."""
    chosen = devices.select_device(device)
    name = device_name(chosen)
    precision = devices.resolve_precision("auto", chosen)
    threads = wording.several(torch.get_num_threads(), "thread")
    return f"PyTorch {torch.__version__} on {chosen} ({name}), {threads}, precision {precision}"


def device_name(device: torch.device) -> str:
    """What the device is sold as."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def _processor() -> str:
    if sys.platform == "darwin":  # where `platform` calls them all arm
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return _said_by("sysctl", "-n", "machdep.cpu.brand_string")
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _said_by(*command: str) -> str:
    """What another program prints. Raises `OSError` or `SubprocessError` where it is not there, or fails."""
    said = subprocess.run(command, check=True, capture_output=True, timeout=10).stdout
    return said.decode(errors="replace").strip()  # not as the system would: names of files may be in any encoding


def _commit() -> str | None:
    """The commit that this code is at, when it runs from a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return _said_by("git", "-C", str(root), *arguments)

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
