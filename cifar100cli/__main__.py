"""`python -m cifar100cli` is `cifar100`."""

import os
import signal
import sys
from typing import NoReturn


def _leave(number: int, _: object) -> NoReturn:
    # An exception in the middle of an import could come out as anything; nothing is to be saved yet.
    os.write(2, b"error: interrupted\n")
    os._exit(128 + number)


def main() -> NoReturn:
    """Run the command line; Ctrl-C is answered in one line even while that is still being imported."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    from cifar100cli.cli import main as run

    try:
        run()
    except SystemExit as leaving:
        if leaving.code in (130, 143):  # all is said and put in order: nothing may take its time, or be disturbed
            os._exit(leaving.code)
        raise


if __name__ == "__main__":
    sys.exit(main())
