"""`python -m cifar100cli` is `cifar100`."""

import os
import signal
import sys
from typing import NoReturn


def _leave(*_: object) -> NoReturn:
    # An exception in the middle of an import could come out as anything; nothing is to be saved yet.
    os.write(2, b"error: interrupted\n")
    os._exit(130)


def main() -> NoReturn:
    """Run the command line; Ctrl-C is answered in one line even while that is still being imported."""
    signal.signal(signal.SIGINT, _leave)
    from cifar100cli.cli import main as run

    run()


if __name__ == "__main__":
    sys.exit(main())
