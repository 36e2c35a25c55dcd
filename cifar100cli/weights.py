"""Files of pretrained weights: read without running anything that is in them, and fitted to a network by name."""

import contextlib
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision import models as torchvision_models

from cifar100cli import backbones, interrupts
from cifar100cli.bounded import kind_of, one_line
from cifar100cli.card import our_network, parse_metadata
from cifar100cli.errors import ChangedWeights, DataError
from cifar100cli.tensors import are_as_written, load_tensors

# Where training scripts put the weights in a file that holds other things too; averaged ones first, as timm does.
_INSIDE = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
_WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.")  # DataParallel, torch.compile, Lightning, our cosine head
_LEGACY = 5  # pickles at the head of a file of PyTorch's before 1.6
_LONGEST_NAME = 200  # of a function or class
_MOST_PARTS = 1000  # of a tuple: shapes, strides and the arguments of a tensor have a few
# PyTorch's reader calls them, and they make much of little: terabytes of zeros, or hours of a slow codec. No tensor is
# made of them.
_AMPLIFIERS = ("builtins bytearray", "__builtin__ bytearray", "_codecs encode")
_NUMBERS = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
_COUNTER = "num_batches_tracked"  # of batch norm; older files lack it
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")  # as torchvision's files still have it


@interrupts.held_back()
def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name: safetensors, or a PyTorch file under `weights_only=True`.

    Raises `DataError` for a file that is missing, broken, of another kind, or that asks for more than tensors.
    """
    kind = kind_of(path)
    if kind == "folder":
        raise DataError(f"{path}: is a folder; name the file in it, as in {path / 'model.safetensors'}")
    if kind != "file":
        raise DataError(f"{path}: there is no such file of weights")
    try:
        with path.open("rb") as file:
            start = file.read(9)
        # Safetensors: eight bytes of length, then a JSON object. Everything else is left to PyTorch to judge.
        content = _read_safetensors(path) if start[8:] == b"{" else _read_pytorch(path)
    except pickle.UnpicklingError as error:
        reason = str(error).split("Please file an issue")[0].split("WeightsUnpickler error:")[-1]
        _refuse(path, f"refused: it holds more than tensors, or is no PyTorch file ({one_line(reason)})")
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # PyTorch has its own error for everything that a file may claim
        words = one_line(error) or type(error).__name__
        _refuse(path, f"corrupt, or neither safetensors nor a PyTorch file ({words})")
    return _tensors(path, content)


def warn_of_change(path: Path, about: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Warn (`ChangedWeights`) where a file of ours holds other numbers than were written; older files do not say."""
    if not are_as_written(tensors, about):
        words = f"{path}: its weights are not those that training wrote: they were changed since, or damaged"
        warnings.warn(words, ChangedWeights, stacklevel=3)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    tensors, metadata = load_tensors(path)
    with contextlib.suppress(KeyError, ValueError):  # of another's file
        warn_of_change(path, parse_metadata(metadata), tensors)
    return tensors


def _read_pytorch(path: Path) -> object:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            # PyTorch compresses nothing: a file that unpacks to more than itself was made to fill the memory.
            if sum(part.file_size for part in parts) > path.stat().st_size:
                _refuse(path, "claims to hold more than it has")
            for part in parts:
                if part.filename.endswith(".pkl"):
                    with archive.open(part) as file:
                        _check_pickles(path, file, 1)
    else:
        with path.open("rb") as file:
            _check_pickles(path, file, _LEGACY)
    with path.open("rb") as file, warnings.catch_warnings():  # of a path, PyTorch would believe the ending
        warnings.simplefilter("ignore")  # about storages of old files
        return torch.load(file, map_location="cpu", weights_only=True)


def _check_pickles(path: Path, file: IO[bytes], count: int) -> None:
    """Refuse broken pickles, and those that PyTorch's reader would run none of, but choke on."""
    for _ in range(count):
        try:
            trap = _trap_in(file)
        except (ValueError, LookupError) as error:
            trap = f"it holds more than tensors, or is no PyTorch file ({one_line(error)})"
        if trap:
            _refuse(path, f"refused: {trap}")


def _trap_in(file: IO[bytes]) -> str | None:
    """What a pickle would hold its reader up with, if anything; nothing is unpickled.

    A tuple of tuples, as the key of a dictionary, is hashed part by part however often one is named again, and level
    by level until the stack overflows. A long name of something unknown stands in the message that refuses it, which
    PyTorch searches in a time that grows with the square of the name.
    """
    stack: list[int] = []  # the parts of each value, none for what is imported; of a mark, -1
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else int(argument)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
        elif name == "GLOBAL":
            if len(str(argument)) > _LONGEST_NAME:
                return "it asks for a name without end"
            if argument in _AMPLIFIERS:
                function = str(argument).replace(" ", ".")
                return f"it makes bytes ({function}), which weights are not; save the state dict alone"
            stack.append(0)
        else:
            if name in ("REDUCE", "NEWOBJ") and stack[-2]:
                return "it calls something that is no function"
            parts = 1
            for kind in reversed(opcode.stack_before):
                if kind is pickletools.stackslice:
                    continue
                while (popped := stack.pop()) >= 0 and kind is pickletools.markobject:
                    parts += max(popped, 1)
                parts += max(popped, 1)
            if not name.startswith("TUPLE"):
                parts = 1
            elif parts > _MOST_PARTS:
                return "it holds a tuple of very many parts"
            stack.extend(-1 if kind is pickletools.markobject else parts for kind in opcode.stack_after)
    return None


def _refuse(path: Path, reason: str) -> NoReturn:
    raise DataError(f"{path}: {reason}")


def _tensors(path: Path, content: object) -> dict[str, Tensor]:
    """The state dict of a file's content, without the prefixes that wrappers put before every name."""
    if isinstance(content, Mapping):
        content = next((content[key] for key in _INSIDE if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        _refuse(path, "holds no weights by name (a state dict is expected)")
    strange = [name for name, tensor in content.items() if not isinstance(name, str) or not isinstance(tensor, Tensor)]
    if strange:
        name = strange[0] if isinstance(strange[0], str) else f"a {type(strange[0]).__name__}"
        _refuse(path, f"holds something that is no weight: {one_line(name)}")
    for name, tensor in content.items():
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or tensor.dtype not in _NUMBERS:
            _refuse(path, f"{one_line(name)} is no plain tensor of common numbers, but of {_kind(tensor)}")
    return _unwrapped(dict(content))


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the names of what stands around the network, however many of them there are."""
    for prefix in _WRAPPERS:
        inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        # Beside a wrapped network there may be a head, as in our own files; any other weight is not a wrapper's.
        if inside and all(name.startswith((prefix, "head.")) for name in _weights(tensors)):
            return _unwrapped(inside)
    return tensors


def _weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that training moves. Whole numbers are counts, and tables of places that a network makes for itself."""
    return {n: t for n, t in tensors.items() if t.is_floating_point() and not n.endswith(_COUNTER)}


def is_table(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is one of whole numbers that a network makes for itself, and training leaves as it is."""
    return not tensor.is_floating_point() and not name.endswith(_COUNTER)


def load_backbone(model: nn.Module, path: Path, name: str, head: Iterable[str]) -> None:
    """Copy a file's weights into timm's network `name`, all but its head.

    Names may be timm's, or torchvision's for the same network. `head` names the modules that stay as they are.
    Raises `DataError` when a weight is missing, of another shape, not finite, or has no place in the network.
    """
    ours = our_network(path)
    if ours is not None and ours.backbone != name:
        theirs = ours.backbone
        _refuse(path, f"holds {theirs}, and this run is of {name}; --backbone {theirs} takes the same network")
    tensors = {_OLD_DENSENET.sub(r"\1\2", key): tensor for key, tensor in read_weights(path).items()}
    heads = tuple(f"{module}." for module in head)
    own = {n: t for n, t in model.state_dict().items() if not n.startswith(heads)}
    expected = _weights(own)
    if not expected.keys() <= tensors.keys():
        tensors = _from_torchvision(_weights(tensors), name, path) or tensors
    found = {n: t for n, t in _weights(tensors).items() if not n.startswith(heads)}
    missing = [n for n in expected if n not in tensors]
    unexpected = [n for n in found if n not in expected]
    whole = [f"{n} ({_kind(tensors[n])})" for n in expected if n in tensors and n not in found]
    misshapen = [
        f"{n} ({_shape(found[n])}, not {_shape(t)})"
        for n, t in expected.items()
        if n in found and found[n].shape != t.shape
    ]
    problems = [
        f"{problem} {', '.join(n[:60] for n in names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for problem, names in (
            ("lacks", missing),
            ("has besides", unexpected),
            ("has another kind of number for", whole),
            ("has another shape for", misshapen),
        )
        if names
    ]
    if problems:
        _refuse(path, f"does not fit {name}: it {'; it '.join(problems)}")
    broken = [n for n, tensor in found.items() if not torch.isfinite(tensor).all()]
    if broken:
        _refuse(path, f"{broken[0]} holds numbers that are not finite")
    others = {n: tensors[n] for n, t in own.items() if n not in expected and n in tensors and _alike(tensors[n], t)}
    model.load_state_dict({**found, **others}, strict=False)


def _alike(tensor: Tensor, expected: Tensor) -> bool:
    return (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"


def _from_torchvision(weights: Mapping[str, Tensor], name: str, path: Path) -> dict[str, Tensor] | None:
    """The weights of a torchvision network under timm's names, or None when they are not torchvision's.

    Both libraries define the parts of a network in the same order, so that the k-th tensor of a size is the
    same part in both: a factor for each channel may be (C, 1, 1) in one and (C,) in the other, and a layer behind
    7x7 pixels linear in one and a convolution in the other. Whether it is so for this network is not assumed but
    tried: both must compute the same.
    """
    theirs = _torchvision_network(weights, name)
    if theirs is None:
        return None
    problem = f"does not fit {name}: it is of a {type(theirs).__name__} of torchvision's, which"
    ours = timm.create_model(backbones.present_name(name))
    own, by_size = _weights(ours.state_dict()), defaultdict[tuple[int, ...], list[Tensor]](list)
    for tensor in weights.values():
        by_size[_size(tensor)].append(tensor)
    if Counter(map(_size, own.values())) != {size: len(found) for size, found in by_size.items()}:
        _refuse(path, f"{problem} cannot be translated")
    translated = {key: by_size[_size(tensor)].pop(0).reshape(tensor.shape) for key, tensor in own.items()}
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, computed = _computed(theirs, weights, images), _computed(ours, translated, images)
    if not torch.allclose(computed, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        _refuse(path, f"{problem} computes something else")
    return translated


def _size(tensor: Tensor) -> tuple[int, ...]:
    """The outputs, and how many numbers there are in all."""
    return (*tensor.shape[:1], tensor.numel())


def _computed(model: nn.Module, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """What a network gives with these weights. `load_state_dict` would ask some for the version of the file."""
    for name, tensor in model.state_dict().items():
        if name in weights:
            tensor.copy_(weights[name])
    output: Tensor = model.eval()(images)
    return output


class WithoutMemory(TorchFunctionMode):
    """Within this context weights are made on PyTorch's meta device, where a tensor is a shape and no more.

    Unlike `torch.device("meta")` it leaves alone what a network computes while it is built, as rates from
    `torch.linspace`, or a RegNet its widths: no number can be had back from the meta device.
    """

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones) and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _torchvision_network(weights: Mapping[str, Tensor], name: str) -> nn.Module | None:
    """torchvision's network of the same family as timm's `name` that has weights of exactly these names and shapes."""
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    family = re.sub("[^a-z]", "", name)
    for builder in torchvision_models.list_models(module=torchvision_models):
        if re.sub("[^a-z]", "", builder)[:4] not in family:
            continue
        with WithoutMemory():
            network = torchvision_models.get_model(builder, weights=None)
        if {n: t.shape for n, t in _weights(network.state_dict()).items()} == shapes:
            found: nn.Module = torchvision_models.get_model(builder, weights=None)
            return found
    return None
