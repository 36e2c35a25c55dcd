"""What a GPU would be given to do, over a CUDA runtime that computes nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import hollow


@pytest.mark.skipif(hollow.obstacle() is not None, reason=str(hollow.obstacle()))
def test_cuda_code_runs_to_its_end_and_no_step_waits() -> None:
    """Of every recipe, captured as a graph, and of the commands that train and measure."""
    finished = subprocess.run(
        [sys.executable, "-m", "tests.hollow"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
