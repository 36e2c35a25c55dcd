"""The report: groups, means, differences, protocols, and folders that are not what they should be."""

import csv
import errno
import io
import json
import os
import re
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from cifar100cli import console, page, report, report_text, runs
from cifar100cli.bounded import printable
from cifar100cli.config import Override, load_preset
from cifar100cli.runs import ENVIRONMENT, RunDir
from cifar100cli.schema import Expected, Published
from tests.conftest import Cli


def make_run(root: Path, preset: str, top1: float, seed: int = 0, **settings: Any) -> RunDir:
    overrides = [Override(key.replace("__", "."), value, "test") for key, value in settings.items()]
    loaded = load_preset(preset, [Override("seed", seed, "test"), *overrides])
    preset, config = loaded.name, loaded.config
    run = RunDir.create(root, preset, config, {})
    run.append_metrics({"epoch": 1, "train_loss": 1.0, "train_top1": 0.1, "seconds": 1, "images_per_second": 1})
    run.write_result(
        {
            "preset": preset,
            "dataset": config.data.dataset,
            "seed": seed,
            "epochs": config.train.epochs,
            "test": {"top1": top1, "top5": 0.7, "loss": 2.0, "ece": 0.1},
            "best": {"epoch": 7, "top1": top1},
            "select": config.train.select,
            "run_dir": str(run.path),
            "device": "cpu",
            "precision": "fp32",
            "seconds": 60.0,
            "images_per_second": 900.0,
        }
    )
    return run


def recorded(run: RunDir, **environment: str) -> None:
    (run.path / ENVIRONMENT).write_text(json.dumps({**run.environment(), **environment}))


def test_seeds_are_averaged(tmp_path: Path) -> None:
    figures = [0.44, 0.45, 0.43]
    for seed, top1 in enumerate(figures):
        make_run(tmp_path, "resnet18-baseline", top1, seed)
    (row,) = report.collect([tmp_path]).rows
    assert row.n == 3
    assert row.top1_mean == pytest.approx(statistics.fmean(figures))
    assert row.top1_std == pytest.approx(statistics.stdev(figures))
    assert row.delta == pytest.approx(row.top1_mean - 0.4426)
    assert (row.published_top1, row.published_epoch, row.select) == (0.4426, 186, "best_test")
    assert len(row.runs) == 3
    assert row.changes == {}


def test_folders_that_may_not_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, "resnet18-baseline", 0.44)
    scandir = os.scandir

    def shut(path: str) -> object:
        if str(path) == str(run.path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", shut)
    found = report.collect([tmp_path])
    assert (found.rows, found.unusable) == ([], [report.Unusable(str(run.path), "cannot be read: Permission denied")])


def test_runs_of_one_seed_are_no_further_evidence(tmp_path: Path) -> None:
    """Copies of a run, say."""
    for seed, top1 in ((0, 0.44), (0, 0.44), (0, 0.44), (1, 0.40), (1, 0.42)):
        make_run(tmp_path, "resnet18-baseline", top1, seed)
    found = report.collect([tmp_path])
    (row,) = found.rows
    assert (row.n, len(row.runs)) == (2, 5)
    assert sorted(row.seeds) == [0, 0, 0, 1, 1]
    assert row.top1_mean == pytest.approx(statistics.fmean([0.44, 0.41]))
    assert row.top1_std == pytest.approx(statistics.stdev([0.44, 0.41]))
    assert "n counts seeds" in report_text.render(found, "table")
    assert report_text.render(found, "csv").count("\n") == 2


@pytest.mark.parametrize(("runs", "words"), [(0, "(a goal: not run yet)"), (3, "(3 runs)")])
def test_what_a_preset_is_meant_to_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: int, words: str
) -> None:
    """That of the preset as it is now: a run may be older, and have another one in its configuration."""
    config = load_preset("wrn28-10-sam").config
    own = config.model_copy(update={"expected": Expected(top1=0.80, runs=runs)})
    now = config.model_copy(update={"expected": Expected(top1=0.86, runs=runs)})
    monkeypatch.setattr(report, "shipped", lambda name: now)
    run = make_run(tmp_path, "wrn28-10-sam", 0.85)
    (run.path / "config.yaml").write_text(own.to_yaml(), encoding="utf-8")
    other = make_run(tmp_path, "wrn28-10-sam", 0.5, train__epochs=3)
    found = report.collect([tmp_path])
    row = next(row for row in found.rows if row.runs == [str(run.path)])
    assert (row.published_top1, row.delta, row.changes) == (None, None, {})
    assert (row.expected_top1, row.expected_runs) == (0.86, runs)
    text = report_text.render(found, "table")
    assert text.count(f"expected 86.00% {words}") == 1, "and not beside settings that are not the preset's"
    assert page.render(found).count(f"expected 86.00% {words}") == 1
    with_more = dict.fromkeys(("expected_top1", "expected_runs"), "")
    (first, second) = csv.DictReader(io.StringIO(report_text.render(found, "csv")))
    assert with_more.keys() <= first.keys() == second.keys()
    assert other.complete


def test_other_settings_are_other_rows(tmp_path: Path) -> None:
    make_run(tmp_path, "resnet18-baseline", 0.44)
    make_run(tmp_path, "resnet18-baseline", 0.30, train__epochs=10)
    make_run(tmp_path, "resnet18-wd01", 0.40)
    rows = report.collect([tmp_path]).rows
    assert [(row.preset, row.changes, row.n) for row in rows] == [
        ("resnet18-baseline", {}, 1),
        ("resnet18-baseline", {"train.epochs": 10}, 1),
        ("resnet18-wd01", {}, 1),
    ]
    assert rows[0].top1_std is None


def test_what_does_nothing_makes_no_other_row(tmp_path: Path) -> None:
    """Nor other settings than the preset's: momentum under AdamW, and padding where there are no crops."""
    make_run(tmp_path, "resnet18-baseline", 0.43)
    make_run(tmp_path, "resnet18-baseline", 0.45, 1, optimizer__momentum=0.5)
    for seed, padding in enumerate((4, 2)):
        own_run(tmp_path, f"augment: {{policy: flip, crop_padding: {padding}}}", 0.3, seed)
        own_run(tmp_path, f"augment: {{policy: crop_flip, crop_padding: {padding}}}", 0.5, seed)
    rows = {tuple(row.changes.items()): row for row in report.collect([tmp_path]).rows}
    assert {changes: row.n for changes, row in rows.items()} == {
        (): 2,
        (("augment.policy", "flip"),): 2,
        (("augment.policy", "crop_flip"), ("augment.crop_padding", 4)): 1,
        (("augment.policy", "crop_flip"), ("augment.crop_padding", 2)): 1,
    }
    assert (rows[()].departs, rows[()].within_noise) == (False, True)


def own_run(tmp_path: Path, text: str, top1: float, seed: int = 0, name: str = "mine") -> RunDir:
    file = tmp_path / f"{name}.yaml"
    file.write_text(text, encoding="utf-8")
    run = make_run(tmp_path / "runs", str(file), top1, seed)
    (run.path / runs.CONFIG).write_text(f"seed: {seed}\n" + text.replace("seed: 0\n", ""))  # as older versions wrote it
    return run


def test_rows_of_ones_own_preset_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the settings in which they differ, as there is no preset of ours to compare with."""
    for lr, top1, seed in ((0.01, 0.3, 0), (0.001, 0.2, 0), (0.001, 0.25, 1)):
        own_run(tmp_path, f"optimizer: {{lr: {lr}}}", top1, seed)
    found = report.collect([tmp_path / "runs"])
    assert sorted((row.n, row.changes["optimizer.lr"]) for row in found.rows) == [(1, 0.01), (2, 0.001)]
    assert all(row.changes.keys() == {"optimizer.lr"} for row in found.rows)
    rows = csv.DictReader(io.StringIO(report_text.render(found, "csv")))
    assert sorted(row["changes"] for row in rows) == ["optimizer.lr=0.001", "optimizer.lr=0.01"]
    report_text.show_table(found)
    assert "[a] optimizer.lr=0.01" in capsys.readouterr().out


def test_a_figure_stays_with_the_settings_that_it_is_of(tmp_path: Path) -> None:
    """A copy of a preset of ours keeps its published figure for as long as it is one."""
    baseline = load_preset("resnet18-baseline").config.to_yaml()
    changed = baseline.replace("lr: 0.001", "lr: 0.002")
    assert changed != baseline
    mine = "published: {top1: 0.5, source: my paper}\n"
    for name, text in (("copy", baseline), ("changed", changed), ("paper", mine)):
        own_run(tmp_path, text, 0.44, name=name)
    figures = {row.preset: row.published_top1 for row in report.collect([tmp_path / "runs"]).rows}
    assert figures == {"copy": 0.4426, "changed": None, "paper": 0.5}
    other = load_preset(str(tmp_path / "paper.yaml"), [Override("optimizer.lr", 0.5, "--lr")]).config
    assert other.published is None
    seeded = load_preset(str(tmp_path / "paper.yaml"), [Override("seed", 3, "--seed")]).config
    assert seeded.published is not None


def test_a_figure_of_ones_own_stays_beside_one_that_goes(tmp_path: Path) -> None:
    """In a copy of a preset of ours with another rate, what is ours goes, and what is the user's stays."""
    for preset, ours, own in (
        ("laptop", "expected", Published(top1=0.5, source="my paper")),
        ("resnet18-baseline", "published", Expected(top1=0.6, runs=2, source="my runs")),
    ):
        config = load_preset(preset).config
        theirs = "published" if ours == "expected" else "expected"
        optimizer = config.optimizer.model_copy(update={"lr": 0.123})
        file = tmp_path / f"my-{preset}.yaml"
        file.write_text(config.model_copy(update={theirs: own, "optimizer": optimizer}).to_yaml(), encoding="utf-8")
        found = load_preset(str(file)).config
        assert (getattr(found, ours), getattr(found, theirs)) == (None, own)
        own_run(tmp_path, file.read_text(encoding="utf-8"), 0.5, name=file.stem)
    rows = {row.preset: (row.published_top1, row.expected_top1) for row in report.collect([tmp_path / "runs"]).rows}
    assert rows == {"my-laptop": (0.5, None), "my-resnet18-baseline": (None, 0.6)}


def test_a_teacher_is_for_the_user_to_name(tmp_path: Path) -> None:
    """It is told where it tells two rows apart, and takes no published figure away."""
    first = "resnet18-arcface-kd"
    make_run(tmp_path, first, 0.5, distillation__teacher="/runs/a")
    (row,) = report.collect([tmp_path]).rows
    assert (row.changes, row.published_top1) == ({}, 0.5737)
    make_run(tmp_path, first, 0.6, distillation__teacher="/runs/b")
    rows = report.collect([tmp_path]).rows
    assert [row.changes for row in rows] == [{"distillation.teacher": name} for name in ("/runs/a", "/runs/b")]
    file = tmp_path / "mine.yaml"
    file.write_text(load_preset(first).config.to_yaml())
    taught = load_preset(str(file), [Override("distillation.teacher", "/runs/a", "--teacher")]).config
    assert taught.published is not None
    cooler = load_preset(str(file), [Override("distillation.temperature", 2, "--temperature")]).config
    assert cooler.published is None


def test_a_figure_is_judged_whatever_stands_beside_its_row(tmp_path: Path, run_cli: Cli) -> None:
    """Other rows of one's own preset, which have no figure, and those of other teachers, which all have it."""
    file = tmp_path / "mine.yaml"
    figures = "published: {top1: 0.44, source: ours}\nexpected: {top1: 0.45, runs: 3, source: ours}\n"
    file.write_text(f"loss: {{label_smoothing: 0.1}}\ntrain: {{epochs: 3}}\nfinetune: {{unfreeze: fc}}\n{figures}")
    for seed, top1 in enumerate((0.43, 0.45)):
        make_run(tmp_path / "runs", str(file), top1, seed)
        make_run(tmp_path / "runs", str(file), top1, seed, loss__label_smoothing=0, train__epochs=2)
        for teacher in ("/a", "/b"):
            make_run(tmp_path / "kd", "resnet18-arcface-kd", 0.56 + 0.02 * seed, seed, distillation__teacher=teacher)
    found = report.collect([tmp_path / "runs"])
    verdicts = {row.changes["train.epochs"]: (row.departs, row.delta, row.within_noise) for row in found.rows}
    assert verdicts == {3: (False, pytest.approx(0.0), True), 2: (False, None, None)}
    assert {row.epochs: report.published_cell(row) for row in found.rows} == {3: 0.44, 2: None}
    expected = "expected 45.00% (3 runs)"
    assert report_text.render(found, "table").count(f"mine: {expected}.") == 1
    shown = page.render(found)
    assert [shown.count(words) for words in (expected, "within noise (", "other settings")] == [1, 1, 0]
    taught = report.collect([tmp_path / "kd"])
    assert [(row.changes, row.departs, row.within_noise) for row in taught.rows] == [
        ({"distillation.teacher": teacher}, False, True) for teacher in ("/a", "/b")
    ]
    checked = run_cli("report", "runs", "kd", "--check", "5")
    assert (checked.code, "not with the settings" in checked.err) == (0, False)
    make_run(tmp_path / "kd", "resnet18-arcface-kd", 0.57, distillation__teacher="/a", optimizer__lr=0.002)
    assert "published for: resnet18-arcface-kd (optimizer.lr=0.002" in run_cli("report", "kd", "--check", "5").err


def test_a_teacher_is_its_weights(tmp_path: Path) -> None:
    """Not where they lie: others may lie there later, and the same ones elsewhere."""
    kd = "resnet18-arcface-kd"
    places = [("/t", "a" * 64), ("/moved", "a" * 64), ("/t", "b" * 64)]
    for seed, (place, digest) in enumerate(places):
        for preset, top1 in ((kd, 0.5 + 0.1 * seed), (f"{kd}-fixed", 0.7)):
            run = make_run(tmp_path, preset, top1, seed, distillation__teacher=place)
            recorded(run, teacher_sha256=digest)
    found = report.collect([tmp_path])
    rows = [row for row in found.rows if row.preset == kd]
    assert {(row.teacher, tuple(row.seeds)) for row in rows} == {("/t", (0, 1)), ("/t (weights bbbbbbbb)", (2,))}
    assert [row.changes for row in rows] == [{"distillation.teacher": row.teacher} for row in rows]
    assert [pair.gain for pair in found.pairs] == pytest.approx([0.15, 0.0]), "of one teacher each"


def test_runs_on_other_images_are_other_rows(tmp_path: Path) -> None:
    """A data set of the right shape may lie in another folder. Older runs do not say which theirs was."""
    for seed, digest in enumerate(("", "a" * 64, "a" * 64, "b" * 64)):
        run = make_run(tmp_path, "resnet18-baseline", 0.40 + 0.01 * seed, seed)
        if digest:
            recorded(run, data_sha256=digest)
        if seed == 2:
            (row,) = report.collect([tmp_path]).rows
            assert (row.changes, row.seeds) == ({}, [0, 1, 2])
    rows = report.collect([tmp_path]).rows
    assert {(str(row.changes["data"]), tuple(row.seeds)) for row in rows} == {
        ("images aaaaaaaa", (0, 1, 2)),
        ("images bbbbbbbb", (3,)),
    }
    assert "(data=images bbbbbbbb)" in report_text.render(report.collect([tmp_path]), "markdown")


def test_without_distillation_a_preset_that_distils_is_not_itself(tmp_path: Path) -> None:
    """Its settings are its own, but for the teacher, which is no longer one to be named."""
    kd = "resnet18-arcface-kd"
    make_run(tmp_path, kd, 0.5, distillation=None)
    (row,) = report.collect([tmp_path]).rows
    assert (row.changes, row.shipped) == ({"distillation.teacher": None}, {"distillation.teacher": "one to be named"})
    assert row.within_noise is None
    make_run(tmp_path, kd, 0.57, distillation__teacher="/runs/a")
    make_run(tmp_path, kd, 0.56, distillation__teacher="/runs/a", optimizer__lr=0.002)
    (found,) = report.collect([tmp_path]).ablations
    assert (found.top1_mean, found.changes) == (0.57, {"distillation.teacher": "/runs/a"}), "the distilled run"
    assert {(effect.block, effect.without) for effect in found.effects} == {
        ("distillation", True),
        ("optimizer.lr", False),
    }
    file = tmp_path / "mine.yaml"
    file.write_text(load_preset(kd, [Override("distillation", None, "--set")]).config.to_yaml())
    assert load_preset(str(file)).config.published is None


def test_a_figure_of_plain_training_is_not_that_of_a_distillation(tmp_path: Path) -> None:
    plain = load_preset("quickstart").config.model_dump(mode="json", exclude_none=True)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**plain, "published": {"top1": 0.6, "source": "our paper"}}))
    assert load_preset(str(file)).config.published is not None
    taught = load_preset(str(file), [Override("distillation.teacher", "/runs/a", "--teacher")]).config
    assert taught.published is None


def test_what_is_compared_saw_the_same_images(tmp_path: Path) -> None:
    """Ablations and repaired presets; older runs, which do not say what theirs were, go with the first that do."""
    for number, digest in enumerate(("a" * 64, "b" * 64, "")):
        for smoothing, top1 in ((0.0, 0.40), (0.1, 0.41 + 0.1 * number)):
            run = make_run(tmp_path, "resnet18-baseline", top1, number, loss__label_smoothing=smoothing)
            recorded(run, **({"data_sha256": digest} if digest else {}))
    found = report.collect([tmp_path]).ablations
    told = {(str(one.changes.get("data")), effect.n): effect.gain for one in found for effect in one.effects}
    assert told == {("images aaaaaaaa", 2): pytest.approx(0.11), ("images bbbbbbbb", 1): pytest.approx(0.11)}
    recorded(make_run(tmp_path, "resnet18-baseline-fixed", 0.45), data_sha256="b" * 64)
    (pair,) = report.collect([tmp_path]).pairs
    assert pair.top1 == pytest.approx(0.40)
    assert pair.gain == pytest.approx(0.05)


def test_a_file_of_weights_is_what_is_in_it(tmp_path: Path) -> None:
    places = [("/w", "a" * 64), ("/moved", "a" * 64), ("/w", "b" * 64), ("/w", "")]
    for seed, (place, digest) in enumerate(places):
        run = make_run(tmp_path, "resnet18-pretrained", 0.5, seed, model__weights=place)
        recorded(run, **({"weights_sha256": digest} if digest else {}))
    rows = report.collect([tmp_path]).rows
    assert {(row.changes["model.weights"], tuple(row.seeds)) for row in rows} == {
        ("/w", (0, 1, 3)),
        ("/w (weights bbbbbbbb)", (2,)),
    }


def test_a_run_that_does_not_tell_its_images_is_of_a_pair(tmp_path: Path) -> None:
    make_run(tmp_path, "resnet18-baseline", 0.40)
    recorded(make_run(tmp_path, "resnet18-baseline-fixed", 0.45), data_sha256="b" * 64)
    (pair,) = report.collect([tmp_path]).pairs
    assert pair.gain == pytest.approx(0.05)


def test_two_presets_of_ones_own_are_no_pair(tmp_path: Path) -> None:
    for name in ("mine", "mine-fixed", "resnet18-cifar-fixed"):
        (tmp_path / f"{name}.yaml").write_text(load_preset("quickstart").config.to_yaml())
        make_run(tmp_path / "runs", str(tmp_path / f"{name}.yaml"), 0.5)
    make_run(tmp_path / "runs", "resnet18-cifar", 0.8)
    assert report.collect([tmp_path / "runs"]).pairs == []


def test_pairs_are_of_one_teacher(tmp_path: Path) -> None:
    kd = "resnet18-arcface-kd"
    make_run(tmp_path, kd, 0.5, distillation__teacher="a")
    make_run(tmp_path, f"{kd}-fixed", 0.6, distillation__teacher="b")
    assert report.collect([tmp_path]).pairs == []
    make_run(tmp_path, kd, 0.55, distillation__teacher="b")
    (pair,) = report.collect([tmp_path]).pairs
    assert pair.gain == pytest.approx(0.05)


def test_a_run_that_ended_on_another_device(tmp_path: Path) -> None:
    recorded(make_run(tmp_path, "quickstart", 0.5), device="cuda:0", device_name="NVIDIA H200")
    recorded(make_run(tmp_path, "quickstart", 0.5, 1), device="cpu", device_name="A CPU")
    (row,) = report.collect([tmp_path]).rows
    assert row.hardware == ["NVIDIA H200, then cpu, fp32", "A CPU, fp32"]
    run = make_run(tmp_path, "quickstart", 0.5, 2)
    recorded(run, device="cuda:1", device_name="NVIDIA H200")
    for device, name in (("cuda:0", "NVIDIA H200"), ("cpu", "A CPU"), ("cuda:0", "NVIDIA H200"), ("cpu", "A CPU")):
        run.note_resumption({"device": device, "device_name": name})
    (row,) = report.collect([tmp_path]).rows
    assert row.hardware[-1] == "NVIDIA H200, then A CPU, fp32"


def test_what_is_best_on_test_is_told_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An ablation, a study of unfreezing and a curve; and no maximum on the test set where nothing was chosen by it."""
    for preset, select in (("resnet18-baseline", "best_test"), ("resnet18-baseline-fixed", "best_val")):
        for grad_clip in (5.0, 0.0):
            make_run(tmp_path, preset, 0.44, optimizer__grad_clip=grad_clip, train__select=select)
    make_run(tmp_path, "finetune-layer4", 0.9, train__select="best_test", train__watch_test=False)
    run = make_run(tmp_path, "finetune-fc", 0.87)
    for row in (run, make_run(tmp_path, "resnet18-augment", 0.4)):
        row.forget_after(0)
        for epoch, top1 in enumerate((0.2, 0.9, 0.8), start=1):
            line = {"epoch": epoch, "train_loss": 1, "train_top1": 0.5, "seconds": 1, "images_per_second": 1}
            row.append_metrics({**line, "test_loss": 1.0, "test_top1": top1})
    found = report.collect([tmp_path])
    report_text.show_table(found)
    shown, markdown = capsys.readouterr().out, report_text.render(found, "markdown")
    for text in (shown, markdown):
        assert re.search(r"What each block brings: resnet18-baseline\b.* \(best on test\)", text)
        assert re.search(r"What each block brings: resnet18-baseline-fixed\b.* \(held-out\)", text)
        assert re.search(r"layer4 .*90.00%, best on test", text)
    assert re.search(r"resnet18-augment +test +20.00 .* 80.00 +90.00 @2", shown)
    assert re.search(r"finetune-fc +test +20.00 .* 80.00 +- *$", shown, re.MULTILINE)


def test_a_run_that_has_two_names_is_one(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "resnet18-baseline", 0.44)
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    (row,) = report.collect([tmp_path / "link", tmp_path / "runs"]).rows
    assert len(row.runs) == 1


def test_a_run_on_another_disk(tmp_path: Path) -> None:
    """Where there is more room, with a link in its place: of the run, or of all of a preset."""
    run = make_run(tmp_path / "large", "resnet18-baseline", 0.44)
    other = make_run(tmp_path / "large", "resnet18-wd01", 0.40)
    (tmp_path / "runs" / "resnet18-baseline").mkdir(parents=True)
    (tmp_path / "runs" / "resnet18-baseline" / run.path.name).symlink_to(run.path)
    (tmp_path / "runs" / "resnet18-wd01").symlink_to(other.path.parent)
    assert [len(row.runs) for row in report.collect([tmp_path / "runs"]).rows] == [1, 1]


def test_a_repaired_preset_stands_beside_its_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "resnet18-arcface", 0.57)
    make_run(tmp_path, "resnet18-arcface-224", 0.79)
    make_run(tmp_path, "resnet18-arcface-fixed", 0.61)
    make_run(tmp_path, "resnet18-arcface-fixed", 0.63, seed=1)
    make_run(tmp_path, "resnet18-arcface-224-fixed", 0.5, train__epochs=3)  # not run as its pair was
    found = report.collect([tmp_path])
    assert [row.preset for row in found.rows] == [
        *("resnet18-arcface", "resnet18-arcface-fixed", "resnet18-arcface-224", "resnet18-arcface-224-fixed")
    ]
    (pair,) = json.loads(report_text.render(found, "json"))["pairs"]
    assert pair["preset"] == "resnet18-arcface"
    assert (pair["top1"], pair["fixed_top1"], pair["gain"]) == pytest.approx((0.57, 0.62, 0.05))
    assert (pair["select"], pair["fixed_select"]) == ("best_test", "best_val")
    report_text.show_table(found)
    for text in (capsys.readouterr().out, report_text.render(found, "markdown")):
        assert re.search(r"resnet18-arcface +(\| )?57.00%, best on test +(\| )?62.00%, held-out +(\| )?\+5.00", text)


def test_the_study_of_unfreezing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "finetune-layer3-50", 0.93)
    make_run(tmp_path, "finetune-layer4", 0.90, finetune__unfreeze="layer2")
    for seed, top1 in enumerate((0.80, 0.82)):
        make_run(tmp_path, "finetune-layer4", top1, seed, data__fraction=0.1)
    make_run(tmp_path, "resnet18-baseline", 0.44)
    make_run(tmp_path, "laptop-pretrained", 0.8)
    mine = tmp_path / "finetune-mine.yaml"
    mine.write_text(load_preset("finetune-all").config.model_copy(update={"published": None}).to_yaml())
    make_run(tmp_path, str(mine), 0.7)
    found = report.collect([tmp_path])
    report_text.show_table(found)
    for text in (capsys.readouterr().out, report_text.render(found, "markdown")):
        assert [line for line in text.splitlines() if line.startswith("How far to unfreeze")] == [
            "How far to unfreeze, on CIFAR-10",
            "How far to unfreeze, on CIFAR-100",
        ]
        parts = text.split("How far to unfreeze, on CIFAR-100")
        assert "layer3 (laptop-pretrained)" in parts[1].split("unfrozen")[1]
        text = parts[0]
        assert "all (finetune-mine)" in text
        table = [re.split(r" *\| *|  +", line.strip(" |")) for line in text[text.index("unfrozen") :].splitlines()]
        cells = {row[0].split()[0]: row[1:5] for row in table if row[0].startswith("layer")}
        assert cells == {
            "layer4": ["10", "10%", "91.33%", "81.00% ±1.41"],
            "layer3": ["50", "100%", "93.35%", "93.00%"],
            "layer2": ["10", "100%", "-", "90.00%"],
        }
        order = [row[0].split()[0] for row in table if row[0].startswith(("layer", "all"))]
        assert order == ["layer4", "layer3", "all", "layer2"]  # the least first, and what the study does not know last


def test_the_studys_test_loss_is_of_the_weights_that_its_accuracy_is_of(tmp_path: Path) -> None:
    """Not of the last epoch beside a selected one, and there where the test set was not watched."""
    for seed, loss in enumerate((0.31, 0.35)):
        run = make_run(tmp_path, "finetune-layer4", 0.9, seed, train__select="best_test")
        run.forget_after(0)
        for epoch, (train, test) in enumerate(((0.9, loss), (0.6, 0.77)), start=1):
            line = {"epoch": epoch, "train_loss": train, "train_top1": 0.5, "seconds": 1, "images_per_second": 1}
            run.append_metrics({**line, "test_loss": test, "test_top1": 0.9})
        result = run.result()
        run.write_result({**result, "test": {**result["test"], "loss": loss}})
    make_run(tmp_path, "finetune-fc", 0.8, train__watch_test=False)
    found = report.collect([tmp_path])
    shown = page.render(found)
    for name, losses in (("layer4", ("0.6000", "0.3300")), ("fc", ("1.0000", "2.0000"))):
        for text in (report_text.render(found, "table"), report_text.render(found, "markdown")):
            (line,) = re.findall(rf"^(?:\| )?{name} .*$", text[text.index("How far to unfreeze") :], re.MULTILINE)
            assert tuple(re.findall(r"\d\.\d{4}", line)) == losses
        for figure, head in zip(losses, ("Last training loss", "Test loss"), strict=True):
            assert f'data-label="{head}">{figure}</td>' in shown


def test_curves_are_means_and_only_of_what_every_epoch_has(tmp_path: Path) -> None:
    for seed, losses in enumerate(([1.0, 0.5], [3.0, 1.5])):
        run = make_run(tmp_path, "finetune-fc", 0.5, seed)
        run.forget_after(0)
        for epoch, loss in enumerate(losses, start=1):
            line = {"epoch": epoch, "train_loss": loss, "train_top1": 0.5, "seconds": 1, "images_per_second": 1}
            run.append_metrics({**line, "test_loss": None, "test_top1": 0.2 * epoch})
    shutil.copytree(run.path, tmp_path / "a copy")  # which is no further seed, in curves as in the results
    (row,) = report.collect([tmp_path]).rows
    assert row.curves == {
        "train_loss": pytest.approx([2.0, 1.0]),
        "train_top1": pytest.approx([0.5, 0.5]),
        "test_top1": pytest.approx([0.2, 0.4]),
    }
    run.forget_after(1)  # a last line that is lost
    assert report.collect([tmp_path]).rows[0].curves == {}


def test_a_figure_is_that_of_any_run_that_has_it(tmp_path: Path) -> None:
    """A run may have been told to leave it out, and it is no setting that runs are told apart by."""
    make_run(tmp_path, "resnet18-baseline", 0.44, seed=0, published=None)
    make_run(tmp_path, "resnet18-baseline", 0.45, seed=1)
    (row,) = report.collect([tmp_path]).rows
    assert (row.n, row.published_top1) == (2, 0.4426)
    assert row.delta == pytest.approx(0.445 - 0.4426)


def test_a_figure_of_ones_own_is_the_newest_runs(tmp_path: Path) -> None:
    """It may have been put right in the file meanwhile. The newest run is not the last one in order of path."""
    for hour, (published, expected, seed) in enumerate(((0.3, 0.4, 0), (0.5, 0.6, 2), (0.55, None, 1)), start=10):
        text = f"published: {{top1: {published}, source: x}}\n"
        text += f"expected: {{top1: {expected}, runs: 1, source: x}}\n" if expected is not None else ""
        recorded(own_run(tmp_path, text, 0.5, seed), started=f"2026-11-20T{hour}:00:00+00:00")
    (row,) = report.collect([tmp_path / "runs"]).rows
    assert (row.n, row.published_top1, row.expected_top1) == (3, 0.55, 0.6)
    assert row.delta == pytest.approx(0.5 - 0.55)


def test_a_figure_of_ours_is_the_presets(tmp_path: Path) -> None:
    """Whatever a user's file of the same name says, and be its run the first one in order of path."""
    file, config = tmp_path / "resnet18-baseline.yaml", load_preset("resnet18-baseline").config
    for lr in (0.001, 0.002):
        optimizer, theirs = config.optimizer.model_copy(update={"lr": lr}), Published(top1=0.9, source="x")
        file.write_text(config.model_copy(update={"optimizer": optimizer, "published": theirs}).to_yaml())
        make_run(tmp_path / "runs", str(file), 0.44)
    make_run(tmp_path / "runs", "resnet18-baseline", 0.44, 1)
    rows = report.collect([tmp_path / "runs"]).rows
    assert [(row.changes, row.seeds, row.published_top1) for row in rows] == [
        ({}, [0, 1], 0.4426),
        ({"optimizer.lr": 0.002}, [0], 0.4426),
    ]


def test_names_that_could_steer_a_terminal(tmp_path: Path) -> None:
    """Of folders, and of bytes that are no text."""
    run = make_run(tmp_path, "resnet18-baseline", 0.44)
    for name in ("x\x1b]0;title\x07\x1b[2J", os.fsdecode(b"caf\xe9")):
        (tmp_path / "runs").mkdir()
        shutil.copytree(run.path, tmp_path / "runs" / name / "run")
        found = report.collect([tmp_path / "runs"])
        for form in ("table", "markdown", "csv", "json"):
            written = report_text.render(found, form)
            assert all(printable(line) == line for line in written.splitlines()), form
        assert "resnet18-baseline" in page.render(found).encode().decode()
        shutil.rmtree(tmp_path / "runs")


def test_names_that_are_markdown(tmp_path: Path) -> None:
    """By Rich's parser of Markdown: what is in somebody's runs is no link, no HTML, and no picture from elsewhere."""
    name = "![a](http://b/c.png) <img src=x> `[d](http://e)` f|g \\"
    file = tmp_path / "mine.yaml"
    config = load_preset("resnet18-baseline").config
    file.write_text(config.model_copy(update={"expected": Expected(top1=0.5)}).to_yaml())
    recorded(make_run(tmp_path / "runs", str(file), 0.44), preset=name)
    broken = tmp_path / "runs" / name.replace("/", "")
    broken.mkdir()
    (broken / runs.RESULT).write_text("{}")
    written = report_text.render(report.collect([tmp_path / "runs"]), "markdown")
    blocks = MarkdownIt("commonmark").enable("table").parse(written)
    inside = [one for block in blocks for one in block.children or []]
    assert not {block.type for block in blocks} & {"html_block", "fence", "code_block"}
    assert {one.type for one in inside} <= {"text", "text_special", "softbreak"}
    shown = "".join(one.content for one in inside)
    assert (shown.count(name), shown.count(broken.name)) == (2, 1)  # in the table and its note; among those not counted


@pytest.mark.parametrize("first", "=+-@")
def test_names_that_are_formulas(tmp_path: Path, first: str) -> None:
    """A spreadsheet computes what begins so; a number below zero is one all the same."""
    recorded(make_run(tmp_path, "resnet18-baseline", 0.44), preset=f"{first}SUM(A1)", device_name=f"{first}1")
    make_run(tmp_path, "resnet18-baseline", 0.44, seed=1)
    ours, theirs = csv.DictReader(io.StringIO(report_text.render(report.collect([tmp_path]), "csv")))
    assert (ours["preset"], ours["hardware"], float(ours["delta"])) == ("resnet18-baseline", "cpu, fp32", 0.44 - 0.4426)
    assert (theirs["preset"], theirs["hardware"]) == (f"'{first}SUM(A1)", f"'{first}1, fp32")


@pytest.mark.parametrize(("key", "value"), [("select", "foo"), ("ranks", "two"), ("peak_memory_bytes", None)])
def test_a_result_that_is_not_what_it_should_be(tmp_path: Path, key: str, value: object) -> None:
    run = make_run(tmp_path, "resnet18-baseline", 0.44)
    run.write_result({**run.result(), key: value})
    (unusable,) = report.collect([tmp_path]).unusable
    assert f"{key} is missing or not what it should be" in unusable.reason


def test_a_run_without_its_epochs_has_no_curves(tmp_path: Path) -> None:
    run = make_run(tmp_path, "resnet18-baseline", 0.44)
    (run.path / runs.METRICS).unlink()
    found = report.collect([tmp_path])
    assert found.rows[0].curves == {}
    for form in ("table", "markdown", "csv", "json"):
        assert "resnet18-baseline" in report_text.render(found, form)
    assert "resnet18-baseline" in page.render(found)


def test_sparklines() -> None:
    assert report_text.sparkline([]) == "-"
    assert report_text.sparkline([3.0]) == "▁"
    assert report_text.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert report_text.sparkline(list(range(160)), width=8) == "▂▃▄▄▅▆▇█"


def test_sparklines_where_letters_are_few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A pipe in code page 932 or 1252 lacks the bars, and would be given sixteen times their number instead."""
    for encoding in ("cp932", "cp1252", "ascii"):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        assert report_text.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "12345678"
    make_run(tmp_path, "resnet18-baseline", 0.4)
    text = report_text.render(report.collect([tmp_path]), "table")
    assert set("▁▂▃▄▅▆▇█") & set(text), "a file of ours takes them"


def test_another_data_set_is_not_compared(tmp_path: Path) -> None:
    make_run(tmp_path, "resnet18-baseline", 0.9, data__dataset="synthetic")
    found = report.collect([tmp_path])
    assert found.rows[0].delta is None
    assert "synthetic" in report_text.render(found, "markdown")
    assert report.outside_tolerance(found, 0.1) == []


def test_tolerance(tmp_path: Path) -> None:
    make_run(tmp_path, "resnet18-baseline", 0.4476)
    found = report.collect([tmp_path])
    assert report.outside_tolerance(found, 0.5) == []
    (phrase,) = report.outside_tolerance(found, 0.4)
    assert "+0.50 points" in phrase


def test_formats_agree(tmp_path: Path) -> None:
    make_run(tmp_path, "resnet18-baseline", 0.44, optimizer__lr=0.01)
    found = report.collect([tmp_path])
    (from_json,) = json.loads(report_text.render(found, "json"))["rows"]
    (from_csv,) = csv.DictReader(io.StringIO(report_text.render(found, "csv")))
    assert from_json["top1_mean"] == float(from_csv["top1_mean"]) == 0.44
    assert from_csv["changes"] == "optimizer.lr=0.01"
    markdown = report_text.render(found, "markdown").splitlines()
    assert [line.count("|") for line in markdown[:3]] == [10, 10, 10]
    for cell in ("resnet18-baseline (optimizer.lr=0.01)", "44.26%", "44.00%", "-0.26", "best on test"):
        assert f" {cell} |" in markdown[2]


def test_json_in_an_encoding_that_lacks_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stdout cannot take is escaped as JSON has it."""
    make_run(tmp_path / "é 😀", "resnet18-baseline", 0.44)
    found = report.collect([tmp_path])
    for encoding in ("ascii", "latin-1", "utf-8"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
        monkeypatch.setattr("sys.stdout", stream)
        stream.write(report_text.render(found, "json"))
        console.result_json({"run": "é 😀"})
        stream.flush()
        text = stream.buffer.getvalue().decode(encoding)
        decoder = json.JSONDecoder()
        first, end = decoder.raw_decode(text)
        assert "é 😀" in first["rows"][0]["runs"][0]
        assert decoder.raw_decode(text[end:].lstrip())[0] == {"run": "é 😀"}
    monkeypatch.undo()


def test_names_are_text(tmp_path: Path) -> None:
    make_run(tmp_path, "resnet18-baseline", 0.44).path.parent.rename(tmp_path / "a|<b>")
    run = next((tmp_path / "a|<b>").iterdir())
    environment = json.loads((run / runs.ENVIRONMENT).read_text())
    (run / runs.ENVIRONMENT).write_text(json.dumps({**environment, "preset": "x\x1b[31m\ny"}))
    line = report_text.render(report.collect([tmp_path]), "markdown").splitlines()[2]
    assert line.startswith("| a\\|&lt;b> |"), "what is not printable is not taken for a name"


def test_what_is_broken_is_listed_and_stops_nothing(tmp_path: Path) -> None:
    make_run(tmp_path, "resnet18-baseline", 0.44)
    unfinished = make_run(tmp_path, "resnet18-wd01", 0.4).path
    (unfinished / runs.RESULT).unlink()
    no_json = make_run(tmp_path, "resnet18-wd01", 0.4).path
    (no_json / runs.RESULT).write_text("{")
    changes: list[dict[str, Any]] = [
        {},
        {"test": {"top1": "x"}},
        {"test": {"top1": float("nan")}},
        {"test": {"top1": 2, "top5": 1, "loss": 1, "ece": 0}},
        {"seconds": 10**400},
        {"device": "\ud800"},
        {"select": "\x1b[31m"},
    ]
    for number, result in enumerate(changes):
        wrong = make_run(tmp_path, "resnet18-wd01", 0.4, seed=number).path
        (wrong / runs.RESULT).write_text(json.dumps({**json.loads((wrong / runs.RESULT).read_text()), **result}))
        if not result:
            (wrong / runs.RESULT).write_text("{}")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / runs.MODEL).write_bytes(b"")
    (foreign / runs.METRICS).write_bytes(b"\xff")
    found = report.collect([tmp_path])
    assert len(found.rows) == 1
    reasons = {Path(u.run).name: u.reason for u in found.unusable}
    assert reasons[unfinished.name] == "unfinished: 1 of 200 epochs"
    assert "not valid JSON" in reasons[no_json.name]
    assert "not a run folder" in reasons["foreign"]
    assert len(found.unusable) == 3 + len(changes)
    assert report_text.render(found, "markdown").count("not counted") == len(found.unusable)


def test_a_run_can_be_named_itself(tmp_path: Path) -> None:
    run = make_run(tmp_path, "resnet18-baseline", 0.44)
    make_run(tmp_path, "resnet18-baseline", 0.46, seed=1)
    assert report.collect([run.path]).rows[0].n == 1
    assert report.collect([run.path, tmp_path]).rows[0].n == 2
