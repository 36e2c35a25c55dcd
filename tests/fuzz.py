"""Feeds spoilt and hostile files to everything that reads files.

    python -m tests.fuzz --inputs 10000

Each reader takes its input or refuses it in words (`CifarError`, or `PickleError` for a pickle): another exception,
an operation that no reader has a reason for (a process, a connection, a file outside its folder), more than 4 GiB of
memory, or twenty seconds for one input end the script with the input that did it.
"""

import argparse
import contextlib
import faulthandler
import functools
import gzip
import io
import os
import pickle
import random
import re
import resource
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cifar100cli import (
    analysis,
    card,
    checkpoint,
    config,
    console,
    images,
    page,
    report,
    report_text,
    runs,
    unpack,
    unpickle,
    weights,
)
from cifar100cli.errors import CifarError
from cifar100cli.watcher import TrainState
from tests.conftest import Trained

MEMORY = 4 << 30
SECONDS = 20
FORBIDDEN = {
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.kill", "subprocess.Popen"),
    *("socket.connect", "socket.bind", "ctypes.dlopen", "pty.spawn", "webbrowser.open"),
}
VALUES = (
    *(b"-1", b"0", b"2.5", b"1e400", b"NaN", b"null", b"true", b'"x"', b"[]", b"{}", b"99999999999999999999"),
    *(b'"\\u0000"', b'"\\ud800"', b'"<script>"', b"'../../x'", b"!!python/object/apply:os.system [id]", b"*a", b"&a"),
)


attempts: list[str] = []  # at what is forbidden


@dataclass(frozen=True)
class Reader:
    """Something that reads files: inputs that it is known to take or should refuse, and how it is called."""

    corpus: Sequence[bytes]
    read: Callable[[bytes, Path], None]
    refusals: tuple[type[Exception], ...] = (CifarError,)


def spoilt(content: bytes, corpus: Sequence[bytes], chance: random.Random) -> bytes:
    """An input with some of it changed, lost, doubled, replaced by what stands elsewhere, or by an awkward value."""
    spoiled = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        if not spoiled:
            break
        # Heads decide most, and are as likely to be hit as all the rest.
        place = chance.randrange(min(len(spoiled), chance.choice((64, 1024, len(spoiled)))))
        kind = chance.random()
        if kind < 0.35:
            spoiled[place] = chance.choice((chance.randrange(256), spoiled[place] ^ 1 << chance.randrange(8), 0, 255))
        elif kind < 0.45:
            del spoiled[place:]
        elif kind < 0.55:
            del spoiled[place : place + chance.randrange(1, 64)]
        elif kind < 0.7:
            other = chance.choice(corpus)
            start = chance.randrange(len(other) or 1)
            spoiled[place:place] = other[start : start + chance.randrange(1, 256)]
        elif kind < 0.75:
            spoiled[place:place] = bytes(spoiled[place : place + 16]) * chance.randrange(1, 500)
        else:
            words = list(re.finditer(rb"-?\d+(\.\d+)?|\"[^\"]*\"|\b\w+\b", bytes(spoiled[:4096])))
            if words:
                word = chance.choice(words)
                spoiled[word.start() : word.end()] = chance.choice(VALUES)
    return bytes(spoiled)


# ------------------------------------------------------------------------------------------------- readers


def archives() -> Reader:
    """The archive of a data set: what is spoilt is the tar within, or the whole."""

    def tar(members: Sequence[tuple[tarfile.TarInfo, bytes]], kind: int = tarfile.GNU_FORMAT) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
            for member, content in members:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return buffer.getvalue()

    def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
        found = tarfile.TarInfo(name)
        found.type, found.linkname = kind, link
        return found

    plain = [(member("cifar/train"), b"content" * 99), (member("cifar/test"), b"more")]
    odd = [
        member("/etc/passwd"),
        member("../x"),
        member("cifar/train", tarfile.SYMTYPE, "/etc/passwd"),
        member("cifar/train", tarfile.LNKTYPE, "/etc/passwd"),
        member("cifar/tty", tarfile.CHRTYPE),
        member("cifar/" + "x" * 300),
    ]
    tars = [tar(plain, kind) for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    tars += [tar([*plain, (one, b"")]) for one in odd] + [tar(plain + plain), tar([])]

    def read(content: bytes, folder: Path) -> None:
        path = folder / "archive.tar.gz"
        whole = gzip.compress(content, 1, mtime=0)
        path.write_bytes(content if content[:1] == b"\x1f" else whole)
        (folder / "out").mkdir()
        unpack.unpack(path, "archive", "cifar", ["train", "test"], folder / "out", lambda done, total: None)
        assert {one.name for one in (folder / "out").iterdir()} == {"train", "test"}

    return Reader([*tars, *(gzip.compress(one, mtime=0) for one in tars)], read)


class Evil:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def pickles() -> Reader:
    """The files of the data sets."""
    content = {"data": np.arange(60, dtype=np.uint8).reshape(4, 15), "labels": [1, 2, 3], b"name": "x", "n": -5}
    corpus = [pickle.dumps(content, protocol) for protocol in range(6)]
    for protocol in (0, 2, 4):
        corpus.append(pickle.dumps(Evil(os.system, "touch owned"), protocol))
        corpus.append(pickle.dumps(Evil(eval, "__import__('os').system('touch owned')"), protocol))
    corpus.append(b"(" * 5000 + b"." + b"]" * 5000)
    corpus.append(b"\x80\x02]" + b"q\x00h\x00a" * 100 + b".")
    corpus.append(b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.")
    return Reader(corpus, lambda data, _: unpickle.read_pickle(data) and None, (unpickle.PickleError,))


def trained(folder: Path) -> Path:
    """A complete run, made by hand: no torch is needed to read it, and none to make it but for the weights."""
    import torch

    from cifar100cli.models import create_model

    chosen = config.load_preset("quickstart")
    run = runs.RunDir.create(folder, "quickstart", chosen.config, {"data_dir": "nowhere", "device_name": "a device"})
    model = create_model(chosen.config, 4, pretrained=False)
    about = card.Card(
        format=1,
        preset="quickstart",
        dataset="synthetic",
        classes=("a", "b", "c", "d"),
        superclasses=("x", "y"),
        superclass_of=(0, 0, 1, 1),
        image_size=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        unseen={"synthetic": 0.0},
        config=chosen.config.model_dump(mode="json", exclude_none=True),
    )
    checkpoint.save_model(run.path / runs.MODEL, model.state_dict(), about)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save_state(run.path / runs.STATE, checkpoint.snapshot(TrainState(1, 1, 0.5), Trained(model, optimizer)))
    row = {"train_loss": 1.0, "train_top1": 0.5, "val_loss": 1.0, "val_top1": 0.4, "seconds": 1, "images_per_second": 9}
    for epoch in range(1, 4):
        run.append_metrics({"epoch": epoch, **row})
    lines = "".join(f"{i},{'abcd'[i % 4]},{'abcd'[i % 3]},0.{i},{int(i % 4 == i % 3)}\n" for i in range(1, 60))
    table = "index,true,predicted,confidence,correct\n" + lines
    (run.path / runs.PREDICTIONS).write_text(re.sub(r"^(\d+)", lambda m: str(int(m[1]) - 1), table, flags=re.MULTILINE))
    figures = {"top1": 0.4, "top5": 0.7, "loss": 2.0, "ece": 0.1}
    run.write_result(
        {
            **{"preset": "quickstart", "dataset": "synthetic", "seed": 0, "epochs": 3, "run_dir": str(run.path)},
            **{"test": figures, "best": {"epoch": 2, "top1": 0.4}, "select": "best_val", "device": "cpu"},
            **{"precision": "fp32", "seconds": 60.0, "images_per_second": 900.0},
        }
    )
    return run.path


def checkpoints(root: Path) -> Reader:
    """Models and training states: what is spoilt is mostly the head, which is all that is believed."""
    run = trained(root)
    corpus = [(run / runs.MODEL).read_bytes(), (run / runs.STATE).read_bytes()]
    corpus += [(2**60).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"{}", b"PK\x03\x04", b""]
    corpus.append((100_002).to_bytes(8, "little") + b'{"a":' + b"[" * 99_997)

    def read(content: bytes, folder: Path) -> None:
        path = folder / "file.safetensors"
        path.write_bytes(content)
        for reading in (checkpoint.read_state, checkpoint.finished_epochs, card.read_card):
            with contextlib.suppress(CifarError):
                reading(path)
        checkpoint.load_model(path)

    return Reader(corpus, read)


def presets() -> Reader:
    """Presets in YAML."""
    corpus = [path.read_bytes() for path in sorted(config.presets_folder().glob("*.yaml"))]
    corpus.append(config.load_preset("resnet18-arcface-kd").config.to_yaml().encode())
    laughs = [b"a: &a [x,x,x,x,x,x,x,x,x]"]
    laughs += [b"%c: &%c [%s]" % (c + 1, c + 1, b",".join([b"*%c" % c] * 9)) for c in range(97, 110)]
    corpus.append(b"\n".join(laughs))
    corpus += [b"[" * 30_000, b"{a: " * 15_000, b"- " * 30_000, b"? " * 30_000]
    corpus += [b"a: !!python/name:os.system", b"<<: *x", b"seed: !!timestamp 1", b"seed: !!bool x", b"seed: !!set {a}"]
    corpus.append(b"train: {epochs: !!python/object/apply:os.system [touch owned]}")

    def read(content: bytes, folder: Path) -> None:
        path = folder / "mine.yaml"
        path.write_bytes(content)
        config.load_preset(str(path))

    return Reader(corpus, read)


def run_folders(root: Path) -> Reader:
    """A run's folder, of which one file is spoilt: the input begins with its name."""
    whole = trained(root)
    small = {path.name: path.read_bytes() for path in whole.iterdir() if path.suffix != ".safetensors"}
    corpus = [name.encode() + b"\n" + content for name, content in small.items()]
    corpus.append(runs.RESULT.encode() + b"\n" + b'{"a":' * 20_000)
    corpus.append(runs.METRICS.encode() + b"\n" + b"[" * 200_000)

    def read(content: bytes, folder: Path) -> None:
        name, _, spoiled = content.partition(b"\n")
        run = folder / "quickstart" / "run"
        run.mkdir(parents=True)
        (run / runs.MODEL).symlink_to(whole / runs.MODEL)
        for known, text in small.items():
            (run / known).write_bytes(spoiled if known.encode() == name else text)
        found = report.collect([folder])
        for form in ("json", "csv", "markdown", "table"):
            report_text.render(found, form)
        if len(content) % 16 == 0:  # charts take their time
            page.render(found)

    return Reader(corpus, read)


def pretrained() -> Reader:
    """Files of weights: safetensors and both kinds of PyTorch's. A bare pickle is put into a zip."""
    import torch
    from safetensors.torch import save

    state = {"conv.weight": torch.rand(4, 3, 3, 3), "bn.num_batches_tracked": torch.tensor(3), "bn.bias": torch.rand(4)}
    state["places"] = torch.arange(4)
    corpus = [
        save(state),
        save(state, {card.KEY: '{"format": 1, "config": {"model": {"backbone": "a", "stem": "b"}}}'}),
    ]
    kinds: list[Any] = [state, {"state_dict": state, "epoch": 3}, {f"module.{name}": t for name, t in state.items()}]
    kinds += [Evil(os.system, "touch owned"), {"conv.weight": Evil(os.system, "touch owned")}]
    kinds += [Evil(eval, "__import__('os').system('touch owned')"), {"a": torch.zeros(1).expand(10**9)}, [1], {}]
    kinds += [
        {"a": torch.eye(3).to_sparse()},
        {"a": torch.zeros(2, device="meta")},
        {"a": torch.nn.Parameter(state["bn.bias"])},
    ]
    for kind in kinds:
        for zipped in (True, False):
            buffer = io.BytesIO()
            torch.save(kind, buffer, _use_new_zipfile_serialization=zipped)
            corpus.append(buffer.getvalue())
            if zipped:
                with zipfile.ZipFile(buffer) as parts:
                    corpus.append(parts.read("archive/data.pkl"))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", corpus[3])
        bomb.writestr("archive/data/0", bytes(50_000_000))
    corpus += [buffer.getvalue(), (10**8).to_bytes(8, "little") + b"{", (2).to_bytes(8, "little") + b"{}"]
    corpus.append(b"\x80\x02}" + b"K\x01" + b"\x85" * 10_000 + b"K\x01s.")
    corpus.append(b"\x80\x02" + b"]" * 10_000 + b"a" * 9_999 + b".")
    corpus += [b"\x80\x02c" + b"x" * 100_000 + b"\ny\n.", b"\x80\x02X\xff\xff\0\0" + b"x" * 65_535 + b")R."]

    def read(content: bytes, folder: Path) -> None:
        path = folder / "weights"
        if content[:2] == b"\x80\x02" and content[2:4] != b"\x8a\n":  # the head of PyTorch's older files
            with zipfile.ZipFile(path, "w") as parts:
                for name, part in {"data.pkl": content, "version": b"3\n", "byteorder": b"little"}.items():
                    parts.writestr(f"archive/{name}", part)
                for number in range(3):
                    parts.writestr(f"archive/data/{number}", bytes(432))
        else:
            path.write_bytes(content)
        card.our_network(path)
        for tensor in weights.read_weights(path).values():
            if tensor.numel() < 1000:
                torch.isfinite(tensor).all()

    return Reader(corpus, read)


def predictions() -> Reader:
    """What a run says of each test image."""
    head = b"index,true,predicted,confidence,correct\n"
    lines = [b"%d,%c,%c,0.%d,%d\n" % (i, b"abcd"[i % 4], b"abcd"[i % 3], i, i % 4 == i % 3) for i in range(60)]
    corpus = [
        head + b"".join(lines),
        head,
        b"",
        head + b'0,"a' + b"\n" * 9999,
        b"," * 99_999,
        head + b"0,a,a,1e9999,1\n",
    ]

    def read(content: bytes, folder: Path) -> None:
        (folder / "predictions.csv").write_bytes(content)
        found = analysis.read_predictions(folder / "predictions.csv", "abcd")
        analysis.most_confused(analysis.confusion_matrix(found.true, found.predicted, 4), 9)
        analysis.calibration(found)

    return Reader(corpus, read)


def pictures() -> Reader:
    """Pictures of the user's."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8))
    corpus = []
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "AVIF", "BMP", "ICO", "TIFF", "PPM", "TGA", "JPEG2000"):
        buffer = io.BytesIO()
        try:
            noise.save(buffer, kind)
        except (KeyError, OSError):
            continue
        corpus.append(buffer.getvalue())

    def read(content: bytes, folder: Path) -> None:
        (folder / "picture").write_bytes(content)
        images.read_image(folder / "picture")

    return Reader(corpus, read)


# ------------------------------------------------------------------------------------------------ the loop


def watch(event: str, details: tuple[Any, ...]) -> None:
    """Refuse what no reader has a reason to do, and remember it: a reader may call any exception a refusal."""
    if event in FORBIDDEN:
        attempts.append(f"{event} {details!r}")
        raise PermissionError(event)


def torment(name: str, reader: Reader, inputs: int, seed: int) -> str:
    """Feed a reader: the corpus as it is, then spoilt."""
    chance = random.Random(seed)
    taken = refused = 0
    slowest = 0.0
    with tempfile.TemporaryDirectory() as root:
        for number in range(inputs):
            content = reader.corpus[number % len(reader.corpus)]
            if number >= len(reader.corpus):
                content = spoilt(content, reader.corpus, chance)
            folder = Path(root) / str(number)
            folder.mkdir()
            began = time.monotonic()
            faulthandler.dump_traceback_later(SECONDS, exit=True)  # no reader can swallow it
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    reader.read(content, folder)
                taken += 1
            except reader.refusals:
                refused += 1
            except BaseException:
                faulthandler.cancel_dump_traceback_later()
                kept = Path(tempfile.gettempdir()) / f"fuzz-{name.replace(' ', '-')}-{number}"
                kept.write_bytes(content)
                traceback.print_exc()
                sys.exit(f"{name}: input {number}, kept as {kept}")
            finally:
                faulthandler.cancel_dump_traceback_later()
            slowest = max(slowest, time.monotonic() - began)
            if attempts or Path("owned").exists():
                sys.exit(f"{name}: input {number} of seed {seed} tried {attempts or 'to touch a file'}")
            _remove(folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    counts = f"{inputs:,} inputs, {taken:,} taken, {refused:,} refused"
    return f"{name}: {counts}; slowest {slowest:.2f} s; peak {peak:.1f} GiB"


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.rmdir()


def main() -> None:
    """Feed all readers, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        makers: dict[str, Callable[[], Reader]] = {
            "archive": archives,
            "pickle": pickles,
            "checkpoint": functools.partial(checkpoints, Path(made) / "a"),
            "preset": presets,
            "run": functools.partial(run_folders, Path(made) / "b"),
            "picture": pictures,
            "weights": pretrained,
            "predictions": predictions,
        }
        readers = {name: makers[name]() for name in options.readers or makers}
        console.set_verbosity(console.QUIET)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        sys.addaudithook(watch)
        os.chdir(made)  # where hostile inputs would touch their file
        for name, reader in readers.items():
            print(torment(name, reader, options.inputs, options.seed), flush=True)


if __name__ == "__main__":
    main()
