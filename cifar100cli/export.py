"""A trained model as an ONNX file that takes uint8 images, checked on the spot against the model that it came from."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cifar100cli import __version__, checkpoint
from cifar100cli.atomic import replacing
from cifar100cli.bounded import one_line
from cifar100cli.card import Card
from cifar100cli.catalog import SIDE
from cifar100cli.classifier import ImagesToLogits
from cifar100cli.devices import is_out_of_memory
from cifar100cli.errors import CifarError
from cifar100cli.unrolled import as_pytorch_computes

TOLERANCE = 1e-4  # of a logit, and of its size where that is more than one
CHECKED = (1, 7, 32)  # images at a time
MOST_BYTES = 2**31 - (64 << 20)  # of weights: a message of protobuf has less than 2 GiB, and the graph is in it, too


def export(path: Path, out: Path) -> dict[str, Any]:
    """Write the model of a run or checkpoint to `out`; returns what `export --json` prints.

    Raises `CifarError`, and leaves nothing under the name, for more weights than one file holds, when PyTorch cannot
    write the model as ONNX, and when ONNX Runtime does not compute what the model does.
    """
    saved = checkpoint.load_model(path)
    weights = sum(tensor.nbytes for tensor in saved.model.state_dict().values())
    if weights > MOST_BYTES:
        raise CifarError(
            f"{saved.path}: has {weights / 1e9:.1f} GB of weights, and an ONNX file holds at most 2; "
            "export a smaller network, or use this one from Python (cifar100cli.load_model)"
        )
    as_pytorch_computes(saved.model)  # a convolution is to be one in the graph
    network = ImagesToLogits(saved.model.eval(), saved.preprocessing)
    with _refused(f"PyTorch {torch.__version__} cannot write {saved.config.model.backbone} as ONNX"):
        content, opset = _written(network, saved.card)
    with _refused("ONNX Runtime cannot compute the exported graph"):
        difference = _check(network, content)
    with replacing(out) as temporary:
        temporary.write_bytes(content)
    return {
        "checkpoint": str(saved.path),
        "out": str(out),
        "bytes": len(content),
        "opset": opset,
        "input": {"images": ["batch", 3, SIDE, SIDE], "type": "uint8"},
        "output": {"logits": ["batch", len(saved.card.classes)], "type": "float32"},
        "preset": saved.card.preset,
        "dataset": saved.card.dataset,
        "image_size": saved.card.image_size,
        "checked_batches": list(CHECKED),
        "largest_difference": difference,
    }


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Exporter and runtime have errors of many kinds of their own, and some networks are beyond them."""
    try:
        yield
    except (CifarError, OSError):
        raise
    except Exception as error:
        reason: BaseException = error
        while reason.__cause__ is not None:  # around which the exporter puts advice of its own
            reason = reason.__cause__
        if is_out_of_memory(reason):
            raise
        raise CifarError(f"{what} ({one_line(reason) or type(reason).__name__}); nothing was written") from None


def _written(network: ImagesToLogits, card: Card) -> tuple[bytes, int]:
    """What the file holds, graph and weights, and the version of its operators.

    Not by `program.save`, which puts large weights into a second file, whatever it is told.
    """
    example = torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8)
    with torch.inference_mode():
        network(example)  # which makes what is kept, outside the graph
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _silent("torch.onnx", "onnxscript"):
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props.update(_metadata(card))
        return program.model_proto.SerializeToString(), int(program.model.opset_imports[""])


@contextlib.contextmanager
def _silent(*names: str) -> Any:
    """Let loggers say nothing for a while."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _metadata(card: Card) -> dict[str, str]:
    """What the file says about the model: text, and JSON where it is more than a word."""
    return {
        "producer": f"cifar100 {__version__}",
        "preset": card.preset,
        "dataset": card.dataset,
        "epoch": str(card.epoch),
        "image_size": str(card.image_size),
        "input": f"images: uint8 RGB, (batch, 3, {SIDE}, {SIDE}); resizing and normalisation are inside",
        "output": "logits: float32, (batch, classes); a softmax makes probabilities of them",
        "classes": json.dumps(card.classes, ensure_ascii=False),
        "superclasses": json.dumps([card.superclasses[index] for index in card.superclass_of], ensure_ascii=False),
    }


def _check(network: ImagesToLogits, content: bytes) -> float:
    """The largest difference between the file's logits and the model's, on noise and on plain colours."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    largest = 0.0
    for count in CHECKED:
        images = random.integers(0, 256, (count, 3, SIDE, SIDE), np.uint8)
        images[0] = 255 * (count % 2)
        (found,) = session.run(["logits"], {"images": images})
        with torch.inference_mode():
            expected = network(torch.from_numpy(images)).numpy()
        if found.shape != expected.shape:
            raise CifarError(f"the exported graph gives {found.shape} for {count} images, not {expected.shape}")
        gap = np.abs(found.astype(np.float64) - expected)
        if not (gap <= TOLERANCE * np.maximum(1, np.abs(expected).max(1, keepdims=True))).all():
            raise CifarError(
                f"the exported graph differs from the model by {gap.max():.2g} in a logit, more than {TOLERANCE:g}; "
                "nothing was written"
            )
        largest = max(largest, float(gap.max()))
    return largest
