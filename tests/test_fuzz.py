"""Spoilt and hostile files, a hundred for each reader; `tests.fuzz` feeds any number."""

import os
import subprocess
import sys
from pathlib import Path


def test_a_hundred_inputs_for_each_reader() -> None:
    """In a process of its own, whose memory and operations are watched."""
    command = [sys.executable, "-m", "tests.fuzz", "--inputs", "100", "--seed", "1"]
    root = Path(__file__).parents[1]
    # Each thread reserves address space, and what is limited here is that.
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, cwd=root, env=one_thread, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("100 inputs") == 8


SWALLOWS = """
import contextlib, os, sys
from tests import fuzz

def read(content, folder):
    with contextlib.suppress(Exception):
        os.system("true")

sys.addaudithook(fuzz.watch)
fuzz.torment("swallowing", fuzz.Reader([b"x"], read), 1, 0)
"""


def test_the_watch_sees_what_a_reader_hides() -> None:
    root = Path(__file__).parents[1]
    finished = subprocess.run([sys.executable, "-c", SWALLOWS], capture_output=True, text=True, cwd=root, check=False)
    assert finished.returncode == 1
    assert "swallowing: input 0 of seed 0 tried" in finished.stderr
    assert "os.system" in finished.stderr
