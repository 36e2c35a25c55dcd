"""Ablations: which blocks there are, what is trained and what taken, and the arithmetic of a gain."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from cifar100cli import ablation, datasets, noise, page, report, report_text, runs, wording
from cifar100cli.ablation import Ablation, Effect
from cifar100cli.config import Override, differences, flat, load_preset, preset_names
from cifar100cli.errors import DivergedError, UsageError
from cifar100cli.schema import Config
from tests.conftest import TINY, Cli, train
from tests.test_page import Page, check_form
from tests.test_report import make_run

# ------------------------------------------------------------------------------------------------- arithmetic


def test_quantiles_are_students() -> None:
    """Rounded down to whole degrees of freedom, of which 30 are as good as more; rounding errors take none away."""
    for freedom in range(1, 40):
        expected = stats.t.ppf(0.975, min(freedom, 30))
        for near in (freedom, freedom + 0.9, freedom - 1e-12):
            assert noise.quantile(near) == pytest.approx(expected, abs=6e-4)


def test_a_gain_of_the_same_seeds_is_paired() -> None:
    ours = {0: 0.51, 1: 0.55, 2: 0.47, 5: 0.53}
    theirs = {5: 0.50, 0: 0.50, 1: 0.52, 2: 0.46}
    found = noise.difference(ours, theirs)
    gaps = np.array([ours[seed] - theirs[seed] for seed in ours])
    assert found.paired
    assert found.mean == pytest.approx(gaps.mean())
    assert found.deviation == pytest.approx(gaps.std(ddof=1))
    assert found.error == pytest.approx(stats.sem(gaps))
    interval = stats.ttest_rel(list(ours.values()), [theirs[seed] for seed in ours]).confidence_interval(0.95)
    assert found.interval == pytest.approx(tuple(interval), abs=1e-5)
    assert found.within_noise is bool(interval.low <= 0 <= interval.high)


def test_seeds_that_one_side_lacks_do_not_count() -> None:
    """An ablation that is under way: what a seed brings by itself is no gain."""
    ours, theirs = {0: 0.51, 1: 0.55, 2: 0.47}, {2: 0.46, 0: 0.50}
    for less, more, sign in ((ours, theirs, 1), (theirs, ours, -1)):
        found = noise.difference(less, more)
        assert found == noise.difference(*({seed: side[seed] for seed in (0, 2)} for side in (less, more)))
        assert found.paired
        assert found.mean == pytest.approx(sign * 0.01)
    (row,) = ablation.compare(
        ablation.Setting("mine", Config(), ours), [("x", True, ablation.Setting("mine", Config(), {1: 0.55}))]
    ).effects
    assert (row.gain, row.interval) == (0, None)


def test_a_gain_of_other_seeds_is_not() -> None:
    ours, theirs = {0: 0.51, 1: 0.55, 2: 0.47}, {0: 0.50, 3: 0.44}
    found = noise.difference(ours, theirs)
    a, b = np.array([*ours.values()]), np.array([*theirs.values()])
    assert (found.paired, found.deviation) == (False, None)
    assert found.mean == pytest.approx(a.mean() - b.mean())
    assert found.error is not None
    assert found.interval is not None
    assert found.error == pytest.approx(np.sqrt(a.var(ddof=1) / 3 + b.var(ddof=1) / 2))
    welch = stats.ttest_ind(a, b, equal_var=False)
    half = stats.t.ppf(0.975, np.floor(welch.df)) * found.error  # rounded down: not narrower than Welch's
    assert found.interval == pytest.approx((found.mean - half, found.mean + half), rel=1e-3)
    exact = welch.confidence_interval(0.95)
    assert found.interval[0] <= exact.low + 1e-5
    assert found.interval[1] >= exact.high - 1e-5


def test_one_seed_says_nothing_of_noise() -> None:
    for ours, theirs in (({0: 0.5}, {0: 0.4}), ({0: 0.5, 1: 0.6}, {0: 0.4})):
        found = noise.difference(ours, theirs)
        assert (found.deviation, found.error, found.interval, found.within_noise) == (None, None, None, None)


def test_no_spread_is_no_certainty() -> None:
    """Two seeds that differ by the same two images of 10,000."""
    for theirs in ({0: 0.0178, 1: 0.0234}, {2: 0.0178, 3: 0.0178}):
        ours = {seed: top1 - 0.0002 for seed, top1 in theirs.items()} if 0 in theirs else {4: 0.0176, 5: 0.0176}
        found = noise.difference(ours, theirs)
        assert (found.interval, found.within_noise) == (None, None)
        assert (found.mean, found.error) == pytest.approx((-0.0002, 0))


# ----------------------------------------------------------------------------------------------------- blocks


def test_what_a_block_takes_away() -> None:
    config = load_preset("resnet18-baseline-fixed").config
    names = ["augment", "normalize", "schedule", "warmup", "weight_decay", "optimizer.grad_clip"]
    found = ablation.without(config, names)
    assert {name: differences(left, config) for name, left in found.items()} == {
        "augment": {"augment.policy": ("none", "crop_flip")},
        "normalize": {"data.normalize": ("none", "backbone")},
        "schedule": {"schedule.name": ("constant", "cosine")},
        "warmup": {"schedule.warmup_epochs": (0, 5)},
        "weight_decay": {"optimizer.weight_decay": (0, 1e-4)},
        "grad_clip": {"optimizer.grad_clip": (0, 5)},
    }
    smooth = load_preset("resnet18-lbsmooth").config
    (left,) = ablation.without(smooth, ["label_smoothing"]).values()
    assert differences(left, smooth) == {"loss.label_smoothing": (0, 0.1)}
    keys = load_preset("resnet18-arcface-kd").config.model_dump()
    keys["distillation"]["teacher"] = "teacher.safetensors"
    keys["model"]["weights"] = "weights.safetensors"
    taught = Config.model_validate(keys)
    assert ablation.without(taught, ["distillation"])["distillation"].distillation is None
    alone = ablation.without(taught, ["pretrained"])["pretrained"].model
    assert (alone.pretrained, alone.weights) == (False, None)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("schedule", {"schedule": {"name": "cosine", "final": 0.1}}),
        ("schedule", {"schedule": {"name": "multi_step", "milestones": (1,), "warmup_epochs": 0}}),
        ("schedule.name", {"schedule": {"name": "linear", "final": 0.5}}),
        ("sam_rho", {"optimizer": {"sam_rho": 1.0, "sam_adaptive": True}}),
        ("normalize", {"data": {"normalize": "values", "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}}),
    ],
)
def test_a_block_takes_what_goes_with_it_alone(name: str, keys: dict[str, dict[str, object]]) -> None:
    """What the schema refuses without the block leaves with it, and the report knows both as one block apart."""
    base = load_preset("resnet18-baseline-fixed").config.model_dump()
    config = Config.model_validate({**base, **{section: {**base[section], **more} for section, more in keys.items()}})
    ((block, left),) = ablation.without(config, [name]).items()
    assert differences(left, config).keys() <= {f"{section}.{key}" for section, more in keys.items() for key in more}
    settings = [ablation.Setting("mine", one, {0: top1}) for one, top1 in ((config, 0.5), (left, 0.4))]
    (found,) = ablation.find(settings)
    assert [(effect.block, effect.without) for effect in found.effects] == [(block, True)]
    assert found.effects[0].gain == pytest.approx(0.1)


def test_whatever_the_schema_has_switched_off_is_a_block() -> None:
    """A new key needs no word here, and every preset loses each block that it has."""
    known = {block.name: block for block in ablation.blocks()}
    assert set(known) >= {
        *("augment", "distillation", "pretrained", "label_smoothing", "weight_decay", "warmup", "grad_clip"),
        *("schedule", "normalize", "first_image_size"),
    }
    assert not {key for block in known.values() for key in block.values} & ablation.HOW
    for name in preset_names():
        config = load_preset(name).config
        for block in known.values():
            if not block.is_off(flat(config)):
                assert block.is_off(flat(block.taken_from(config))), (name, block.name)


def test_what_a_block_leaves() -> None:
    """Nothing of it; or, of a key that is never off by default, this default."""
    known = {block.name: block.left_out for block in ablation.blocks()}
    none = ("augment", "distillation", "normalize", "schedule", "weight_decay", "first_image_size", "cutout", "policy")
    assert [known[name] for name in none] == [f"no {name}" for name in none]
    named = {"flip": "random", "crop_padding": 4, "padding_mode": "black", "stem": "imagenet", "loss": "cross_entropy"}
    assert {name: known[name] for name in named} == {name: f"{name} = {value}" for name, value in named.items()}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["augmet"], "there is no block 'augmet'; did you mean augment? (this preset has augment, normalize,"),
        (["label_smoothing"], "loss.label_smoothing is 0.0 already, and nothing would change"),
        (["crop_padding"], "augment.crop_padding is 4, the default that it would be put to, and nothing would change"),
        (["distillation"], "it is off already"),
        (["train.epochs"], "there is no block 'train.epochs'"),
        (["augment", "augment.policy"], "is the same setting as without augment"),
        (["warmup", "warmup"], "name it once"),
        ([], "name blocks, with commas between them"),
    ],
)
def test_blocks_that_are_none(names: list[str], words: str) -> None:
    with pytest.raises(UsageError) as refusal:
        ablation.without(load_preset("resnet18-baseline-fixed").config, names)
    assert words in str(refusal.value)


def test_a_key_without_a_part_is_no_block() -> None:
    """Mirror images in turn, where the policy has no mirror images."""
    config = load_preset("quickstart", [Override("augment.flip", "alternating", "x")]).config
    for name in ("augment", "flip"):
        words = "it is off already" if name == "augment" else "augment.flip does nothing, for augment.policy is none"
        with pytest.raises(UsageError, match=f"{words}, and nothing would change"):
            ablation.without(config, [name])
    config = load_preset("speedrun-75").config
    assert ablation.without(config, ["flip"])["flip"].augment.flip == "random"
    with pytest.raises(UsageError, match="is the same setting as without augment; name it once"):
        ablation.without(config, ["augment", "policy"])


def test_what_differs_in_what_does_nothing_is_no_effect() -> None:
    plain, turned = (
        load_preset("quickstart", [Override("augment.flip", flip, "x")]).config for flip in ("random", "alternating")
    )
    settings = [ablation.Setting("quickstart", config, {0: 0.5, 1: 0.6}) for config in (plain, turned)]
    assert ablation.find(settings) == []


# ------------------------------------------------------------------------------------------------ the command


def top1_of(paths: list[str]) -> dict[int, float]:
    results = [json.loads((Path(path) / runs.RESULT).read_text()) for path in paths]
    return {result["seed"]: result["test"]["top1"] for result in results}


@pytest.mark.usefixtures("small_synthetic")
def test_ablate_trains_with_and_without(run_cli: Cli) -> None:
    """Runs are normal ones, each seed on both sides; the figures are those of their results."""
    options = ["--augment", "flip", "--label-smoothing", "0.1"]
    alone = train(run_cli, *options, "--seed", "4", epochs=1)
    found = train(run_cli, *options, "--seed", "4", "--seeds", "2", "--ablate", "augment, label_smoothing", epochs=1)
    assert alone["run_dir"] in found["runs"], "what is complete is taken"
    assert (found["preset"], found["n"], found["seeds"]) == ("quickstart", 2, [4, 5])
    base = top1_of(found["runs"])
    assert found["top1_mean"] == pytest.approx(np.mean([*base.values()]))
    assert [(e["block"], e["without"], e["changes"]) for e in found["effects"]] == [
        ("augment", True, {"augment.policy": "none"}),
        ("label_smoothing", True, {"loss.label_smoothing": 0.0}),
    ]
    for effect in found["effects"]:
        without = top1_of(effect["runs"])
        gaps = np.array([base[seed] - without[seed] for seed in (4, 5)])
        assert (effect["n"], effect["paired"]) == (2, True)
        assert effect["gain"] == pytest.approx(gaps.mean())
        assert effect["gain_std"] == pytest.approx(gaps.std(ddof=1))
    assert len(runs.find_runs(Path("runs"))) == 6
    plain = json.loads(run_cli("report", "--json").out)
    assert [e["gain"] for e in plain["ablations"][0]["effects"]] == [e["gain"] for e in found["effects"]]

    again = run_cli(
        "train", *TINY, "--epochs", "1", *options, "--seed", "4", "--seeds", "2", "--ablate", "augment,label_smoothing"
    )
    assert again.code == 0, again.err
    assert again.err.count("taken from runs/quickstart/") == 6
    assert len(runs.find_runs(Path("runs"))) == 6
    for words in ("What each block brings", "as it is", "no augment", "no label_smoothing", "95% interval"):
        assert words in again.out


def without_schedule_it_diverges(monkeypatch: pytest.MonkeyPatch, also: int | None = None) -> None:
    """Let runs at a constant rate lose their way, and those of one seed."""
    from cifar100cli import trainer

    train_epoch = trainer.train_epoch

    def diverging(steps: Any, config: Config, *rest: Any) -> Any:
        if config.schedule.name == "constant" or config.seed == also:
            raise DivergedError("the loss was nan in epoch 1, step 3 of 7, at learning rate 100")
        return train_epoch(steps, config, *rest)

    monkeypatch.setattr(trainer, "train_epoch", diverging)


ABLATED = (
    *("train", *TINY, "--epochs", "1", "--label-smoothing", "0.1", "--set", "schedule.name=cosine", "--seeds", "2"),
    *("--ablate", "schedule,label_smoothing"),
)


@pytest.mark.usefixtures("small_synthetic")
def test_a_setting_that_diverges_does_not_keep_the_others(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    without_schedule_it_diverges(monkeypatch)
    outcome = run_cli(*ABLATED, "--json")
    assert outcome.code == 4
    found = json.loads(outcome.out)
    assert (found["n"], [(e["block"], e["n"]) for e in found["effects"]]) == (2, [("label_smoothing", 2)])
    (last,) = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert last.startswith("error: 2 of 6 runs not counted: no schedule, seed 0: the loss was nan in epoch 1, step 3")
    assert "no schedule, seed 1: " in last
    assert last.count("try a lower --lr") == 2

    again = run_cli(*ABLATED)  # and those that diverged are tried again
    assert (again.code, again.err.count("taken from")) == (4, 4)
    assert again.err.count("is not counted: the loss was nan") == 2
    assert "no label_smoothing" in again.out
    assert "no schedule" not in again.out


@pytest.mark.usefixtures("small_synthetic")
def test_a_seed_that_diverges_is_not_compared(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    without_schedule_it_diverges(monkeypatch, also=1)
    outcome = run_cli(*ABLATED, "--json")
    assert outcome.code == 4
    assert "error: 4 of 6 runs not counted" in outcome.err
    found = json.loads(outcome.out)
    assert (found["seeds"], found["effects"][0]["seeds"], found["effects"][0]["interval"]) == ([0], [0], None)
    without_schedule_it_diverges(monkeypatch, also=0)
    none = run_cli(*ABLATED, "--seed", "0", "--seeds", "1", "--out", "elsewhere")
    assert (none.code, none.out) == (4, "")
    assert "error: 3 of 3 runs not counted: as it is, seed 0" in none.err


@pytest.mark.usefixtures("small_synthetic")
def test_a_default_that_is_not_off_is_named(run_cli: Cli) -> None:
    """Mirror images at random, in place of those in turn: its gain is what these bring, and nowhere is it `no flip`."""
    options = ("--augment", "flip", "--set", "augment.flip=alternating", "--ablate", "flip", "--epochs", "1")
    outcome = run_cli("train", *TINY, *options)
    assert outcome.code == 0, outcome.err
    assert "2 runs: quickstart as it is, flip = random\n" in outcome.err
    assert "run 2 of 2: flip = random, seed 0" in outcome.err
    (found,) = json.loads(run_cli("report", "--json").out)["ablations"]
    (effect,) = found["effects"]
    base, random = (top1_of(side["runs"])[0] for side in (found, effect))
    assert (effect["block"], effect["without"], effect["gain"]) == ("flip", False, pytest.approx(random - base))
    assert wording.points(effect["gain"]) in outcome.out
    shown = [run_cli("report", "--format", form).out for form in ("table", "markdown", "html")]
    for text in (outcome.out, outcome.err, *shown):
        assert "flip = random" in text
        assert "no flip" not in text


@pytest.mark.usefixtures("small_synthetic")
@pytest.mark.parametrize("epoch", [1, 2])
def test_an_ablation_that_was_stopped_goes_on(run_cli: Cli, monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    from cifar100cli import trainer

    command = ["train", *TINY, "--epochs", "2", "--label-smoothing", "0.1", "--ablate", "label_smoothing"]
    train_epoch = trainer.train_epoch
    calls = 0

    def stopped(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 + epoch:
            raise KeyboardInterrupt
        return train_epoch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_epoch", stopped)
        outcome = run_cli(*command)
    assert outcome.code == 130
    assert "run 2 of 2: no label_smoothing, seed 0" in outcome.err
    assert "still to do after this run: 0 of 2" in outcome.err
    again = run_cli(*command)
    assert again.code == 0, again.err
    assert again.err.count("taken from") == 1
    assert again.err.count("going on with") >= 1
    assert len(runs.find_runs(Path("runs"))) == 2
    assert "one seed" in again.out


@pytest.mark.usefixtures("small_synthetic")
def test_what_cannot_go_on_is_trained_anew(run_cli: Cli) -> None:
    """A machine on which `auto` means another precision, and a training state that is damaged."""
    command = ["train", *TINY, "--epochs", "1", "--set", "train.precision=auto"]
    command += ["--label-smoothing", "0.1", "--ablate", "label_smoothing"]
    assert run_cli(*command).code == 0
    first, second = map(runs.RunDir, runs.find_runs(Path("runs")))
    for run in (first, second):
        (run.path / runs.RESULT).unlink()
    (first.path / runs.ENVIRONMENT).write_text(json.dumps({**first.environment(), "precision": "fp8"}))
    (second.path / runs.STATE).write_bytes(b"damaged")
    left = {path: path.read_bytes() for run in (first, second) for path in run.path.iterdir()}
    again = run_cli(*command)
    assert again.code == 0, again.err
    for reason in ("was begun in fp8", f"{second.path / runs.STATE}: corrupt"):
        assert re.search(f"cannot go on, and the setting is trained anew: .*{reason}", again.err)
    assert len(runs.find_runs(Path("runs"))) == 4
    assert {path: path.read_bytes() for path in left} == left
    assert run_cli(*command).err.count("taken from") == 2


@pytest.mark.usefixtures("small_synthetic")
def test_a_setting_that_is_refused_is_told_alone(run_cli: Cli) -> None:
    options = ("--label-smoothing", "0.1", "--ablate", "label_smoothing")
    outcome = run_cli("train", *TINY, "--batch-size", "1", *options)
    assert (outcome.code, "batch norm" in outcome.err, "still to do" in outcome.err) == (2, True, False)


@pytest.mark.usefixtures("small_synthetic")
def test_runs_on_other_images_are_not_taken(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["train", *TINY, "--epochs", "1", "--label-smoothing", "0.1", "--ablate", "label_smoothing"]
    assert run_cli(*command).code == 0
    digest = datasets.digest
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "digest", lambda dataset: digest(dataset)[::-1])
        other = run_cli(*command)
    assert (other.code, other.err.count("taken from")) == (0, 0)
    assert len(runs.find_runs(Path("runs"))) == 4


def test_blocks_may_be_named_one_by_one(run_cli: Cli) -> None:
    options = ("--label-smoothing", "0.1", "--weight-decay", "0.1")
    outcome = run_cli(
        "train", *TINY, "--epochs", "1", *options, "--ablate", "label_smoothing", "--ablate", "weight_decay", "--json"
    )
    assert outcome.code == 0, outcome.err
    assert {effect["block"] for effect in json.loads(outcome.out)["effects"]} == {"label_smoothing", "weight_decay"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ablate", "ema2"], "there is no block 'ema2'"),
        (["--ablate", "label_smoothing"], "already, and nothing would change"),
        (["--ablate", "schedule", "--resume", "last"], "leave --ablate out"),
        (["--ablate", "schedule", "--dry-run"], "--dry-run"),
        (["--ablate", ","], "name blocks"),
    ],
)
def test_refused_before_anything_is_written(run_cli: Cli, tmp_path: Path, arguments: list[str], words: str) -> None:
    outcome = run_cli("train", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert words in line
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- the report


def only(ablations: list[Ablation]) -> tuple[Ablation, dict[str, Effect]]:
    (found,) = ablations
    return found, {effect.block: effect for effect in found.effects}


def test_the_report_finds_ablations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Around the preset as shipped, for runs of the same length and share alone."""
    base, plain, other = [0.50, 0.52, 0.51], [0.45, 0.46, 0.47], [0.51, 0.52, 0.50]
    how = {"train__epochs": 20}
    for seed in range(3):
        make_run(tmp_path, "resnet18-baseline-fixed", base[seed], seed, **how)
        make_run(tmp_path, "resnet18-baseline-fixed", plain[seed], seed, augment__policy="none", **how)
        make_run(tmp_path, "resnet18-baseline-fixed", other[seed], seed, optimizer__lr=0.002, **how)
    make_run(tmp_path, "resnet18-baseline-fixed", 0.53, 0, loss__label_smoothing=0.1, **how)
    make_run(tmp_path, "resnet18-baseline-fixed", 0.1, 0, augment__policy="none", train__epochs=10)
    make_run(tmp_path, "resnet18-baseline-fixed", 0.1, 0, augment__policy="none", optimizer__lr=0.1, **how)
    make_run(tmp_path, "resnet18-wd01", 0.4)
    make_run(tmp_path, "resnet18-wd01", 0.4, data__fraction=0.5)
    found = report.collect([tmp_path])
    ours, effects = only(found.ablations)
    assert (ours.preset, ours.changes, ours.n) == ("resnet18-baseline-fixed", {"train.epochs": 20}, 3)
    assert set(effects) == {"augment", "optimizer.lr", "label_smoothing"}
    gain = effects["augment"]
    assert (gain.without, gain.within_noise) == (True, False)
    assert gain.gain == pytest.approx(np.mean(base) - np.mean(plain))
    assert gain.gain_std == pytest.approx(np.std(np.subtract(base, plain), ddof=1))
    rate, smooth = effects["optimizer.lr"], effects["label_smoothing"]
    assert (rate.without, rate.within_noise) == (False, True)
    assert rate.gain == pytest.approx(np.mean(other) - np.mean(base)), "of what it has instead"
    assert (smooth.without, smooth.interval) == (False, None)
    assert smooth.gain == pytest.approx(0.53 - base[0]), "of the one seed that both have"

    (in_json,) = json.loads(report_text.render(found, "json"))["ablations"]
    assert [effect["gain"] for effect in in_json["effects"]] == [effect.gain for effect in ours.effects]
    report_text.show_table(found)
    for text in (capsys.readouterr().out, report_text.render(found, "markdown")):
        lines = [" ".join(line.replace("|", " ").split()) for line in text.splitlines()]
        assert "as it is 3 51.00 ±1.00 - -" in lines
        assert any(line.startswith("no augment 3 46.00 ±1.00 +5.00 ±") for line in lines)
        assert any(line.startswith("optimizer.lr = 0.002 3 51.00 ±1.00 +0.00 ±") for line in lines)
        assert any(line.endswith("within noise") for line in lines)


def test_a_figure_of_ones_own_preset_is_not_that_of_what_is_left(run_cli: Cli) -> None:
    Path("mine.yaml").write_text(
        "{data: {dataset: synthetic, batch_size: 64}, model: {backbone: test_resnet}, loss: {label_smoothing: 0.1}, "
        "train: {epochs: 1, precision: fp32}, published: {top1: 0.5}}"
    )
    outcome = run_cli("train", "--preset", "./mine.yaml", "--ablate", "label_smoothing", "--device", "cpu", "--json")
    assert outcome.code == 0, outcome.err
    published = [runs.RunDir(run).config().published for run in runs.find_runs(Path("runs"))]
    assert sorted(figure is None for figure in published) == [False, True]


def test_the_report_finds_the_base_of_ones_own_preset(tmp_path: Path) -> None:
    """The one that the others lack something of; several runs of a seed count as one."""
    for seed, top1 in ((0, 0.50), (1, 0.54), (1, 0.56)):
        run = make_run(tmp_path, "resnet18-lbsmooth", top1, seed, augment__policy="flip")
        rename(run.path, "mine")
    for seed in range(2):
        rename(make_run(tmp_path, "resnet18-lbsmooth", 0.48, seed).path, "mine")
        rename(make_run(tmp_path, "resnet18-baseline", 0.47, seed, augment__policy="flip").path, "mine")
    found = report.collect([tmp_path]).ablations
    ours, effects = only(found)
    assert (ours.n, ours.changes) == (2, {"augment.policy": "flip", "loss.label_smoothing": 0.1})
    assert ours.top1_mean == pytest.approx(0.525)
    assert {name: effect.gain for name, effect in effects.items()} == pytest.approx(
        {"augment": 0.525 - 0.48, "label_smoothing": 0.525 - 0.47}
    )


def test_an_ablation_is_told_by_the_changes_of_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of one's own preset, at two rates; and two of a preset of ours, of two teachers."""
    for name, key, values in (
        ("mine", "optimizer.lr", (0.01, 0.02)),
        ("resnet18-arcface-kd", "distillation.teacher", ("/a", "/b")),
    ):
        for number, value in enumerate(values):
            for smoothing in (0.1, 0.0):
                settings: dict[str, Any] = {key.replace(".", "__"): value, "loss__label_smoothing": smoothing}
                preset = "resnet18-lbsmooth" if name == "mine" else name
                rename(make_run(tmp_path, preset, 0.5 + 0.01 * number + smoothing, **settings).path, name)
    found = report.collect([tmp_path])
    rows = {tuple(row.runs): row.changes for row in found.rows}
    assert [one.changes for one in found.ablations] == [rows[tuple(one.runs)] for one in found.ablations]
    report_text.show_table(found)
    shown = capsys.readouterr().out
    letters = dict(re.findall(r"^\[(\w)\] (.*)$", shown, re.MULTILINE))
    titles = re.findall(r"What each block brings: ([\w-]+) \[(\w)\]", shown)
    assert sorted((name, letters[letter]) for name, letter in titles) == [
        ("mine", "loss.label_smoothing=0.1, optimizer.lr=0.01"),
        ("mine", "loss.label_smoothing=0.1, optimizer.lr=0.02"),
        ("resnet18-arcface-kd", "distillation.teacher=/a"),
        ("resnet18-arcface-kd", "distillation.teacher=/b"),
    ]


def rename(run: Path, preset: str) -> None:
    environment = json.loads((run / runs.ENVIRONMENT).read_text())
    (run / runs.ENVIRONMENT).write_text(json.dumps({**environment, "preset": preset}))


def test_the_page_shows_what_blocks_bring(tmp_path: Path) -> None:
    for seed in range(2):
        make_run(tmp_path, "resnet18-baseline-fixed", 0.50 + 0.01 * seed, seed)
        make_run(tmp_path, "resnet18-baseline-fixed", 0.44 + 0.01 * seed, seed, augment__policy="none")
        make_run(tmp_path, "resnet18-baseline-fixed", 0.50 + 0.02 * seed, seed, optimizer__weight_decay=0.0)
        make_run(tmp_path, "resnet18-baseline-fixed", 0.48, seed, model__backbone="<b>$x$</b>" * 9)
    found = Page(page.render(report.collect([tmp_path])))
    check_form(found)
    assert not found.all("b")
    assert "What each block brings" in found.text
    assert "no augment Seeds" not in found.text
    text = found.text.replace("\u202f", " ")
    for words in ("no augment 2 44.50% ± 0.71 +6.00 ± 0.00", "no weight_decay 2 51.00% ± 1.41", "within noise"):
        assert words in text
    (chart,) = [svg for svg in found.all("svg") if svg.get("aria-label", "").startswith("What each block brings")]
    assert "resnet18-baseline-fixed" in chart["aria-label"]


def test_a_report_without_ablations_says_nothing_of_them(tmp_path: Path) -> None:
    make_run(tmp_path, "resnet18-baseline", 0.44)
    make_run(tmp_path, "resnet18-baseline", 0.44, train__epochs=3)
    found = report.collect([tmp_path])
    assert found.ablations == []
    for text in (page.render(found), report_text.render(found, "table"), report_text.render(found, "markdown")):
        assert "block" not in Page(text).text
