"""Ctrl-C and SIGTERM, at once, twice, and at moments at which Python can do little about them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cifar100cli import checkpoint
from cifar100cli.runs import RunDir
from tests.conftest import TINY


def start(tmp_path: Path, *arguments: str, program: tuple[str, ...] = ("-m", "cifar100cli")) -> subprocess.Popen[str]:
    command = [sys.executable, *program, "train", *arguments]
    return subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_of_an_epoch(tmp_path: Path, number: int, code: int) -> None:
    process = start(tmp_path, *TINY, "--set", "data.fraction=0.05", "--epochs", "1000")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch    2/"):
            break
    time.sleep(0.1)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert out == ""
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    run = re.search(r"cifar100 train --resume (\S+)$", last)
    assert run is not None, err
    folder = tmp_path / run[1]
    finished = checkpoint.finished_epochs(folder / "state.safetensors")
    assert finished >= 1
    assert f"{finished} of 1000 epochs are done and saved" in last
    assert not list(folder.glob(".*")), "no temporary file is left"


@pytest.mark.parametrize("module", ["typer", "cifar100cli.console", "pydantic"])
def test_ctrl_c_while_starting(tmp_path: Path, module: str) -> None:
    script = f"""
import os, signal, sys

class PressCtrlC:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

from cifar100cli.__main__ import main
sys.meta_path.insert(0, PressCtrlC())
sys.argv = ["cifar100", "presets", "--json"]
main()
"""
    finished = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 130
    assert finished.stderr.splitlines() == ["error: interrupted"]


LONG_CALL = """
import sys
import torch
from cifar100cli import trainer
from cifar100cli.__main__ import main

def one_long_call(*_):
    matrix = torch.rand(6000, 6000, dtype=torch.float64)
    print("calling", file=sys.stderr, flush=True)
    torch.linalg.svd(matrix)
    print("called", file=sys.stderr, flush=True)

trainer.train_epoch = one_long_call
main()
"""


def test_the_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    """Also in the middle of a call into a library, where Python cannot do anything about the first one."""
    process = start(tmp_path, *TINY, program=("-c", LONG_CALL))
    assert process.stderr is not None
    for line in process.stderr:
        if line == "calling\n":
            break
    for pause in (0.2, 0.2):
        time.sleep(pause)
        os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines() == ["error: interrupted again, and left at once; what was saved is kept"]
    (run,) = (path.parent for path in tmp_path.glob("runs/*/*/config.yaml"))
    with RunDir.open(run).exclusively():  # nobody holds it, and it can be gone on with
        assert not list(run.glob(".*.tmp"))


def test_a_sigterm_that_is_passed_on_too_is_no_second_one(tmp_path: Path) -> None:
    """`timeout` and `uv run` send one to a process whose whole group has heard it; later on, it is a second one."""
    script = """
import os, signal, time
from cifar100cli import console, errors, interrupts

interrupts.GRACE = 0.5
with interrupts.orderly(console.last_word):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    except errors.Terminated:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        print("put in order", flush=True)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        print("did not leave")
"""
    finished = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout) == (143, "put in order\n")
    assert finished.stderr.splitlines() == ["error: interrupted again, and left at once; what was saved is kept"]


WINDOWS = """
sys.platform = "win32"
os.kill = lambda process, number: os._exit(number)  # as Windows' own ends a process, whatever the signal
"""


@pytest.mark.parametrize("system", ["", WINDOWS])
def test_ctrl_c_while_an_object_is_finalised(tmp_path: Path, system: str) -> None:
    """Python drops an exception that is raised there."""
    script = f"""
import os, signal, sys, time
from cifar100cli import console, interrupts
{system}
class Finalised:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.1)

with interrupts.orderly(console.last_word):
    try:
        Finalised()
        for _ in range(50):
            time.sleep(0.1)
        print("not interrupted")
    except KeyboardInterrupt:
        print("interrupted")
"""
    finished = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (finished.stdout, finished.stderr) == ("interrupted\n", "")


def test_a_signal_that_waits(tmp_path: Path) -> None:
    """For safetensors, which would take an exception in the middle of its work for a broken file."""
    script = """
import os, signal, time
from cifar100cli import console, errors, interrupts

@interrupts.held_back()
def read():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)
    with interrupts.held_back():
        print("waits")
    print("waits")

with interrupts.orderly(console.last_word):
    try:
        read()
        print("goes on")
    except errors.Terminated:
        print("terminated")
"""
    finished = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (finished.stdout.split(), finished.stderr) == (["waits", "waits", "terminated"], "")


def test_a_signal_while_pytorch_is_imported(tmp_path: Path) -> None:
    process = start(tmp_path, *TINY, program=("-X", "importtime", "-m", "cifar100cli"))
    assert process.stderr is not None
    for line in process.stderr:
        if line.split()[-1].startswith("torch."):
            break
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, "")
    assert [line for line in err.splitlines() if line.startswith("error:")] == ["error: interrupted"]
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()
