"""The main job on real images: serve the archives, download, compare with torchvision, train, evaluate, report.

Runs where `CIFAR100_TEST_ARCHIVES` names a folder with the two archives.
"""

import csv
import functools
import hashlib
import http.server
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from cifar100cli import datasets, download, duplicates
from tests.conftest import Cli
from tests.test_datasets import assert_equals_torchvision
from tests.test_page import BROWSER, Page, check_examples, check_form, look_at

ARCHIVES = os.environ.get("CIFAR100_TEST_ARCHIVES")
pytestmark = pytest.mark.skipif(not ARCHIVES, reason="CIFAR100_TEST_ARCHIVES is not set")


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    handler = functools.partial(_Handler, directory=str(ARCHIVES))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both data sets, for each worker: tests may run in any order, and apart."""
    folder = tmp_path_factory.mktemp("real")
    for archive in download.ARCHIVES.values():
        path = Path(str(ARCHIVES)) / archive.filename
        download.install(
            archive,
            folder,
            source=path,
            sha256=None,
            check=lambda _: None,
            progress=lambda *_: None,
            log=lambda _: None,
        )
    return folder


@pytest.mark.parametrize(("name", "archive"), [("cifar100", "cifar-100-python"), ("cifar10", "cifar-10-python")])
def test_download_and_read(
    run_cli: Cli, server: str, tmp_path: Path, name: str, archive: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    path = Path(str(ARCHIVES)) / f"{archive}.tar.gz"
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    arguments = ["--dataset", name, "--data-dir", str(tmp_path), "--url", f"{server}/{path.name}", "--sha256", sha256]
    outcome = run_cli("download", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert (found["fetched_bytes"], found["already_there"], found["sha256"]) == (path.stat().st_size, False, sha256)
    again = json.loads(run_cli("download", *arguments, "--json").out)
    assert (again["fetched_bytes"], again["already_there"]) == (0, True)
    assert_equals_torchvision(name, datasets.load(name, tmp_path), tmp_path)


@pytest.mark.parametrize("name", ["cifar100", "cifar10"])
def test_near_duplicates(data_dir: Path, name: str) -> None:
    """As many as published (arXiv 1902.00423: 10% and 3.3%), or fewer; classes, which are not looked at, are alike."""
    found = datasets.load(name, data_dir)
    twins = duplicates.find(found.test.images[:1000], found.train.images, torch.device("cpu"))
    assert 20 < len(twins.images) < 100
    same = found.test.labels[twins.images] == found.train.labels[twins.twins]
    assert same.mean() > 0.85


def test_train_evaluate_report(run_cli: Cli, data_dir: Path) -> None:
    """Two epochs on a twentieth of the images: far from good, and far above chance."""
    common = ["--data-dir", str(data_dir), "--device", "cpu", "--json"]
    settings = ["--preset", "resnet18-baseline", "--epochs", "2", "--set", "data.fraction=0.05", "--batch-size", "25"]
    settings += ["--set", "train.select=last"]  # the test images are looked at once
    trained = run_cli("train", *settings, *common)
    assert trained.code == 0, trained.err
    result = json.loads(trained.out)
    assert (result["dataset"], result["parameters"]) == ("cifar100", 11_227_812)
    assert result["test"]["top1"] > 0.03
    assert result["test"]["superclass_top1"] > result["test"]["top1"]
    measured = json.loads(run_cli("evaluate", result["run_dir"], *common).out)
    assert measured["count"] == 10_000
    assert {key: measured[key] for key in result["test"]} == result["test"]
    (row,) = json.loads(run_cli("report", "--json").out)["rows"]
    check_pictures(run_cli, Path(result["run_dir"]), data_dir)
    assert row["delta"] == pytest.approx(result["test"]["top1"] - 0.4426)
    assert row["changes"] == {"data.batch_size": 25, "data.fraction": 0.05, "train.epochs": 2, "train.select": "last"}


def check_pictures(run_cli: Cli, run: Path, data_dir: Path) -> None:
    """Test images saved as PNG are told to be what the run said of them."""
    test = datasets.load("cifar100", data_dir).test
    for index in range(0, 10_000, 250):
        Image.fromarray(test.images[index].transpose(1, 2, 0)).save(f"{index:05}.png")
    outcome = run_cli("predict", run, *sorted(Path().glob("*.png")), "--top", "1", "--json")
    assert outcome.code == 0, outcome.err
    with (run / "predictions.csv").open(newline="") as file:
        expected = list(csv.DictReader(file))[::250]
    found = json.loads(outcome.out)["images"]
    assert len(found) == 40
    assert [one["top"][0]["class"] for one in found] == [one["predicted"] for one in expected]
    probabilities = [one["top"][0]["probability"] for one in found]
    assert probabilities == pytest.approx([float(one["confidence"]) for one in expected], abs=0.02)  # bfloat16


PRESETS = {
    "resnet18-baseline": (),
    "resnet18-augment": (),
    "resnet18-wd01": (),
    "resnet18-lbsmooth": (),
    "resnet18-arcface": ("--no-pretrained",),
    "resnet18-cosface": ("--no-pretrained",),
    "resnet18-baseline-fixed": (),
    "resnet18-arcface-fixed": ("--no-pretrained",),
}


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_report_of_eight_presets_in_a_browser(run_cli: Cli, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small network and few images, to be quick; everything else is the presets' own."""
    whole = datasets.load("cifar100", data_dir)
    test = datasets.Split(whole.test.images[:1000], whole.test.labels[:1000])
    monkeypatch.setattr(datasets, "READERS", {"cifar100": lambda _: replace(whole, test=test)})
    small = ["--backbone", "test_resnet", "--epochs", "2", "--set", "data.fraction=0.02", "--device", "cpu"]
    for preset, more in PRESETS.items():
        outcome = run_cli("train", "--preset", preset, *small, *more, "--data-dir", data_dir, "-q")
        assert outcome.code == 0, outcome.err
    outcome = run_cli("report", "--out", "report.html")
    assert outcome.code == 0, outcome.err
    found = Page(Path("report.html").read_text(encoding="utf-8"))
    check_form(found)
    assert len(found.all("article")) == len(PRESETS)
    check_examples(found, test.images, least=200)
    for width in (375, 1280):
        rows = look_at(Path("report.html"), width)
        assert sorted(rows) == sorted(PRESETS)
