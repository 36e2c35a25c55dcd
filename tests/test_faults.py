"""Signals, dying ranks, failing disks and processes at the same time: samples of what the scripts do at length."""

import re
import subprocess
import sys
from pathlib import Path


def run(module: str, *arguments: str) -> str:
    """A script in a process of its own, which can be forked: this one may have threads."""
    finished = subprocess.run(
        [sys.executable, "-m", f"tests.{module}", *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_half_a_dozen_signals() -> None:
    told = run("kills", "--signals", "--kills", "4", "--most", "2", "--seed", "2")
    assert re.search(r"^[45] stops .* all ended with the bits", told, re.MULTILINE)


def test_two_ranks_of_which_one_is_killed() -> None:
    told = run("kills", "--ranks", "2", "--kills", "2", "--most", "2", "--seed", "1")
    assert re.search(r"^\d kills .* of 2 ranks: all ended with the bits", told, re.MULTILINE)


def test_a_disk_that_fails() -> None:
    """At a few operations of a run, of predictions and of a download; and truly, where something can be mounted."""
    scenes = ("--scene", "train", "--scene", "predictions", "--scene", "download")
    told = run("faults", "--mounted", "2", "--first", "11", "--every", "37", *scenes)
    assert re.search(r"^\d+ faults .* in [34] scenes: .* went on to the same bits", told, re.MULTILINE)


def test_processes_at_the_same_time() -> None:
    assert "nobody was in another's way" in run("together", "--rounds", "1", "--recipe", "distill, cached logits")
