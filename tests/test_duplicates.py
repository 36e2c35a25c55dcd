"""Near-duplicates against OpenCV's correlations of every pair, and the figures of `evaluate` by hand."""

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

import cifar100cli
from cifar100cli import checkpoint, datasets, duplicates, synthetic
from cifar100cli.card import read_card
from cifar100cli.catalog import DatasetName
from cifar100cli.errors import UsageError
from tests.conftest import Cli
from tests.test_evaluate import train

CPU = torch.device("cpu")
Pixels = NDArray[np.uint8]


def correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def from_afar(image: Pixels) -> NDArray[np.float64]:
    small = cv2.resize(image.transpose(1, 2, 0).astype(np.float64), (8, 8), interpolation=cv2.INTER_AREA)
    return np.asarray(small)


def detail(image: Pixels) -> NDArray[np.float64]:
    grey = image.astype(np.float64).mean(0)
    found = grey - cv2.blur(grey, (5, 5), borderType=cv2.BORDER_REPLICATE)
    found = found - found.mean()
    return np.asarray(found / np.sqrt((found**2).sum()))


def fit(image: Pixels, other: Pixels) -> float:
    """The highest correlation of detail, by OpenCV's search for a template in a picture with a margin."""
    picture = np.pad(detail(other), 4).astype(np.float32)
    return float(cv2.matchTemplate(picture, detail(image).astype(np.float32), cv2.TM_CCORR).max())


def by_hand(images: Pixels, others: Pixels) -> dict[int, tuple[int, bool, float]]:
    """Each image's closest twin, if it has one: of every pair and its mirror image, one after the other."""
    found = {}
    for number, image in enumerate(images):
        alike = [
            (fit(view, other), place, mirrored)
            for place, other in enumerate(others)
            for mirrored, view in ((False, image), (True, np.ascontiguousarray(image[..., ::-1])))
            if correlation(from_afar(view), from_afar(other)) >= 0.7
        ]
        likeness, place, mirrored = max(alike, default=(0.0, 0, False))
        if likeness >= 0.7:
            found[number] = (place, mirrored, likeness)
    return found


def moved(image: Pixels, down: int, right: int) -> Pixels:
    matrix = np.array([[1, 0, right], [0, 1, down]], np.float32)
    placed = cv2.warpAffine(image.transpose(1, 2, 0), matrix, (32, 32), borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(placed.transpose(2, 0, 1), np.uint8)


@pytest.fixture
def planted(few_drawings: synthetic.Drawn) -> tuple[Pixels, Pixels]:
    """Images of which five are nearly one of the others, and one is too far from its."""
    images, others = few_drawings.test[0][:40].copy(), few_drawings.train[0][:120]
    noise = np.random.default_rng(0).normal(0, 8, others[0].shape)
    images[3] = moved(others[10], 2, -3)
    images[7] = others[0]
    images[12] = others[119][..., ::-1]
    images[20] = np.clip(others[40] * 0.7 + 40 + noise, 0, 255).astype(np.uint8)
    images[31] = moved(np.ascontiguousarray(others[77][..., ::-1]), -1, 4)
    images[35] = moved(others[90], 7, 0)
    return images, others


def test_pairs_are_those_of_every_comparison(planted: tuple[Pixels, Pixels], monkeypatch: pytest.MonkeyPatch) -> None:
    images, others = planted
    expected = by_hand(images, others)
    assert {number: twin for number, (twin, _, _) in expected.items()} == {3: 10, 7: 0, 12: 119, 20: 40, 31: 77}
    looked_at: list[int] = []
    for block in (7, 500):
        monkeypatch.setattr(duplicates, "BLOCK", block)
        looked_at.clear()
        found = duplicates.find(images, others, CPU, looked_at.append)
        assert sum(looked_at) == len(images)
        order = sorted(expected, key=lambda number: -expected[number][2])
        assert found.images.tolist() == order
        assert found.twins.tolist() == [expected[number][0] for number in order]
        assert found.mirrored.tolist() == [expected[number][1] for number in order]
        np.testing.assert_allclose(found.likeness, [expected[number][2] for number in order], atol=1e-5)
        assert (np.diff(found.likeness) <= 0).all()
        assert found.likeness[0] == pytest.approx(1)


def test_images_without_detail_have_no_twin(few_drawings: synthetic.Drawn) -> None:
    """One colour everywhere, and a slope: without anything in it, all would be like all."""
    slope = np.broadcast_to(np.arange(0, 256, 8, dtype=np.uint8), (1, 3, 32, 32))
    plain = np.concatenate([np.zeros((2, 3, 32, 32), np.uint8), np.full((2, 3, 32, 32), 255, np.uint8)])
    images = np.concatenate([plain, few_drawings.test[0][:10]])
    others = np.concatenate([plain, slope])
    found = duplicates.find(images, others, CPU)
    assert len(found.images) == len(found.twins) == len(found.likeness) == len(found.mirrored) == 0


def test_pairs_as_a_picture() -> None:
    """Test image left, training image right, twice as large; a frame around those of two classes."""
    pairs = np.random.default_rng(0).integers(0, 256, (13, 2, 3, 32, 32), np.uint8)
    drawn = duplicates.picture(pairs, [False] * 12 + [True])
    assert drawn.shape == (2 * 68 + 4, 12 * 132 + 4, 3)
    left, right = drawn[4:68:2, 136:200:2], drawn[5:68:2, 201:264:2]
    np.testing.assert_array_equal(left, pairs[1, 0].transpose(1, 2, 0))
    np.testing.assert_array_equal(right, pairs[1, 1].transpose(1, 2, 0))
    np.testing.assert_array_equal(drawn[72:136:2, 4:68:2], pairs[12, 0].transpose(1, 2, 0))
    red = (drawn == duplicates.OTHER_CLASS).all(2)
    for frame in (red[68:72, :136], red[68:140, :4], red[136:140, :136], red[68:140, 132:136]):
        assert frame.all()
    assert not red[:68].any()
    assert not red[:, 136:].any()


# ----------------------------------------------------------------------------------------------- the command


@pytest.fixture
def known(few_drawings: synthetic.Drawn, monkeypatch: pytest.MonkeyPatch) -> synthetic.Drawn:
    """Drawn images, of which 20 of the test set are a training image, the last five of these of another class."""
    (train_images, train_labels), (test_images, test_labels) = few_drawings.train, few_drawings.test
    test_images, test_labels = test_images.copy(), test_labels.copy()
    test_images[40:60], test_labels[40:60] = train_images[100:120], train_labels[100:120]
    test_labels[55:60] = (test_labels[55:60] + 1) % 100
    drawn = synthetic.Drawn(
        few_drawings.train,
        (test_images, test_labels),
        few_drawings.classes,
        few_drawings.superclasses,
        few_drawings.superclass_of,
    )
    monkeypatch.setattr(synthetic, "draw", lambda: drawn)
    return drawn


def evaluated(run_cli: Cli, *arguments: str) -> tuple[dict[str, Any], list[bool]]:
    outcome = run_cli(
        "evaluate",
        *arguments,
        "--near-duplicates",
        "pairs.png",
        "--predictions",
        "all.csv",
        "--device",
        "cpu",
        "--json",
    )
    assert outcome.code == 0, outcome.err
    with Path("all.csv").open(encoding="utf-8", newline="") as file:
        right = [row["correct"] == "1" for row in csv.DictReader(file)]
    found: dict[str, Any] = json.loads(outcome.out)["near_duplicates"]
    return found, right


@pytest.mark.usefixtures("known")
def test_the_command(run_cli: Cli) -> None:
    run = train(run_cli, "--set", "data.val_fraction=0", "--set", "train.select=last")
    found, right = evaluated(run_cli, run)
    pairs = found.pop("pairs")
    assert found == {
        "count": 20,
        "other_class": 5,
        "top1": pytest.approx(np.mean(right[40:60])),
        "top1_without": pytest.approx(np.mean(right[:40] + right[60:])),
        "training_images": 400,
    }
    assert {pair["index"]: pair["training_index"] for pair in pairs} == dict(
        zip(range(40, 60), range(100, 120), strict=True)
    )
    assert all(pair["likeness"] > 0.999 and not pair["mirrored"] for pair in pairs)
    assert {pair["index"] for pair in pairs if not pair["same_class"]} == set(range(55, 60))
    with Image.open("pairs.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (12 * 132 + 4, 2 * 68 + 4))

    told = run_cli("evaluate", run, "--near-duplicates", "pairs.png", "--device", "cpu")
    assert told.code == 0
    assert "nearly one of the 400 that were trained on" in told.out
    assert "the pairs are in pairs.png, the closest first" in told.err
    assert cifar100cli.evaluate(run, near_duplicates="again.png", device="cpu")["near_duplicates"]["pairs"] == pairs
    assert Path("again.png").read_bytes() == Path("pairs.png").read_bytes()


def test_only_images_that_the_run_trained_on_count(run_cli: Cli, known: synthetic.Drawn) -> None:
    """Not those that it held out or was not given; of an ensemble, those of any member."""
    runs = [
        train(run_cli, "--set", f"data.val_fraction={share}", "--set", f"data.fraction={fraction}")
        for share, fraction in ((0.25, 1.0), (0.5, 0.5))
    ]
    whole = datasets.load("synthetic", Path()).train
    twins = known.train[0][100:120]

    def seen(share: float, fraction: float = 1.0) -> int:
        kept = datasets.subset(datasets.hold_out(whole, share)[0], fraction, seed=0).images
        return sum(bool((kept == twin).all((1, 2, 3)).any()) for twin in twins)

    found = [evaluated(run_cli, run)[0] for run in runs]
    assert [one["count"] for one in found] == [seen(0.25), seen(0.5, 0.5)]
    assert 0 < found[1]["count"] < found[0]["count"] < 20
    (train_images, _), (test_images, _) = known.train, known.test
    for one in found:  # by their places among all images, whatever a run was not given
        assert all(
            np.array_equal(test_images[pair["index"]], train_images[pair["training_index"]]) for pair in one["pairs"]
        )
    assert run_cli("evaluate", runs[0], "--split", "val", "--predictions", "val.csv").code == 0
    with Path("val.csv").open(encoding="utf-8", newline="") as file:
        indices = [int(row["index"]) for row in csv.DictReader(file)]
    held_out = datasets.hold_out(whole, 0.25)[1]
    assert held_out is not None
    assert np.array_equal(whole.images[indices], held_out.images)
    together, _ = evaluated(run_cli, *runs)
    assert (together["count"], together["training_images"]) == (seen(0.25), 300)


@pytest.mark.usefixtures("known")
def test_what_was_learned_before_counts(run_cli: Cli, tmp_path: Path) -> None:
    """By the weights that a run began from, or by a teacher, where the run itself was given a part of the images."""
    run = Path(train(run_cli, "--set", "data.val_fraction=0.5", "--set", "data.fraction=0.5"))
    card = read_card(run / "model.safetensors")
    weights = load_file(run / "model.safetensors")
    (tmp_path / "foreign.safetensors").write_bytes(b"another's")

    def looked_at(unseen: dict[DatasetName, float], **sections: dict[str, object]) -> object:
        """Among how many images twins are looked for, of a model that says that of itself."""
        config = {name: {**card.config.get(name, {}), **keys} for name, keys in sections.items()}
        about = card.model_copy(update={"unseen": unseen, "config": {**card.config, **config}})
        checkpoint.save_model(tmp_path / "model.safetensors", weights, about)
        return evaluated(run_cli, str(tmp_path / "model.safetensors"))[0]["training_images"]

    def begun(name: str) -> dict[str, object]:
        return {"weights": str(tmp_path / name), "pretrained": True}

    for name, unseen in (("ours", {"synthetic": 0.5}), ("elsewhere", {"cifar10": 0.0})):
        about = card.model_copy(update={"unseen": unseen})
        checkpoint.save_model(tmp_path / f"{name}.safetensors", weights, about)
    assert looked_at({"synthetic": 0.5}) == 100, "a half of the half that was not held out"
    assert looked_at({"synthetic": 0.25}, model=begun("ours.safetensors")) == 300, "as large a share as was never seen"
    assert looked_at({"synthetic": 0.5}, model=begun("ours.safetensors")) == 200, "of what fraction, they do not say"
    assert looked_at({"synthetic": 0.5}, model=begun("gone.safetensors")) == 200
    for never in ("elsewhere.safetensors", "foreign.safetensors"):
        assert looked_at({"synthetic": 0.5}, model=begun(never)) == 100
    assert looked_at({"synthetic": 0.0}, distillation={"teacher": "a run"}) == 400
    assert looked_at({"synthetic": 0.5}, distillation={"teacher": "a run"}) == 200
    assert looked_at({"synthetic": 0.0}, distillation={"teacher": "a run"}) == 400
    found = evaluated(run_cli, str(tmp_path / "model.safetensors"), "--split", "val")[0]
    assert found["training_images"] == 200, "no image is its own twin"
    assert all(pair["index"] != pair["training_index"] for pair in found["pairs"])


@pytest.mark.usefixtures("small_synthetic")
def test_none_are_told_as_none(run_cli: Cli) -> None:
    run = train(run_cli)
    told = run_cli("evaluate", run, "--near-duplicates", "pairs.png", "--device", "cpu", "--json")
    assert told.code == 0
    found = json.loads(told.out)
    assert found["near_duplicates"]["count"] == 0
    assert found["near_duplicates"]["top1"] is None
    assert found["near_duplicates"]["top1_without"] == pytest.approx(found["top1"])
    assert "no image is nearly one that was trained on: pairs.png is not written" in told.err
    assert not Path("pairs.png").exists()


@pytest.mark.usefixtures("small_synthetic")
def test_what_cannot_be_asked(run_cli: Cli) -> None:
    run = train(run_cli)
    Path("folder.png").mkdir()
    for arguments, said in (
        (("pairs.jpg",), "a PNG file; give it a name that ends in .png"),
        (("pairs.png", "--split", "train"), "not with the train split"),
        (("folder.png",), "is a folder"),
        (("nowhere/pairs.png",), "its folder does not exist"),
        (("pairs.png", "--predictions", str(Path("folder.png/../pairs.png"))), "the predictions go there"),
    ):
        outcome = run_cli("evaluate", run, "--near-duplicates", *arguments)
        assert outcome.code == 2
        assert said in outcome.err
        assert outcome.out == ""
    with pytest.raises(UsageError, match="near_duplicates: looks for images that are nearly training images"):
        cifar100cli.evaluate(run, split="train", near_duplicates="pairs.png")
