"""Libraries that one command or option needs alone, looked for without importing them."""

import importlib.util

from cifar100cli.errors import UsageError

EXPORT = ("onnx", "onnxscript", "onnxruntime")


def check(what: str, *libraries: str) -> None:
    """Raise `UsageError` where some are not installed that `what` needs."""
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{what} needs {', '.join(missing)}: pip install {' '.join(missing)}")
