"""Tests, and scripts that do at length what some of them do in samples (`python -m tests.kills`)."""

import os
import sys
from pathlib import Path

# Containers often have Python write no bytecode. Then every process that a test starts compiles the sources of PyTorch
# and timm anew, which takes longer than all else that it does; so the tests keep bytecode in a folder of their own.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
