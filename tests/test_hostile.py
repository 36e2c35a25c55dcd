"""What comes from elsewhere and means harm: each reader refuses it in one line, at once, and in little memory."""

import contextlib
import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cifar100cli import analysis, bounded, card, datasets, images, page, report, runs, unpickle, weights
from cifar100cli.card import KEY, read_card
from cifar100cli.config import load_preset
from cifar100cli.download import find_installed
from cifar100cli.errors import CifarError, DataError, UsageError
from cifar100cli.unpickle import PickleError, read_pickle
from tests.conftest import last_run
from tests.test_checkpoint import make_card
from tests.test_report import make_run
from tests.weather import ARCHIVE, FOLDER

Spoil = Callable[[Path], object]


def make_socket(path: Path) -> None:
    """A path may have a hundred bytes, hence the detour."""
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text.isprintable()
    return text


ODD: dict[str, Spoil] = {
    "pipe": os.mkfifo,
    "socket": make_socket,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "circle": lambda path: path.symlink_to(path),
}


# --------------------------------------------------------------------------------------------- run folders


@pytest.mark.parametrize("name", [*runs.FILES, runs.LOCK])
@pytest.mark.parametrize("kind", ODD)
def test_a_run_with_something_else_than_a_file(tmp_path: Path, name: str, kind: str) -> None:
    """A pipe that nobody writes to held the report up for ever, and a folder ended it with the good runs unreported."""
    make_run(tmp_path, "resnet18-baseline", 0.44)
    run = make_run(tmp_path, "resnet18-baseline", 0.45, seed=1)
    (run.path / name).unlink(missing_ok=True)
    ODD[kind](run.path / name)
    found = report.collect([tmp_path])
    (row,) = found.rows
    assert row.n + len(found.unusable) == 2
    assert "resnet18-baseline" in page.render(found)
    with contextlib.suppress(CifarError):
        last_run(tmp_path)


LARGE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a configuration of ten megabytes": (runs.CONFIG, lambda: b"seed: 1\n" + b"#\n" * 5_000_000),
    "ten megabytes of nesting": (runs.CONFIG, lambda: b"[" * 10_000_000),
    "an environment of ten megabytes": (runs.ENVIRONMENT, lambda: b'{"format": 1, "x": "' + b"x" * 10**7 + b'"}'),
    "a nested environment": (runs.ENVIRONMENT, lambda: b'{"format": 1, "x": ' + b'{"a": ' * 900 + b"1" + b"}" * 901),
    "a nested result": (runs.RESULT, lambda: b'{"a":' * 100_000),
    "a large result": (runs.RESULT, lambda: b'{"a": [' + b"[]," * 10_000_000 + b"[]]}"),
}


@pytest.mark.parametrize("case", LARGE)
def test_a_run_with_a_file_that_is_too_much(tmp_path: Path, case: str) -> None:
    name, content = LARGE[case]
    run = make_run(tmp_path, "resnet18-baseline", 0.44)
    (run.path / name).write_bytes(content())
    (listed,) = report.collect([tmp_path]).unusable
    assert name in listed.reason
    assert listed.reason.isprintable()


def test_an_environment_that_lists_many_resumptions(tmp_path: Path) -> None:
    """Each time has what was so at the beginning, too: copied for each, a megabyte made hundreds of gigabytes."""
    run = make_run(tmp_path, "resnet18-baseline", 0.44)
    many = {**dict.fromkeys(map(str, range(20_000)), 0), "resumed": [{}] * 20_000 + [{"device": "cuda"}]}
    (run.path / runs.ENVIRONMENT).write_text(json.dumps({**run.environment(), **many}))
    assert len(run.times()) == 1 + runs.MOST_RESUMED
    tracemalloc.start()
    try:
        assert run.latest("device") == "cuda"
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def sparse_file(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


@pytest.mark.parametrize("name", [runs.CONFIG, runs.ENVIRONMENT, runs.RESULT, runs.METRICS, runs.PREDICTIONS])
def test_a_run_with_a_terabyte(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path, "resnet18-baseline", 0.44)
    sparse_file(run.path / name, 1 << 40)
    found = report.collect([tmp_path])
    page.render(found)
    assert len(found.unusable) == (name != runs.PREDICTIONS)


@pytest.mark.parametrize(
    ("more", "kept"),
    [
        (b'{"epoch": 2, "x": "' + b"x" * 10_000_000 + b'"}\n', 1),
        (b'{"epoch": 2, "train_loss": ' + b"[" * 100_000, 1),
        (b"\n" * 1_000_000, 1),
        (b"[]\n" * 1_000_000, 1),
        (b'{"epoch": 1}\n' * 1_000_000, 1),
        (b'{"epoch": 2, "train_loss": 1, "train_top1": 1, "seconds": 1, "images_per_second": 1, "x": [1]}\n', 1),
        (b'{"epoch": 2, "train_loss": 1, "train_top1": 1, "seconds": 1, "images_per_second": 1, "x": 1}\n', 2),
    ],
)
def test_metrics_that_are_none(tmp_path: Path, more: bytes, kept: int) -> None:
    run = make_run(tmp_path, "resnet18-baseline", 0.44)
    with (run.path / runs.METRICS).open("ab") as file:
        file.write(more)
    assert len(run.metrics()) == kept
    assert len(report.collect([tmp_path]).rows) == 1


def test_a_million_epochs_are_too_many(tmp_path: Path) -> None:
    """As many as a preset may ask for are read, and no more."""
    run = make_run(tmp_path, "resnet18-baseline", 0.44)
    row = '{"epoch": %d, "train_loss": 1, "train_top1": 1, "seconds": 1, "images_per_second": 1}\n'
    (run.path / runs.METRICS).write_text("".join(row % epoch for epoch in range(1, 150_001)))
    assert len(run.metrics()) == runs.MOST_EPOCHS


def test_a_run_without_permission(tmp_path: Path) -> None:
    """Whoever may read everything reads it; for everybody else the run is listed."""
    run = make_run(tmp_path, "resnet18-baseline", 0.44)
    for name in (runs.CONFIG, runs.ENVIRONMENT, runs.RESULT, runs.METRICS):
        (run.path / name).chmod(0)
    found = report.collect([tmp_path])
    assert len(found.rows) + len(found.unusable) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("evaluate", "SHUT"), "run/model.safetensors: Permission denied"),
        (("predict", "SHUT", "picture.png"), "run/model.safetensors: Permission denied"),
        (("export", "SHUT", "--out", "run.onnx"), "run/model.safetensors: Permission denied"),
        (("train", "--resume", "SHUT"), "run/config.yaml: Permission denied"),
        (
            ("distill", "--preset", "resnet18-arcface-kd", "--teacher", "SHUT"),
            "run/model.safetensors: Permission denied",
        ),
        (("finetune-cifar10", "--init", "SHUT"), "run/model.safetensors: Permission denied"),
        (("evaluate", "FILE", "--device", "cpu"), "shut.safetensors: Permission denied"),
        (("train", "--dry-run", "--weights", "FILE", "--device", "cpu"), "shut.safetensors: Permission denied"),
        (("train", "--dry-run", "--weights", "FOLDER"), "is a folder; name the file in it"),
        (("train", "--dry-run", "--dataset", "cifar100", "--data-dir", "SHUT"), "Permission denied"),
        (("download", "--data-dir", "FOLDER", "--from", "FILE"), "shut.safetensors: Permission denied"),
        (("download", "--data-dir", "SHUT"), "Permission denied; --data-dir or CIFAR100_DATA_DIR names another place"),
        (("report", "FILE"), "there is no such folder of runs"),
        (("evaluate", "n" * 300), "File name too long"),
    ],
)
def test_what_may_not_be_read(tmp_path: Path, words: tuple[str, ...], told: str) -> None:
    """What may not be read is told as what is not there: in one line, with the exit code of the contract."""
    drop: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may read everything, and there is no setpriv to take that away")
        drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
        starts = [*drop, sys.executable, "-c", "import cifar100cli"]
        if subprocess.run(starts, capture_output=True, check=False).returncode:
            pytest.skip("without root's rights, these files cannot be read, or the rights cannot be laid down")
    (tmp_path / "run").mkdir()
    (tmp_path / "picture.png").touch()
    file = tmp_path / "shut.safetensors"
    file.touch()
    for path in (tmp_path / "run", file):
        path.chmod(0)
    names = {"SHUT": str(tmp_path / "run"), "FILE": str(file), "FOLDER": str(tmp_path)}
    command = [sys.executable, "-m", "cifar100cli", *(names.get(word, word) for word in words)]
    answer = subprocess.run([*drop, *command], capture_output=True, text=True, check=False, cwd=tmp_path)
    (tmp_path / "run").chmod(0o700)
    assert (answer.returncode, answer.stdout) == (3, "")
    assert told in answer.stderr
    assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize("ranks", ['"\\u001b[31m"', "[[]]", "1e9", "null", "0"])
def test_ranks_that_are_none(tmp_path: Path, ranks: str) -> None:
    run = make_run(tmp_path, "resnet18-baseline", 0.44)
    result = (run.path / runs.RESULT).read_text()
    (run.path / runs.RESULT).write_text(result.replace("{", '{"ranks": ' + ranks + ",", 1))
    assert "ranks" in report.collect([tmp_path]).unusable[0].reason


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """A folder so deep that functions which call themselves for each level give up, such as pytest's own cleaning."""
    here, levels = Path.cwd(), 1500
    root = tmp_path / "deep"
    root.mkdir()
    os.chdir(root)
    for _ in range(levels):
        Path("a").mkdir()
        os.chdir("a")
    os.chdir(here)
    yield root
    os.chdir(root)
    for _ in range(levels):
        os.chdir("a")
    for _ in range(levels):
        os.chdir("..")
        Path("a").rmdir()
    os.chdir(here)


def test_folders_that_are_too_deep(deep: Path) -> None:
    assert report.collect([deep]).rows == []
    with pytest.raises(DataError, match="no image"):
        images.find_images([deep])
    assert len(list(bounded.walk(deep, hidden=True))) == bounded.DEEPEST_FOLDER + 1


def test_folders_in_circles(tmp_path: Path) -> None:
    run = make_run(tmp_path, "resnet18-baseline", 0.44)
    (tmp_path / "again").symlink_to(tmp_path)
    (run.path / "again").symlink_to(run.path)
    assert len(report.collect([tmp_path]).rows) == 1


@pytest.mark.parametrize("name", [*runs.FILES, runs.LOCK])
def test_a_run_that_goes_on_writes_into_its_own_folder_alone(tmp_path: Path, name: str) -> None:
    """Somebody's run may have a link where `--resume` will write."""
    run = make_run(tmp_path / "runs", "quickstart", 0.44)
    treasure = tmp_path / "treasure"
    treasure.write_text("mine")
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(treasure)
    with pytest.raises(DataError, match="is a link"), run.exclusively():
        pass
    assert run.in_use == (name == runs.LOCK)
    assert treasure.read_text() == "mine"


# --------------------------------------------------------------------------------------------- predictions


HEAD = b"index,true,predicted,confidence,correct\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (HEAD + b"0,a,a,0.5,1," + b"x" * 20_000_000, "larger than"),
        (HEAD + b"0,a,a,0.5,1," + b"x" * 10_000_000, "broken near line 2"),
        (b",".join(b"%d" % number for number in range(1_000_000)) + b"\n" + HEAD, "columns are not"),
        (HEAD + b"\n" * 1_000_000, "broken near line 2"),
        (HEAD + b'"' + b"\n" * 1_000_000, "broken near line 2"),
        (HEAD + b"9" * 5000 + b",a,a,0.5,1\n", "broken near line 2"),
        (HEAD + b"0,a,a,0.5,1,more\n", "broken near line 2"),
    ],
)
def test_predictions_that_are_too_much(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "file.csv").write_bytes(content)
    with pytest.raises(DataError, match=words) as refused:
        analysis.read_predictions(tmp_path / "file.csv", ["a"])
    assert len(one_line(refused.value)) < 300 + len(str(tmp_path))


# ----------------------------------------------------------------------------------------------- pickles


def test_a_pickle_that_overflows_the_stack_when_it_is_hashed() -> None:
    """A tuple within a million tuples, as a key: Python's own `hash` goes down to its end."""
    with pytest.raises(PickleError, match="a key that is not text"):
        read_pickle(b"\x80\x02}" + b")" + b"\x85" * 500_000 + b"K\x01s.")


def test_a_pickle_that_asks_for_a_name_of_tuples() -> None:
    """Each tuple holds the one before it twice: written out, 30 of them have a thousand million parts."""
    doubling = b"".join(b"h%ch%c\x86\x94" % (number, number) for number in range(30))
    with pytest.raises(PickleError, match="by a name that is no text"):
        read_pickle(b"\x80\x04)\x94" + doubling + b"\x8c\x01x\x93.")


@pytest.mark.parametrize(
    "makes_much_of_little",
    [
        b"cbuiltins\nbytearray\n\x8a\x05" + (15 * 10**9).to_bytes(5, "little") + b"\x85R",
        b"c__builtin__\nbytearray\n\x8a\x05" + (15 * 10**9).to_bytes(5, "little") + b"\x85R",
        b"c_codecs\nencode\nX" + (60_000).to_bytes(4, "little") + b"x" * 60_000 + b"X\x08\0\0\0punycode\x86R",
    ],
)
def test_weights_that_make_much_of_little(tmp_path: Path, makes_much_of_little: bytes) -> None:
    """PyTorch's reader would allocate gigabytes, or encode for hours."""
    torch.save({"weight": torch.zeros(1)}, tmp_path / "sound.pth")
    with zipfile.ZipFile(tmp_path / "sound.pth") as sound, zipfile.ZipFile(tmp_path / "w.pth", "w") as spoilt:
        for part in sound.infolist():
            pickled = b"\x80\x02}X\x01\0\0\0a" + makes_much_of_little + b"s."
            spoilt.writestr(part.filename, pickled if part.filename.endswith(".pkl") else sound.read(part))
    with pytest.raises(DataError, match=r"it makes bytes \((builtins|__builtin__|_codecs)\."):
        weights.read_weights(tmp_path / "w.pth")


def test_a_pickle_whose_keys_all_collide() -> None:
    """Numbers that have one hash take the square of their number to be told apart."""
    with pytest.raises(PickleError, match="a key that is not text"):
        read_pickle(pickle.dumps({number * (2**61 - 1): 0 for number in range(1000)}))


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntc_codecs\nencode\n(Vb\nVlatin1\ntRtR"
UINT8 = b"cnumpy\ndtype\n(Vu1\nI0\nI1\ntR(I3\nV|\nNNNI-1\nI-1\nI0\ntb"


def test_a_pickle_that_copies_one_content_ten_thousand_times() -> None:
    """100 KB become 1 GB when each array has its own."""
    content = b"]B" + (100_000).to_bytes(4, "little") + bytes(100_000) + b"q\x00a"
    array = ARRAY + b"(I1\n(I100000\nt" + UINT8 + b"I00\nh\x00tba"
    first, once = read_pickle(b"\x80\x03" + content + array + b".")
    assert (len(first), once.shape) == (100_000, (100_000,))
    with pytest.raises(PickleError, match="over and over"):
        read_pickle(b"\x80\x03" + content + array * 10_000 + b".")


def test_a_pickle_of_shapes_that_take_long_to_multiply() -> None:
    number = b"\x8b" + (10_000_000).to_bytes(4, "little") + b"\x01" * 10_000_000 + b"q\x00"
    with pytest.raises(PickleError, match="the shape of no array"):
        read_pickle(ARRAY + b"(I1\n(" + number + b"h\x00h\x00h\x00t" + UINT8 + b"I00\nVx\ntb.")


def test_a_pickle_of_too_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickle, "MOST_OPCODES", 1000)
    with pytest.raises(PickleError, match="more than 1,000 parts"):
        read_pickle(b"(" * 1001)


@pytest.mark.parametrize("kind", ODD)
def test_a_data_set_with_something_else_than_files(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / FOLDER
    folder.mkdir()
    for name in ("train", "test", "meta", ".cifar100.json"):
        ODD[kind](folder / name)
    assert find_installed(ARCHIVE, tmp_path) is None
    with pytest.raises(DataError):
        datasets.load("cifar100", tmp_path)


def test_a_manifest_that_is_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    for name in ("train", "test", "meta"):
        (tmp_path / FOLDER / name).touch()
    (tmp_path / FOLDER / ".cifar100.json").write_text("[" * 100_000)
    assert find_installed(ARCHIVE, tmp_path) is None


# ----------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize(
    "text",
    [
        *("seed: !!timestamp x", "seed: !!bool x", "seed: !!int ''", "seed: !!float x", "!!timestamp x: 1"),
        *("seed: !!timestamp 2001-99-99", "seed: !!binary é", "seed: !!set {a}", "seed: !!value x", "!!merge x: 5"),
        f"a: !{'t' * 50_000} x",
        f"? {'k' * 900}\n: 1\n? {'k' * 900}\n: 2",
        f"{'k' * 900}: 1",
        "\x07: 1",
        "a: \x1b[31m",
    ],
)
def test_presets_with_tags_and_long_words(tmp_path: Path, text: str) -> None:
    """PyYAML's readers of `!!timestamp x` and `!!bool x` have errors of their own, which were tracebacks."""
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UsageError) as refused:
        load_preset(str(tmp_path / "mine.yaml"))
    assert len(one_line(refused.value)) < 400 + len(str(tmp_path))


# ------------------------------------------------------------------------------- models and weights of others


def save(path: Path, about: str | None, **tensors: torch.Tensor) -> None:
    save_file(tensors or {"a": torch.zeros(1)}, path, {KEY: about} if about is not None else None)


def described(**changes: Any) -> str:
    return json.dumps({**make_card().model_dump(mode="json"), **changes})


@pytest.mark.parametrize(
    "about",
    [
        *("[]", "1", '"x"', "null", "{}", "[" * 900 + "]" * 900, "[" * 99_999, '{"format": 1e999}'),
        "{" + " " * 2_000_000 + "}",
        described(config={"train": {"epochs": json.loads("[" * 15 + "]" * 15)}}),
        described(classes=[""] * 1001),
        described(superclasses=["x"] * 100_000, superclass_of=[99_999, 0, 0]),
        described(image_size=10**400),
        described(std=[1e-400, 1, 1]),
        described(config=[1]),
    ],
)
def test_descriptions_that_mean_harm(tmp_path: Path, about: str) -> None:
    path = tmp_path / "model.safetensors"
    save(path, about)
    from cifar100cli import checkpoint

    for reader in (checkpoint.load_model, checkpoint.read_state):
        with pytest.raises(DataError) as refused:
            reader(path)
        assert len(one_line(refused.value)) < 600 + len(str(tmp_path))


@pytest.mark.parametrize("about", ["[]", "[" * 900 + "]" * 900, described(classes=["x"] * 100_000)])
def test_a_card_that_the_report_would_fall_over(tmp_path: Path, about: str) -> None:
    """A hundred thousand classes are a matrix of eighty gigabytes."""
    save(tmp_path / "model.safetensors", about)
    with pytest.raises(DataError):
        read_card(tmp_path / "model.safetensors")


@pytest.mark.parametrize("length", [card.LARGEST_HEADER + 1, 100_000_000, 2**63, 2**64 - 1])
def test_a_header_of_a_hundred_megabytes(tmp_path: Path, length: int) -> None:
    from cifar100cli import checkpoint

    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b'{"a":')
    with path.open("r+b") as file:
        file.truncate(200_000_000)
    for reader in (checkpoint.load_model, read_card, weights.read_weights):
        with pytest.raises(DataError, match="header claims"):
            reader(path)


KINDS = ("float8_e4m3fn", "float4_e2m1fn_x2", "complex64", "int32", "bool", "uint8")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_another_kind_of_number(tmp_path: Path, kind: str) -> None:
    """Whether numbers of four bits are finite, PyTorch does not say but raises. Whole ones may stand beside weights."""
    from cifar100cli import checkpoint
    from cifar100cli.models import create_model
    from cifar100cli.schema import Config
    from tests.test_checkpoint import make_model

    path = tmp_path / "model.safetensors"
    dtype = getattr(torch, kind, None)
    if dtype is None:
        pytest.skip("this PyTorch does not know it")
    state = {name: tensor.contiguous() for name, tensor in make_model().state_dict().items()}
    zeros = torch.zeros_like(state["bn1.bias"], dtype=torch.uint8)
    state["bn1.bias"] = zeros.view(dtype) if "float4" in kind else zeros.to(dtype)
    try:
        save_file(state, path, {KEY: described()})
    except (KeyError, ValueError):
        pytest.skip("this safetensors does not know it")
    with pytest.raises(DataError, match=r"another kind of number for bn1\.bias"):
        checkpoint.load_model(path)
    begun = Config.model_validate({"model": {"backbone": "test_resnet", "pretrained": True, "weights": str(path)}})
    whole = kind in ("int32", "bool", "uint8")
    words = rf"another kind of number for bn1\.bias \({kind}\)" if whole else r"bn1\.bias is no plain tensor"
    with pytest.raises(DataError, match=words):
        create_model(begun, classes=3)


def test_tensors_that_are_no_plain_ones(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        odd = {
            "sparse": torch.zeros(3, 3).to_sparse(),
            "rows": torch.eye(3).to_sparse_csr(),
            "nowhere": torch.zeros(3, device="meta"),
            "turned": torch.zeros(3, dtype=torch.complex64).conj(),
        }
    for name, tensor in odd.items():
        torch.save({name: tensor}, path)
        with pytest.raises(DataError, match=f"{name} is no plain tensor"):
            weights.read_weights(path)


def rewritten(path: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> None:
    """Parts of a PyTorch file, changed."""
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in parts.items():
            archive.writestr(name, change(name.rpartition("/")[2], content))


def test_a_zip_that_unpacks_to_more_than_itself(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(5000)}, path)
    rewritten(path, lambda name, content: bytes(50_000_000) if name == "0" else content, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match="claims to hold more than it has"):
        weights.read_weights(path)


def test_a_tensor_that_claims_a_huge_storage(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(5000)}, path)
    claim = b"M" + (5000).to_bytes(2, "little"), b"J" + (2**30).to_bytes(4, "little")
    rewritten(path, lambda _, content: content.replace(*claim))
    with pytest.raises(DataError, match="corrupt"):
        weights.read_weights(path)
    torch.save({"a": torch.zeros(5000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(*claim))
    with pytest.raises(DataError, match="corrupt"):
        weights.read_weights(path)


TUPLES = {
    "deep": b")" + b"\x85" * 1_000_000,
    "wide": b")q\x00" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(100)),
}


@pytest.mark.parametrize("kind", TUPLES)
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_whose_name_is_a_tuple_of_tuples(tmp_path: Path, kind: str, zipped: bool) -> None:
    """PyTorch's reader hashes it: the one overflowed the stack, the other would have taken for ever."""
    path = tmp_path / "weights.pth"
    hostile = b"\x80\x02}" + TUPLES[kind] + b"K\x01s."
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=zipped)
    if zipped:
        rewritten(path, lambda name, content: hostile if name == "data.pkl" else content)
    else:
        head = path.read_bytes().split(b".")[:2]
        path.write_bytes(b".".join(head) + b"." + hostile)
    with pytest.raises(DataError, match="a tuple of very many parts"):
        weights.read_weights(path)


LONG = b"x" * 1_000_000
NAMELESS = {
    "global": b"c" + LONG + b"\ny\n.",
    "no ASCII": b"c\xc3\xa4" + LONG + b"\ny\n.",
    "function": b"X" + len(LONG).to_bytes(4, "little") + LONG + b")R.",
    "class": b"X" + len(LONG).to_bytes(4, "little") + LONG + b"q\x000h\x00)\x81.",
}


@pytest.mark.parametrize("kind", NAMELESS)
def test_weights_that_ask_for_a_long_name(tmp_path: Path, kind: str) -> None:
    """Found by `tests.fuzz`, as its slowest input: PyTorch's message on a million letters takes it hours."""
    torch.save({"a": torch.zeros(3)}, tmp_path / "weights.pth")
    content = b"\x80\x02" + NAMELESS[kind]
    rewritten(tmp_path / "weights.pth", lambda name, old: content if name == "data.pkl" else old)
    with pytest.raises(DataError, match=r"without end|no function|ascii"):
        weights.read_weights(tmp_path / "weights.pth")


def test_weights_whose_name_is_a_nested_list(tmp_path: Path) -> None:
    """Found by `tests.fuzz`: it was shown, however deep."""
    torch.save({"a": torch.zeros(3)}, tmp_path / "weights.pth")
    nested = b"\x80\x02}X\x01\0\0\0a" + b"]" * 10_000 + b"a" * 9_999 + b"s."
    rewritten(tmp_path / "weights.pth", lambda name, content: nested if name == "data.pkl" else content)
    with pytest.raises(DataError, match=r"no weight: a$"):
        weights.read_weights(tmp_path / "weights.pth")


@pytest.mark.parametrize("kind", ODD)
def test_weights_that_are_no_file(tmp_path: Path, kind: str) -> None:
    ODD[kind](tmp_path / "weights")
    for reader in (weights.read_weights, read_card):
        with pytest.raises(DataError):
            reader(tmp_path / "weights")


# --------------------------------------------------------------------------------------------- pictures


def test_an_icon_that_says_sixteen_and_is_ten_thousand(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((10_001, 10_000), np.uint8)).save(tmp_path / "large.png")
    content = (tmp_path / "large.png").read_bytes()
    head = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(content), 22)
    (tmp_path / "lie.ico").write_bytes(head + content)
    with pytest.raises(DataError, match=r"at most 100 million are read|broken"):
        images.read_image(tmp_path / "lie.ico")
