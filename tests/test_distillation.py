"""Distillation: the formulas in float64, and a teacher that is looked up beside one that runs in every step."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from cifar100cli import (
    augment,
    checkpoint,
    evaluation,
    jobs,
    losses,
    memory,
    precomputed,
    resume,
    runs,
    synthetic,
    teachers,
    workflows,
)
from cifar100cli.config import Override, Preset, load_preset
from cifar100cli.datasets import Split
from cifar100cli.devices import Portions
from cifar100cli.errors import DataError, RunInterrupted, UsageError
from cifar100cli.loader import Batch, DeviceLoader, Preprocessing
from cifar100cli.schema import Distillation
from cifar100cli.tasks import ClassificationTask, DistillationTask, MarginTask
from tests.conftest import EVERYTHING, TINY, Cli, Listening, StopAfter, make_preset, only_run, where

Array = NDArray[np.float64]


def softmax(logits: Array) -> Array:
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(raised / raised.sum(1, keepdims=True))


def divergence(teacher: Array, student: Array) -> float:
    return float((teacher * (np.log(teacher) - np.log(student))).sum(1).mean())


def reference(student: Array, teacher: Array, labels: NDArray[np.int64], temperature: float, form: str) -> float:
    """The papers' formulas; decoupled with weights 1 and 8."""
    ours, theirs = softmax(student / temperature), softmax(teacher / temperature)
    if form == "plain":
        return temperature**2 * divergence(theirs, ours)
    rows = np.arange(len(labels))
    binary = [np.stack([p[rows, labels], 1 - p[rows, labels]], axis=1) for p in (theirs, ours)]
    rest = []
    for p in (theirs, ours):
        others = np.stack([np.delete(row, label) for row, label in zip(p, labels, strict=True)])
        rest.append(others / others.sum(1, keepdims=True))
    return temperature**2 * (divergence(*binary) + 8 * divergence(*rest))


def logits_and_labels(classes: int = 7) -> tuple[Array, Array, NDArray[np.int64]]:
    random = np.random.default_rng(0)
    return random.normal(0, 4, (12, classes)), random.normal(0, 4, (12, classes)), random.integers(0, classes, 12)


def compute(form: str, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    if form == "plain":
        return losses.distillation(student, teacher, temperature)
    return losses.decoupled_distillation(student, teacher, labels, temperature, target_weight=1.0, nontarget_weight=8.0)


@pytest.mark.parametrize("form", ["plain", "decoupled"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_values_and_gradients(form: str, temperature: float) -> None:
    student, teacher, labels = logits_and_labels()
    inputs = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    loss = compute(form, inputs, torch.tensor(teacher), torch.tensor(labels), temperature)
    assert loss.item() == pytest.approx(reference(student, teacher, labels, temperature, form), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, inputs)
    expected = np.zeros_like(student)
    for index in np.ndindex(*student.shape):
        step = np.zeros_like(student)
        step[index] = 1e-6
        up, down = (reference(student + s, teacher, labels, temperature, form) for s in (step, -step))
        expected[index] = (up - down) / 2e-6
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-3, atol=1e-5)


def test_plain_is_a_sum_of_the_decoupled_parts() -> None:
    """KL = TCKD + (1 - p) NCKD, as the paper derives."""
    student, teacher, labels = (torch.tensor(a[:1]) for a in logits_and_labels())
    parts = [
        losses.decoupled_distillation(student, teacher, labels, 1.0, target_weight=t, nontarget_weight=n).item()
        for t, n in ((1, 0), (0, 1))
    ]
    p = teacher.softmax(1)[0, labels[0]].item()
    assert losses.distillation(student, teacher, 1.0).item() == pytest.approx(parts[0] + (1 - p) * parts[1], rel=1e-5)


@pytest.mark.parametrize("form", ["plain", "decoupled"])
def test_finite_where_one_class_has_all_probability(form: str) -> None:
    student = torch.tensor([[500.0, 0, -500], [0, 0, 0]], requires_grad=True)
    teacher = torch.tensor([[-500.0, 500, 0], [500, -500, 0]])
    loss = compute(form, student, teacher, torch.tensor([0, 0]), 1.0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert compute(form, teacher, teacher, torch.tensor([0, 0]), 4.0).item() == pytest.approx(0, abs=1e-6)


def test_standardized_logits() -> None:
    student, _, _ = logits_and_labels(100)
    expected = (student - student.mean(1, keepdims=True)) / student.std(1, keepdims=True)
    np.testing.assert_allclose(losses.standardized(torch.tensor(student)).numpy(), expected, atol=1e-5)
    assert torch.isfinite(losses.standardized(torch.ones(2, 5))).all()


@pytest.mark.parametrize("form", ["plain", "decoupled"])
def test_short_floats_are_computed_with_in_float32(form: str) -> None:
    student, teacher, labels = (torch.tensor(array) for array in logits_and_labels())
    student, teacher = student.bfloat16(), teacher.bfloat16()
    found = compute(form, student, teacher, labels, 3.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, compute(form, student.float(), teacher.float(), labels, 3.0))
    assert torch.equal(losses.standardized(student), losses.standardized(student.float()))


def make_batch(labels: Tensor) -> Batch:
    inputs = torch.zeros(len(labels), 1)
    return Batch(inputs, labels, inputs, torch.arange(len(labels)), None)


class Says(nn.Module):
    """A network that gives the same logits for everything."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, _: Tensor) -> Tensor:
        return self.logits


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("standardize", [False, True])
def test_the_task_mixes_labels_and_teacher(alpha: float, standardize: bool) -> None:
    student, teacher, labels = (torch.tensor(a) for a in logits_and_labels())
    config = Distillation(alpha=alpha, temperature=4.0, standardize=standardize)
    task = DistillationTask(ClassificationTask(0.1), lambda _: teacher, config)
    output = task(Says(student), make_batch(labels))
    soft = [losses.standardized(x).double() if standardize else x for x in (student, teacher)]
    expected = (1 - alpha) * F.cross_entropy(student, labels, label_smoothing=0.1) + alpha * 16 * F.kl_div(
        (soft[0] / 4).log_softmax(1), (soft[1] / 4).softmax(1), reduction="batchmean"
    )
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(output.logits, student.float())


def test_no_margin_reaches_the_teachers_term() -> None:
    cosines = torch.rand(6, 5) * 2 - 1
    labels = torch.arange(6) % 5
    teacher = torch.randn(6, 5)

    def margin_loss(cosines: Tensor, labels: Tensor, *, scale: float) -> Tensor:
        return losses.arcface(cosines, labels, scale=scale, margin=0.35)

    task = DistillationTask(MarginTask(margin_loss, 8.0), lambda _: teacher, Distillation(alpha=0.7, temperature=4.0))
    output = task(Says(8 * cosines), make_batch(labels))
    expected = 0.3 * margin_loss(cosines, labels, scale=8.0) + 0.7 * losses.distillation(8 * cosines, teacher, 4.0)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)


# --------------------------------------------------------------------------------------- runs with a teacher


def test_a_student_may_know_what_its_teacher_had_learned(tmp_path: Path, teacher_run: Path) -> None:
    """The teacher learned all images; what the student holds out is not new to it for that, nor to its own students."""
    holding_out: dict[str, Any] = {"data": {"val_fraction": 0.1}, "train": {"epochs": 1}}
    alone = Path(workflows.train(make_preset(**holding_out), where(tmp_path / "alone"), Listening())["run_dir"])
    first = Path(workflows.train(student(teacher_run, **holding_out), where(tmp_path / "one"), Listening())["run_dir"])
    second = Path(workflows.train(student(first, **holding_out), where(tmp_path / "two"), Listening())["run_dir"])
    for run, unseen in ((alone, 0.1), (first, 0.0), (second, 0.0)):
        assert checkpoint.load_model(run).card.unseen == {"synthetic": unseen}
        found = evaluation.measure([run], where(tmp_path), Listening(), "val").result
        assert found["learned"] == (unseen == 0)


@pytest.mark.usefixtures("small_synthetic")
def test_what_the_test_images_chose_is_told_of_a_teacher_and_of_weights(tmp_path: Path) -> None:
    """Of the same data set alone, and not to a run that is marked itself."""
    job = jobs.prepare(make_preset(train={"select": "best_test"}), where(tmp_path), Listening())
    on_test, elsewhere = tmp_path / "on_test.safetensors", tmp_path / "elsewhere.safetensors"
    checkpoint.save_model(on_test, job.model.state_dict(), job.card)
    checkpoint.save_model(elsewhere, job.model.state_dict(), job.card.model_copy(update={"dataset": "cifar10"}))
    last = tmp_path / "last.safetensors"
    checkpoint.save_model(last, job.model.state_dict(), jobs.prepare(make_preset(), where(tmp_path), Listening()).card)
    for file, select, told in (
        (on_test, "last", True),
        (on_test, "best_test", False),
        (last, "last", False),
        (elsewhere, "last", False),
    ):
        train = {"select": select}
        for preset, words in (
            (student(file, train=train), "the teacher's epoch was chosen on the test images"),
            (
                make_preset(model={"pretrained": True, "weights": str(file)}, train=train),
                f"{file}: their epoch was chosen",
            ),
        ):
            watcher = Listening()
            jobs.prepare(preset, where(tmp_path), watcher, dry=True)
            assert any(line.startswith(words) for line in watcher.said) == told
    watcher = Listening()
    jobs.prepare(student(on_test, data={"val_fraction": 0.1}), where(tmp_path), watcher, dry=True)
    assert not any("the test figure is not" in line for line in watcher.said)


@pytest.fixture
def teacher_run(tmp_path: Path, small_synthetic: object) -> Path:
    """A teacher with its own image size, normalisation and head."""
    preset = make_preset(
        data={"image_size": 48, "normalize": "dataset"},
        model={"head": "cosine", "embedding_dim": 16},
        loss={"name": "arcface"},
        train={"epochs": 1},
    )
    return Path(workflows.train(preset, where(tmp_path / "teacher"), Listening())["run_dir"])


def student(teacher: Path, **sections: dict[str, Any]) -> Preset:
    return make_preset(distillation={"teacher": str(teacher)}, **sections)


@pytest.mark.parametrize(("rho", "looks"), [(0.0, 1), (0.05, 2)])
def test_what_the_teacher_adds_is_told_as_it_is(
    tmp_path: Path, teacher_run: Path, monkeypatch: pytest.MonkeyPatch, rho: float, looks: int
) -> None:
    """A step of SAM asks it twice: three seconds a batch are three or six in each of seven steps."""
    monkeypatch.setattr(teachers.OnlineTeacher, "seconds", lambda *_: 3.0)
    preset = student(
        teacher_run, augment={"policy": "crop_flip"}, optimizer={"name": "sgd", "sam_rho": rho}, train={"epochs": 1}
    )
    watcher = Listening()
    job = jobs.prepare(preset, where(tmp_path), watcher)
    assert any(f"it adds about {looks * 3 * 7:.1f} s an epoch" in line for line in watcher.said)
    assert isinstance(job.task, DistillationTask)
    assert isinstance(job.task.teacher, teachers.OnlineTeacher)
    asked: list[int] = []
    job.task.teacher.model.register_forward_hook(lambda *given: asked.append(len(given[1][0])))
    workflows._fit(job, runs.RunDir.create(tmp_path, job.preset, job.config, {}), Listening())
    assert sum(asked) == looks * job.loaders.train.count


def test_the_time_of_a_teacher_is_that_of_its_passes(tmp_path: Path, teacher_run: Path) -> None:
    job = jobs.prepare(student(teacher_run, augment={"policy": "crop_flip"}), where(tmp_path), Listening())
    assert isinstance(job.task, DistillationTask)
    teacher = job.task.teacher
    assert isinstance(teacher, teachers.OnlineTeacher)
    asked: list[object] = []
    teacher.model.register_forward_hook(lambda *given: asked.append(given))
    assert teacher.seconds(next(iter(job.loaders.train.epoch(1)))) > 0
    assert len(asked) == 2, "once to warm up, and once to be timed"


@pytest.mark.parametrize(
    "augment",
    [{"policy": "none"}, {"policy": "flip"}, {"policy": "flip", "flip": "alternating"}],
    ids=["none", "flip", "alternating"],
)
def test_the_cached_teacher_says_what_the_online_one_says(
    tmp_path: Path, teacher_run: Path, augment: dict[str, Any]
) -> None:
    watcher = Listening()
    preset = student(teacher_run, augment=augment)
    job = jobs.prepare(preset, where(tmp_path), watcher)
    online = jobs.prepare(preset, where(tmp_path), Listening(), dry=True)
    assert isinstance(job.task, DistillationTask)
    assert isinstance(online.task, DistillationTask)
    assert isinstance(job.task.teacher, teachers.CachedTeacher)
    assert isinstance(online.task.teacher, teachers.OnlineTeacher)
    assert sum(watcher.counted) == 400 * (2 if augment["policy"] == "flip" else 1)

    saved = checkpoint.load_model(teacher_run)
    model = saved.model.eval()
    for batch in job.loaders.train.epoch(2):
        assert batch.images is not None
        with torch.no_grad():
            alone = model(saved.preprocessing(batch.images))
        looked_up = job.task.teacher(batch)
        # Only the batches differ, and with them the order of float32 sums.
        torch.testing.assert_close(looked_up, online.task.teacher(batch), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(looked_up, alone, rtol=1e-4, atol=1e-4)
        assert not looked_up.requires_grad


def test_what_a_gpu_has_no_memory_for_is_computed_in_portions(
    tmp_path: Path, small_synthetic: synthetic.Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both versions of 400 images, of which 30 fit at once."""
    monkeypatch.setattr(precomputed, "Portions", lambda device, most: Portions(torch.device("cuda"), most))
    images, labels = small_synthetic.train
    loader = DeviceLoader(Split(images, labels), 64, torch.device("cpu"), Preprocessing(32), policy=augment.flip)
    asked: list[int] = []

    def left_column(some: Tensor) -> Tensor:
        asked.append(len(some))
        if len(some) > 30:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return some[:, 0, :, 0].float()

    watcher = Listening()
    table = precomputed.table(
        "left columns", left_column, loader, batch_size=100, dtype=torch.float32, folder=tmp_path / "x", watcher=watcher
    )
    red = images[:, 0]
    np.testing.assert_array_equal(table.numpy(), np.stack([red[:, :, 0], red[:, :, -1]]).astype(np.float32))
    assert asked == [1, 100, 50, *[25] * 32]
    assert watcher.counted == [25] * 32


def test_ranks_compute_a_table_together(
    tmp_path: Path, small_synthetic: synthetic.Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second part each; those of the other come from it, and on the disk they are found by whoever comes next."""
    monkeypatch.setattr(precomputed, "PART", 150)
    images, labels = small_synthetic.train
    loader = DeviceLoader(Split(images, labels), 64, torch.device("cpu"), Preprocessing(32), policy=augment.flip)
    red = images[:, 0].astype(np.float32)
    expected = torch.from_numpy(np.stack([red[:, :, 0], red[:, :, -1]]))
    parts = [part for version in expected for part in version.split(150)]
    room = 2 * expected.nbytes / precomputed.SHARE  # both tables are in the memory of one machine

    def table(watcher: Listening) -> Tensor:
        return precomputed.table(
            "left columns",
            lambda some: some[:, 0, :, 0].float(),
            loader,
            batch_size=100,
            dtype=torch.float32,
            folder=tmp_path / "x",
            watcher=watcher,
        )

    for rank, free, computed, place in ((0, room, 400, 1), (1, room - 1, 400, 2), (0, room, 0, 1)):
        order, places = iter(enumerate(parts)), list[int]()

        def hand_out(part: Tensor, owner: int, rank: int = rank, order: Any = order) -> None:
            number, own = next(order)
            assert owner == number % 2
            if owner == rank:
                assert torch.equal(part, own)
            part.copy_(own)

        def greatest(value: int, places: list[int] = places) -> int:
            places.append(value)
            return value

        several: dict[str, Any] = {"rank": lambda rank=rank: rank, "count": lambda: 2, "local_count": lambda: 2}
        watcher = Listening()
        with monkeypatch.context() as patch:
            patch.setattr(precomputed, "ranks", SimpleNamespace(**several, hand_out=hand_out, greatest=greatest))
            patch.setattr(memory, "available", lambda free=free: free)
            assert torch.equal(table(watcher), expected)
        assert (sum(watcher.counted), places[0], next(order, None)) == (computed, place, None)
    watcher = Listening()
    assert torch.equal(table(watcher), expected)
    assert watcher.said == [f"left columns: kept in {tmp_path / 'x'}, nothing to compute"]


def test_training_with_either_teacher_is_the_same(
    tmp_path: Path, teacher_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = student(teacher_run, augment={"policy": "flip"})
    workflows.train(preset, where(tmp_path / "cached"), Listening())
    monkeypatch.setattr(teachers, "Views", ())  # no policy counts as one of few versions
    workflows.train(preset, where(tmp_path / "online"), Listening())
    curves = [[row["train_loss"] for row in only_run(tmp_path / kind).metrics()] for kind in ("cached", "online")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_logits_are_kept_by_teacher_data_and_version(
    tmp_path: Path, teacher_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precomputed, "PART", 150)

    def count(preset: Preset) -> int:
        watcher = Listening()
        jobs.prepare(preset, where(tmp_path), watcher)
        assert bool(watcher.counted) != any("nothing to compute" in text for text in watcher.said)
        return sum(watcher.counted)

    assert count(student(teacher_run)) == 400
    assert count(student(teacher_run, train={"epochs": 9}, loss={"label_smoothing": 0.1})) == 0
    assert count(student(teacher_run, augment={"policy": "flip"})) == 400  # the mirror images alone
    assert count(student(teacher_run, data={"image_size": 64, "normalize": "imagenet"})) == 0  # the student's own
    assert count(student(teacher_run, data={"fraction": 0.5})) == 200

    (folder,) = {path.parent for path in (tmp_path / "cache").rglob("mirrored-*")}
    parts = sorted(path.name for path in folder.glob("unchanged-*"))
    assert parts == [f"unchanged-{start:06}.safetensors" for start in (0, 150, 300)]
    (folder / parts[0]).write_bytes(b"broken")
    (folder / parts[2]).unlink()
    damaged = bytearray((folder / parts[1]).read_bytes())
    damaged[-1] ^= 1  # a sign or so
    (folder / parts[1]).write_bytes(damaged)
    assert count(student(teacher_run)) == 400

    saved = checkpoint.load_model(teacher_run)
    with torch.no_grad():
        next(saved.model.parameters()).mul_(1.01)
    checkpoint.save_model(teacher_run / runs.MODEL, saved.model.state_dict(), saved.card)
    assert count(student(teacher_run)) == 400


@pytest.mark.parametrize(("after", "kept"), [(1, 0), (3, 2)])
def test_a_stop_tells_of_the_parts_that_are_kept(
    tmp_path: Path, teacher_run: Path, monkeypatch: pytest.MonkeyPatch, after: int, kept: int
) -> None:
    """Of four, in the `after`-th of which it comes; batches of evaluation have all of a part's 100 images."""
    monkeypatch.setattr(precomputed, "PART", 100)

    class Stops(Listening):
        @contextlib.contextmanager
        def progress(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
            def advance(count: int) -> None:
                self.counted.append(count)
                if sum(self.counted) == 100 * after:
                    raise KeyboardInterrupt

            yield advance

    stopped, again = Stops(), Listening()
    with pytest.raises(KeyboardInterrupt):
        jobs.prepare(student(teacher_run), where(tmp_path), stopped)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == kept
    (folder,) = (tmp_path / "cache").glob("*") if kept else [None]
    told = f"the teacher's logits: the parts that are kept in {folder} will not be computed again"
    assert stopped.said == ([told] if kept else [])
    jobs.prepare(student(teacher_run), where(tmp_path), again)
    assert sum(again.counted) == 400 - 100 * kept


@pytest.mark.parametrize("held_out", [0.0, 0.25])
def test_a_teacher_that_knows_the_held_out_images_is_told(tmp_path: Path, teacher_run: Path, held_out: float) -> None:
    teacher = runs.RunDir(teacher_run).config().data.val_fraction
    watcher = Listening()
    chosen: dict[str, Any] = {"train": {"select": "best_val"}, "data": {"val_fraction": held_out}} if held_out else {}
    jobs.prepare(student(teacher_run, **chosen), where(tmp_path), watcher)
    told = f"the teacher was trained with data.val_fraction = {teacher:g}, and so on images that are held out"
    assert any(told in text for text in watcher.said) == (held_out > 0)


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path, teacher_run: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    watcher = Listening()
    workflows.train(student(teacher_run, train={"epochs": 1}), where(tmp_path), watcher)
    assert sum("cannot be written to" in text for text in watcher.said) == 1


def test_what_a_killed_process_left_in_the_cache_goes(tmp_path: Path, teacher_run: Path) -> None:
    """But not what another process may be writing right now."""
    workflows.train(student(teacher_run, train={"epochs": 1}), where(tmp_path), Listening())
    (part,) = (tmp_path / "cache").glob("*/*.safetensors")
    old, new = part.parent / f".{part.name}.abc.tmp", part.parent / f".{part.name}.def.tmp"
    for path, hours in ((old, 2), (new, 0)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - hours * 3600,) * 2)
    part.unlink()
    workflows.train(student(teacher_run, train={"epochs": 1}), where(tmp_path), Listening())
    assert (part.exists(), old.exists(), new.exists()) == (True, False, True)


@pytest.mark.parametrize(
    ("augment", "words"),
    [
        ({"policy": "crop_flip"}, "under augment.policy = crop_flip:"),
        ({"policy": "flip", "cutmix": 1.0}, "under augment.cutmix = 1.0:"),
        ({"auto": "randaugment", "cutout": 8}, "under augment.auto = randaugment and augment.cutout = 8:"),
    ],
)
def test_unbounded_views_run_the_teacher_in_every_step_and_say_so(
    tmp_path: Path, teacher_run: Path, augment: dict[str, Any], words: str
) -> None:
    watcher = Listening()
    job = jobs.prepare(student(teacher_run, augment=augment), where(tmp_path), watcher)
    assert isinstance(job.task, DistillationTask)
    assert isinstance(job.task.teacher, teachers.OnlineTeacher)
    (line,) = watcher.said
    assert "runs in every step" in line
    assert words in line
    assert "s an epoch here" in line
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "augment", [{"policy": "flip"}, {"policy": "crop_flip"}, EVERYTHING], ids=["flip", "crop_flip", "everything"]
)
def test_stopped_and_resumed_ends_with_the_same_bits(
    tmp_path: Path, teacher_run: Path, augment: dict[str, Any]
) -> None:
    preset = student(teacher_run, augment=augment)
    workflows.train(preset, where(tmp_path / "unbroken"), Listening())
    with pytest.raises(RunInterrupted):
        workflows.train(preset, where(tmp_path / "broken"), StopAfter(9))
    workflows.resume(only_run(tmp_path / "broken"), where(tmp_path / "broken"), Listening())
    models = [only_run(tmp_path / kind).path / runs.MODEL for kind in ("unbroken", "broken")]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_a_run_goes_on_with_the_teacher_that_it_began_with(
    run_cli: Cli, tmp_path: Path, teacher_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that says where from here is remembered whole, and other weights there or elsewhere are refused."""
    monkeypatch.chdir(teacher_run.parent)
    file = tmp_path / "student.yaml"
    file.write_text(make_preset(distillation={}).config.to_yaml())
    config = load_preset(str(file), [Override("distillation.teacher", teacher_run.name, "--set")]).config
    assert config.distillation is not None
    assert config.distillation.teacher == str(teacher_run)
    with pytest.raises(RunInterrupted):
        workflows.train(Preset("student", config), where(tmp_path / "broken"), StopAfter(9))
    monkeypatch.chdir(tmp_path)
    run, model = only_run(tmp_path / "broken"), teacher_run / runs.MODEL
    before, saved = model.read_bytes(), checkpoint.load_model(teacher_run)
    weights = {name: tensor * 1.5 for name, tensor in saved.model.state_dict().items() if tensor.is_floating_point()}
    checkpoint.save_model(model, {**saved.model.state_dict(), **weights}, saved.card)
    with pytest.raises(DataError, match=r"is not the teacher that .* was begun with"):
        workflows.resume(run, where(tmp_path / "broken"), Listening())
    model.write_bytes(before)
    moved = teacher_run.rename(tmp_path / "moved")
    try:
        gone = run_cli("distill", "--resume", run.path)
        assert (gone.code, "--teacher says where it is now" in gone.err) == (3, True)
        other = run_cli("distill", "--resume", run.path, "--teacher", run.path)
        assert (other.code, "is not the teacher that" in other.err) == (3, True)
        by_hand = shutil.copytree(run.path, tmp_path / "copy")
        assert resume(by_hand, teacher=moved)["complete"]
        (by_hand / runs.RESULT).unlink()
        assert resume(by_hand)["complete"], "where it is now is remembered"
        (by_hand / runs.RESULT).unlink()
        assert run_cli("distill", "--resume", by_hand, "--seed", str(config.seed)).code == 0
        with pytest.raises(UsageError, match=r"has none, or does not know it by its weights"):
            resume(moved, teacher=moved)
        outcome = run_cli("distill", "--resume", run.path, "--teacher", moved, "--json")
        assert (outcome.code, json.loads(outcome.out)["complete"]) == (0, True), outcome.err
        again = run_cli("distill", "--resume", run.path, "--teacher", moved, "--json")
        assert (again.code, json.loads(again.out)) == (0, json.loads(outcome.out)), again.err
    finally:
        moved.rename(teacher_run)


def test_a_teacher_whose_run_is_not_complete_is_told(tmp_path: Path, teacher_run: Path) -> None:
    (teacher_run / runs.RESULT).unlink()
    watcher = Listening()
    jobs.prepare(student(teacher_run), where(tmp_path), watcher)
    assert any("the teacher's run is not complete: its weights are those of epoch 1" in line for line in watcher.said)


def test_a_teacher_that_answers_nothing(tmp_path: Path, teacher_run: Path) -> None:
    """Finite weights, and answers that are not: no learning rate is to blame."""
    saved = checkpoint.load_model(teacher_run)
    weights = {name: torch.full_like(t, 1e38) for name, t in saved.model.state_dict().items() if t.ndim == 4}
    checkpoint.save_model(tmp_path / "spoilt.safetensors", {**saved.model.state_dict(), **weights}, saved.card)
    with pytest.raises(DataError, match=r"spoilt\.safetensors: its outputs are NaN or infinite"):
        jobs.prepare(student(tmp_path / "spoilt.safetensors"), where(tmp_path), Listening(), dry=True)


def test_without_a_teachers_weight_it_is_plain_training(tmp_path: Path, teacher_run: Path) -> None:
    preset = make_preset(distillation={"teacher": str(teacher_run), "alpha": 0.0})
    workflows.train(preset, where(tmp_path / "distilled"), Listening())
    workflows.train(make_preset(), where(tmp_path / "plain"), Listening())
    found = [load_file(only_run(tmp_path / kind).path / runs.MODEL) for kind in ("distilled", "plain")]
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path, teacher_run: Path) -> None:
    saved = checkpoint.load_model(teacher_run)
    other = saved.card.model_copy(update={"classes": tuple(map(str, range(100)))})
    checkpoint.save_model(tmp_path / "other.safetensors", saved.model.state_dict(), other)
    with pytest.raises(DataError, match=r"--teacher .*knows other classes"):
        jobs.prepare(student(tmp_path / "other.safetensors"), where(tmp_path), Listening())
    with pytest.raises(UsageError, match="--teacher RUN"):
        jobs.prepare(make_preset(distillation={}), where(tmp_path), Listening())


def test_on_the_command_line(run_cli: Cli, tmp_path: Path, small_synthetic: object) -> None:
    tiny = [*TINY, "--preset", "resnet18-arcface-kd", "--no-pretrained", "--epochs", "1"]
    missing = run_cli("distill", *tiny)
    assert (missing.code, len(missing.err.splitlines())) == (2, 1)
    assert "cifar100 distill --teacher" in missing.err
    missing = run_cli("distill", *tiny, "--teacher", "nowhere")
    assert (missing.code, len(missing.err.splitlines())) == (3, 1)
    assert "no such run or checkpoint" in missing.err

    teacher = json.loads(run_cli("train", *TINY, "--epochs", "1", "--json").out)
    tried = run_cli("distill", *tiny, "--teacher", teacher["run_dir"], "--dry-run")
    assert tried.code == 0, tried.err
    assert not (tmp_path / "cache").exists()
    outcome = run_cli(
        "distill", *tiny, "--teacher", teacher["run_dir"], "--alpha", "0.5", "--temperature", "2", "--json"
    )
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["preset"] == "resnet18-arcface-kd"
    config = runs.RunDir.open(Path(result["run_dir"])).config()
    assert config.distillation == Distillation(
        teacher=str((tmp_path / teacher["run_dir"]).absolute()), alpha=0.5, temperature=2.0
    )
    assert list((tmp_path / "cache" / "cifar100" / "computed").rglob("*.safetensors"))
    resumed = run_cli("distill", "--resume", result["run_dir"], "--json")
    assert json.loads(resumed.out) == result
