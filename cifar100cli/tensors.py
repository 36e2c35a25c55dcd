"""Tensors by name on the disk, as safetensors: nothing is pickled, nothing is half-written, and damage is noticed."""

import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cifar100cli import interrupts
from cifar100cli.atomic import replacing
from cifar100cli.bounded import not_text, one_line
from cifar100cli.card import KEY, check_header
from cifar100cli.errors import DataError


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """The CRC-32 of tensors' names and bytes, in the order of the names: safetensors has none of its own."""
    found = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous().reshape(-1)
        found = zlib.crc32(tensor.view(torch.uint8).numpy().data, zlib.crc32(name.encode(), found))
    return found


def are_as_written(tensors: Mapping[str, Tensor], about: Mapping[str, object]) -> bool:
    """Whether a file of ours holds what it held at first, by what it says of itself; older ones say nothing."""
    return "crc32" not in about or about["crc32"] == checksum(tensors)


@interrupts.held_back()
def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a file of ours, whole or not at all: tensors, and what is to be known of them. Raises `OSError`."""
    # One key only: safetensors writes several in an order that changes from process to process, and the same
    # training must end in the same bytes.
    metadata = {KEY: json.dumps({**about, "crc32": checksum(tensors)}, ensure_ascii=False)}
    with replacing(path) as temporary:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        except SafetensorError as error:  # safetensors' own word for a full disk and the like
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


@interrupts.held_back()
def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of any safetensors file. Raises `DataError` for one that is missing or broken."""
    if strange := not_text(path):
        raise DataError(f"{path}: cannot be opened, since {strange} is not UTF-8: rename it, or copy the run elsewhere")
    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return tensors, file.metadata() or {}
    except RuntimeError as error:  # there is no room to map it
        raise DataError(f"{path}: cannot be read ({one_line(error)})") from None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: corrupt, or no safetensors file ({one_line(error)})") from None
