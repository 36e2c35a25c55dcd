"""A run that is killed with SIGKILL goes on to the same bits: some kills, of which `tests.kills` does any number."""

import re
import subprocess
import sys
from pathlib import Path


def test_some_kills() -> None:
    """In a process of its own, which can be forked: this one may have threads."""
    command = [sys.executable, "-m", "tests.kills", "--kills", "8", "--most", "2", "--seed", "1"]
    root = Path(__file__).parents[1]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert re.search(r"^([89]|1\d) kills .* all ended with the bits", finished.stdout, re.MULTILINE)
