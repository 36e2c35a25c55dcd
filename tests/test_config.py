"""Presets: what is read, what is refused, and in which words."""

import os
from pathlib import Path
from typing import get_args

import pytest
import yaml

from cifar100cli import schema
from cifar100cli.config import (
    Override,
    departures,
    differences,
    effective,
    effective_differences,
    flat,
    having,
    idle,
    load_preset,
    preset_names,
    presets_folder,
    shipped_presets,
)
from cifar100cli.errors import UsageError
from cifar100cli.schema import TUNING, Config
from tests.conftest import Cli


def load(tmp_path: Path, text: str, *overrides: Override) -> Config:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return load_preset(str(path), overrides).config


def test_a_file_whose_name_is_not_utf_8_names_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where file names are in another encoding, no model could be kept in a folder called so."""
    path = tmp_path / "猫.yaml"
    path.write_text("{}", encoding="utf-8")
    assert load_preset(str(path)).name == "猫"
    monkeypatch.setattr(os, "fsencode", lambda name: str(name).encode("euc_jp"))
    with pytest.raises(UsageError, match=r"猫\.yaml: give the file another name"):
        load_preset(str(path))


def test_a_key_that_is_no_text(tmp_path: Path) -> None:
    """Found by `tests.fuzz`: half a surrogate pair."""
    with pytest.raises(UsageError, match="one of its keys is not text"):
        load(tmp_path, '"\\ud800": {policy: none}')


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optimizer: {lr: 1e-3}", "optimizer.lr", 0.001),
        ("optimizer: {lr: 2E-2}", "optimizer.lr", 0.02),
        ("optimizer: {lr: .5}", "optimizer.lr", 0.5),
        ("optimizer: {lr: '1e-2'}", "optimizer.lr", 0.01),
        ("optimizer: {betas: [0.8, 9.9e-1]}", "optimizer.betas", (0.8, 0.99)),
        ("schedule: {name: multi_step, milestones: [60, 120]}", "schedule.milestones", (60, 120)),
        ("train: {epochs: 1e2}", "train.epochs", 100),
        ("seed: 010", "seed", 10),
        ("model: {pretrained: on}", "model.pretrained", True),
        ("model: {pretrained: yes}", "model.pretrained", True),
        ("model: {pretrained: off}", "model.pretrained", False),
        ("augment: {policy: none}", "augment.policy", "none"),
        ("description: off", "description", "off"),
        ("description: 12:30", "description", "12:30"),
    ],
)
def test_scalars_mean_what_a_user_means(tmp_path: Path, text: str, key: str, value: object) -> None:
    found: object = load(tmp_path, text)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optimzer: {lr: 1}", ["'optimzer'", "did you mean optimizer?"]),
        ("optimizer: {ls: 1}", ["'optimizer.ls'", "did you mean optimizer.lr?"]),
        ("lr: 1", ["'lr'", "did you mean optimizer.lr?"]),
        ("optimizer: {learning_rate: 1}", ["'optimizer.learning_rate'", "did you mean optimizer.lr?"]),
        ("model: {arch: resnet18}", ["'model.arch'", "did you mean model.backbone?"]),
        ("zzz: 1", ["'zzz'", "presets --keys"]),
        ("optimizer: {name: adanw}", ["optimizer.name", "adanw", "adamw, adam, sgd", "did you mean adamw?"]),
        ("optimizer: {lr: -1}", ["optimizer.lr", "-1", "above 0"]),
        ("optimizer: {lr: .nan}", ["optimizer.lr", ".nan", "a number"]),
        ("optimizer: {lr: .inf}", ["optimizer.lr", ".inf"]),
        ("optimizer: {lr: 1e999}", ["optimizer.lr", "number"]),
        ("optimizer: {lr: true}", ["optimizer.lr", "true"]),
        ("optimizer: {lr: [1]}", ["optimizer.lr", "[1]"]),
        ("optimizer: {betas: 0.9}", ["optimizer.betas", "0.9", "two numbers"]),
        ("optimizer: {betas: [0.9, 1.5]}", ["optimizer.betas", "1.5"]),
        ("optimizer: {layer_decay: 0}", ["optimizer.layer_decay", "above 0 and at most 1"]),
        ("optimizer: {layer_decay: 0.7}\nfinetune: {}", ["optimizer.layer_decay = 0.7", "finetune.stage_decay"]),
        (
            "optimizer: {auxiliary_lr: 0.7}",
            ["optimizer.auxiliary_lr = 0.7:", "optimizer.name = muon, not adamw", "=null"],
        ),
        ("optimizer: {name: sgd, fixed_norm: true}", ["optimizer.fixed_norm = true:", "muon, not sgd", "=false"]),
        (
            "optimizer: {auxiliary_lr: 0.7, fixed_norm: true}",
            [
                "optimizer.auxiliary_lr = 0.7 and optimizer.fixed_norm = true:",
                "(--set optimizer.auxiliary_lr=null --set optimizer.fixed_norm=false)",
            ],
        ),
        ("optimizer: {sam_adaptive: true}", ["optimizer.sam_adaptive = true", "optimizer.sam_rho above 0"]),
        ("optimizer: {sam_rho: -1}", ["optimizer.sam_rho", "-1", "at least 0"]),
        ("schedule: {name: multistep}", ["did you mean multi_step?"]),
        ("schedule: {name: multi_step}", ["multi_step needs schedule.milestones", "[60, 120, 160]"]),
        ("schedule: {milestones: [60]}", ["schedule.milestones = [60]", "multi_step, not constant"]),
        ("schedule: {milestones: 60}", ["schedule.milestones = 60", "a list of at most 1,000, as in [60, 120, 160]"]),
        ("schedule: {milestones: [0]}", ["schedule.milestones = 0", "each a whole number, at least 1"]),
        ("schedule: {milestones: [1.5]}", ["schedule.milestones = 1.5", "whole number"]),
        ("schedule: {name: multi_step, milestones: [2, 2]}", ["[2, 2]", "above the one before"]),
        ("schedule: {name: multi_step, milestones: [3, 2]}", ["[3, 2]", "above the one before"]),
        ("schedule: {name: multi_step, milestones: [9, 200]}", ["[9, 200]", "below train.epochs = 200"]),
        ("schedule: {name: one_cycle, warmup_epochs: 1}", ["schedule.warmup_epochs = 1", "one_cycle", "pct_start"]),
        ("schedule: {name: one_cycle, final: 0.5}", ["schedule.final = 0.5", "cosine or linear, not one_cycle"]),
        ("schedule: {final: 0.5}", ["schedule.final = 0.5", "not constant"]),
        ("train: {epochs: 1.5}", ["train.epochs", "1.5", "whole number"]),
        ("train: {epochs: 0}", ["train.epochs", "0", "at least 1"]),
        ("train: {epochs: yes}", ["train.epochs", "yes", "whole number"]),
        ("train: {select: best_tset}", ["train.select", "best_tset", "did you mean best_test?"]),
        ("train: {select: best_val}", ["train.select", "data.val_fraction"]),
        ("loss: {name: arcface}", ["loss.name = arcface", "model.head"]),
        ("model: {pretrained: perhaps}", ["model.pretrained", "perhaps", "true or false"]),
        ("data: {fraction: 0}", ["data.fraction", "above 0", "at most 1"]),
        ("data: {image_size: 8}", ["data.image_size", "8", "16"]),
        ("data: {first_image_size: 24}", ["data.first_image_size", "24", "a multiple of 16"]),
        ("data: {first_image_size: 32}", ["data.first_image_size = 32", "smaller than data.image_size = 32"]),
        ("data: {first_image_size: 16, grow_until: 1}", ["data.grow_until", "below 1"]),
        (
            "{data: {first_image_size: 16}, finetune: {cache: on}}",
            ["finetune.cache = on is not possible", "the images grow (data.first_image_size)"],
        ),
        ("model: {drop_rate: 1}", ["model.drop_rate", "1", "below 1"]),
        ("augment: off", ["augment", "off", "policy"]),
        ("augment: {policy: flip, flip: none}", ["augment.flip = none", "augment.policy = none"]),
        ("augment: {policy: flip, backend: albumentations}", ["augment.backend", "one_of, not flip"]),
        ("augment: {crop_padding: 17}", ["augment.crop_padding", "17", "at most 16"]),
        ("augment: {auto: autoaugment}", ["augment.auto", "randaugment, trivialaugment"]),
        ("augment: {randaugment_magnitude: 31}", ["augment.randaugment_magnitude", "31", "at most 30"]),
        ("augment: {cutout: 65}", ["augment.cutout", "65", "at most 64"]),
        ("augment: {erasing: 1.5}", ["augment.erasing", "1.5", "at most 1"]),
        ("augment: {mixup: -0.1}", ["augment.mixup", "-0.1", "at least 0"]),
        ("augment: {cutmix: yes}", ["augment.cutmix", "yes", "number"]),
        ("data:", ["data", "dataset"]),
        ("seed: -1", ["seed", "-1"]),
        ("published: {top1: 44}", ["published.top1", "44", "at most 1"]),
        ("published: {epoch: 4}", ["published.top1", "missing"]),
        ("seed: 1\nseed: 2", ["'seed'", "twice", "line 2"]),
        ("{", ["YAML", "line 1"]),
        ("[1]", ["no keys"]),
        ("", ["no keys"]),
        ("a: &x 1\nb: *x", ["aliases", "line 2"]),
        ("? [a]\n: b", ["plain text"]),
        ("[" * 5000, ["nested"]),
        ("seed: " + "9" * 5000, ["YAML"]),
        ("x: !!python/object/apply:os.system [ls]", ["os.system"]),
        ("description: " + "x" * 100_000, ["64 KiB"]),
    ],
)
def test_refused_in_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as refusal:
        load(tmp_path, text)
    message = str(refusal.value)
    assert "\n" not in message
    assert len(message) < 400
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("first", "whole", "until", "epochs", "expected"),
    [
        (None, 32, 0.5, 3, [32, 32, 32]),
        (16, 32, 0.5, 4, [16, 16, 32, 32]),
        (16, 32, 0.99, 3, [16, 16, 32]),
        (16, 32, 0.5, 1, [32]),
        (128, 224, 0.75, 8, [128, 144, 160, 176, 192, 208, 224, 224]),
        (32, 100, 0.5, 10, [32, 32, 48, 64, 80, 100, 100, 100, 100, 100]),
        (16, 32, 0.55, 100, [16] * 55 + [32] * 45),  # 0.55 * 100 is more than 55 in floats
    ],
)
def test_images_grow_evenly_and_end_whole(
    first: int | None, whole: int, until: float, epochs: int, expected: list[int]
) -> None:
    keys = {"image_size": whole, "first_image_size": first, "grow_until": until}
    config = Config.model_validate({"data": keys, "train": {"epochs": epochs}})
    assert [config.image_size_in(epoch) for epoch in range(1, epochs + 1)] == expected


def test_a_file_is_known_by_its_ending_and_found_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.YAML").write_text("seed: 7")
    for name in ("mine.YAML", "~/mine.YAML"):
        assert load_preset(name).config.seed == 7
    with pytest.raises(UsageError, match=r"--preset ~nobody-here/x.yaml: there is no such user's home"):
        load_preset("~nobody-here/x.yaml")


def test_overrides_name_where_they_come_from(tmp_path: Path) -> None:
    assert load(tmp_path, "seed: 1", Override("seed", 2, "--seed")).seed == 2
    with pytest.raises(UsageError, match=r"optimizer.lr = fast \(--lr\): must be a number"):
        load(tmp_path, "seed: 1", Override("optimizer.lr", "fast", "--lr"))
    with pytest.raises(UsageError, match=r"'train.epoch' in --set train.epoch; did you mean train.epochs\?"):
        load(tmp_path, "seed: 1", Override("train.epoch", 3, "--set train.epoch"))
    with pytest.raises(UsageError, match="it is a section"):
        load(tmp_path, "seed: 1", Override("optimizer", 3, "--set optimizer"))
    with pytest.raises(UsageError, match="it is a section"):
        load(tmp_path, "seed: 1", Override("optimizer", None, "--set optimizer"))
    with pytest.raises(UsageError, match=r"it is a section.* null drops it"):
        load(tmp_path, "seed: 1", Override("published", 3, "--set published"))


def test_what_is_said_of_keys_and_lists(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'train.epochs' in .*: in a file, write train: \{epochs: ...\}"):
        load(tmp_path, "train.epochs: 3")
    with pytest.raises(UsageError, match=r"must be three numbers, .*, each at least 0 and at most 1 "):
        load(tmp_path, "data: {normalize: values, mean: [127, 127, 127], std: [0.5, 0.5, 0.5]}")
    with pytest.raises(UsageError, match=r"must be two numbers, as in \[0.9, 0.999\], each at least 0 and below 1$"):
        load(tmp_path, "optimizer: {betas: [0.9, 1.5]}")
    with pytest.raises(UsageError, match="unknown preset 'n"):
        load_preset("n" * 300)
    with pytest.raises(UsageError, match="cannot be read: File name too long"):
        load_preset(f"./{'n' * 300}.yaml")


def test_paths_are_whole_wherever_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run remembers them, and is gone on with from any folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    text = "distillation: {teacher: runs/teacher}\nmodel: {pretrained: true, weights: ~/w.safetensors}"
    config = load(tmp_path, text)
    assert config.distillation is not None
    assert config.distillation.teacher == str(tmp_path / "runs" / "teacher")
    assert config.model.weights == "/home/me/w.safetensors"
    named = load(tmp_path, text, Override("model.weights", "w.safetensors", "--set model.weights"))
    assert named.model.weights == str(tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="there is no such user's home"):
        load(tmp_path, "model: {pretrained: true, weights: ~nobody-here/w.safetensors}")


def test_null_drops_what_a_preset_need_not_have(tmp_path: Path) -> None:
    dropped = load(
        tmp_path,
        "published: {top1: 0.5}\ndistillation: {alpha: 0.5}",
        *(Override(key, None, key) for key in ("published", "distillation")),
    )
    assert (dropped.published, dropped.distillation) == (None, None)


def test_a_figure_of_ours_is_no_setting(tmp_path: Path) -> None:
    """Of a preset of one's own it may be said on the command line, too."""
    file = tmp_path / "resnet18-baseline.yaml"
    file.write_text("published: {top1: 0.5}")
    for key in ("published.top1", "expected.runs"):
        for name in ("resnet18-baseline", str(file)):
            with pytest.raises(UsageError, match=rf"^--set {key}: .* of resnet18-baseline is not a run's to say"):
                load_preset(name, [Override(key, 1, f"--set {key}")])
    assert load_preset("resnet18-baseline", [Override("published", None, "--set published")]).config.published is None
    own = load(tmp_path, "published: {top1: 0.5}", Override("published.top1", 0.6, "--set published.top1"))
    assert own.published is not None
    assert own.published.top1 == 0.6


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be"])
def test_a_preset_as_windows_writes_it(tmp_path: Path, encoding: str) -> None:
    """Notepad begins a file with a mark, and `cifar100 presets NAME > mine.yaml` is UTF-16 in PowerShell 5."""
    path = tmp_path / "mine.yaml"
    mark = "" if encoding == "utf-8-sig" else "\ufeff"
    path.write_bytes(f"{mark}seed: 3\r\ndescription: 学習\r\n".encode(encoding))
    config = load_preset(str(path)).config
    assert (config.seed, config.description) == (3, "学習")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00seed")
    with pytest.raises(UsageError, match="UTF-8"):
        load_preset(str(path))


@pytest.mark.parametrize("value", ["foo", "[1, 2]", "5"])
def test_a_flag_makes_no_section_of_what_is_none(tmp_path: Path, value: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"augment: {value}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"augment = .* must be a section with the keys policy"):
        load_preset(str(path), [Override("augment.policy", "flip", "--augment")])
    path.write_text("augment: null\n", encoding="utf-8")
    assert load_preset(str(path), [Override("augment.policy", "flip", "--augment")]).config.augment.policy == "flip"


def test_a_preset_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean resnet18-baseline"):
        load_preset("resnet18-basline")
    with pytest.raises(UsageError, match="no such file"):
        load_preset(str(tmp_path / "none.yaml"))
    with pytest.raises(UsageError, match="is a folder"):
        load_preset(str(tmp_path))
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UsageError, match="not a plain file"):
        load_preset(str(tmp_path / "pipe.yaml"))


@pytest.mark.parametrize(
    ("key", "value", "start"),
    [
        (
            "finetune.unfreeze",
            "layr3",
            "--unfreeze: finetune.unfreeze = layr3: resnet18 has no such stage; did you mean layer3?",
        ),
        ("finetune.unfreeze", "FC", "--unfreeze: finetune.unfreeze = FC: resnet18 has no such stage; did you mean fc?"),
        ("schedule.milestones", [200], "--milestones: schedule.milestones = [200] is for"),
    ],
)
def test_a_rule_between_keys_names_the_flag(key: str, value: object, start: str) -> None:
    with pytest.raises(UsageError) as raised:
        load_preset("finetune-layer4", [Override("seed", 1, "--seed"), Override(key, value, f"--{key.split('.')[1]}")])
    assert str(raised.value).startswith(start)


@pytest.mark.parametrize("name", preset_names())
def test_yaml_round_trips(tmp_path: Path, name: str) -> None:
    config = load_preset(name).config
    assert load(tmp_path, config.to_yaml()) == config
    # PyYAML's own reader, which other tools use, must see the same values.
    assert yaml.safe_load(config.to_yaml()) == config.model_dump(mode="json", exclude_none=True)


@pytest.mark.parametrize("text", ["1e3", "08", "010", "+1", ".5", "5.", "1E-4", "no", "null", "~", "true", "1:30", "x"])
def test_text_that_looks_like_a_number_comes_back_as_text(tmp_path: Path, text: str) -> None:
    """Found by `tests.test_properties`: a run with `--weights 1e3` could not be resumed."""
    config = Config.model_validate({"description": text, "model": {"pretrained": True, "weights": text}})
    assert load(tmp_path, config.to_yaml()) == config
    assert yaml.safe_load(config.to_yaml()) == config.model_dump(mode="json", exclude_none=True)


@pytest.mark.parametrize("name", preset_names())
def test_our_own_presets_are_read_as_anybodys(tmp_path: Path, name: str) -> None:
    """Ours go through a quicker parser; the strict one must see the same."""
    text = (presets_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    assert load(tmp_path, text) == load_preset(name).config


def test_differences_ignore_what_only_describes() -> None:
    config = Config()
    other = Config.model_validate({"description": "x", "optimizer": {"lr": 0.5}})
    assert differences(config, config) == {}
    assert differences(other, config) == {"optimizer.lr": (0.5, 0.001)}


def test_what_does_nothing_is_no_effective_difference() -> None:
    """Asked of the settings that are told: padding where there are no crops, and not where there are some."""
    flips, crops = (Config.model_validate({"augment": {"policy": policy}}) for policy in ("flip", "crop_flip"))
    padded, wide = (having(config, "augment.crop_padding", 2) for config in (flips, crops))
    assert effective_differences(padded, flips) == {}
    assert effective(padded) == effective(flips)
    assert effective_differences(wide, crops) == {"augment.crop_padding": (2, 4)}
    assert effective_differences(padded, crops) == {"augment.policy": ("flip", "crop_flip")}
    assert effective_differences(wide, flips).keys() == {"augment.policy", "augment.crop_padding"}
    assert departures(having(padded, "seed", 3), flips) == {}


def test_differences_in_sections_that_only_one_has() -> None:
    plain = Config()
    distilled = Config.model_validate({"distillation": {"teacher": "/runs/one", "temperature": 2}})
    assert differences(distilled, plain) == {"distillation.teacher": ("/runs/one", None)}
    assert differences(Config.model_validate({"finetune": {}}), plain) == {"finetune.unfreeze": ("layer4", None)}


def test_the_tutorials_baseline() -> None:
    baseline = dict(shipped_presets())["resnet18-baseline"]
    assert baseline.published is not None
    assert (baseline.published.top1, baseline.published.epoch) == (0.4426, 186)
    assert baseline.seed == 0
    expected: dict[str, dict[str, object]] = {
        "data": {"dataset": "cifar100", "image_size": 32, "batch_size": 250, "fraction": 1.0, "normalize": "none"},
        "augment": {"policy": "none"},
        "model": {"backbone": "resnet18", "pretrained": False, "stem": "imagenet", "head": "linear"},
        "loss": {"name": "cross_entropy", "label_smoothing": 0.0},
        "optimizer": {"name": "adamw", "lr": 0.001, "weight_decay": 0.0001, "betas": [0.9, 0.999], "grad_clip": 5.0},
        "schedule": {"name": "constant", "warmup_epochs": 0},
        "train": {"epochs": 200, "precision": "auto", "select": "best_test"},
    }
    found = baseline.model_dump(mode="json")
    for section, keys in expected.items():
        assert {key: found[section][key] for key in keys} == keys


ARCFACE = {
    **{"model.pretrained": True, "model.head": "cosine", "model.embedding_dim": 512},
    **{"loss.name": "arcface", "loss.scale": 8.0, "loss.margin": 0.35, "loss.gradient": "straight_through"},
}


@pytest.mark.parametrize(
    ("name", "published", "settings"),
    [
        ("resnet18-augment", (0.3648, None), {"augment.policy": "one_of"}),
        ("resnet18-wd01", (0.4012, None), {"optimizer.weight_decay": 0.1}),
        ("resnet18-lbsmooth", (0.4481, 59), {"loss.label_smoothing": 0.1}),
        ("resnet18-pretrained", (0.5670, None), {"model.pretrained": True}),
        ("resnet18-arcface", (0.5792, None), ARCFACE),
        ("resnet18-arcface-224", (0.7957, None), {**ARCFACE, "data.image_size": 224}),
        ("resnet50-arcface", (0.6176, None), {**ARCFACE, "model.backbone": "resnet50"}),
        ("resnet50-arcface-224", (0.8121, None), {**ARCFACE, "model.backbone": "resnet50", "data.image_size": 224}),
        (
            "resnet18-arcface-kd",
            (0.5737, None),
            {
                **ARCFACE,
                **{"distillation.teacher": "one to be named", "distillation.form": "plain"},
                **{"distillation.alpha": 0.7, "distillation.temperature": 4.0},
            },
        ),
    ],
)
def test_each_of_the_tutorials_presets_is_its_baseline_but_for(
    name: str, published: tuple[float, int | None], settings: dict[str, object]
) -> None:
    presets = dict(shipped_presets())
    found = presets[name]
    assert found.published is not None
    assert (found.published.top1, found.published.epoch) == published
    assert flat(found).items() >= settings.items()
    assert differences(found, presets["resnet18-baseline"]).keys() <= settings.keys()


def test_what_is_fixed_is_the_preset_and_the_same_repairs() -> None:
    presets = dict(shipped_presets())
    repairs = {
        **{"data.normalize": "backbone", "data.val_fraction": 0.1, "train.select": "best_val"},
        **{"schedule.name": "cosine", "schedule.warmup_epochs": 5.0, "augment.policy": "crop_flip"},
    }
    fixed = [name for name in presets if name.endswith("-fixed")]
    assert len(fixed) == 7
    for name in fixed:
        original = presets[name.removesuffix("-fixed")]
        exact = {"loss.gradient": "exact"} if original.loss.name == "arcface" else {}
        changes = {key: ours for key, (ours, _) in differences(presets[name], original).items()}
        assert changes == {**repairs, **exact}, name


def test_only_the_tutorials_presets_choose_on_the_test_set() -> None:
    for name, config in shipped_presets():
        of_the_tutorial = config.published is not None and config.published.source.startswith("tutorial")
        assert (config.train.select == "best_test") == of_the_tutorial, name


def test_what_is_expected_has_a_source_and_a_time() -> None:
    """And only figures that runs have shown have a deviation."""
    for name, config in shipped_presets():
        expected = config.expected
        if expected is None:
            continue
        assert config.published is None, name
        assert expected.source, name
        assert expected.time, name
        assert expected.runs > 1 or expected.deviation is None, name
        assert "expected.top1" not in flat(config), "it sets nothing, and no two presets differ in it"


def test_what_does_nothing_is_told(run_cli: Cli) -> None:
    """A key that tunes what is switched off is no mistake, for a preset may have it, and is not taken in silence."""
    plan = ("train", "--print-config", "--set", "augment.flip=alternating", "--set", "optimizer.momentum=0.8")
    outcome = run_cli(*plan)
    assert outcome.code == 0
    assert outcome.err.splitlines() == [
        "--set augment.flip does nothing here, for augment.policy is none",
        "--set optimizer.momentum does nothing here, for optimizer.name is adamw",
    ]
    assert run_cli(*plan, "--augment", "flip", "--optimizer", "sgd").err == ""


@pytest.mark.parametrize(
    ("name", "auxiliary", "reason"),
    [
        *(("adamw", "adamw", None), ("adamw", "sgd", None), ("muon", "adamw", None)),
        *(("sgd", "adamw", "optimizer.name is sgd"), ("muon", "sgd", "optimizer.auxiliary is sgd")),
    ],
)
def test_betas_are_of_the_optimizer_that_has_them(name: str, auxiliary: str, reason: str | None) -> None:
    settings = flat(Config.model_validate({"optimizer": {"name": name, "auxiliary": auxiliary}}))
    assert idle("optimizer.betas", settings) == reason


def test_keys_that_tune_are_keys() -> None:
    """As are the values at which they do."""
    settings = flat(Config())
    for key, conditions in TUNING.items():
        for other, values in conditions:
            section, _, leaf = other.partition(".")
            assert {key, other} <= settings.keys()
            assert values is None or values < set(
                get_args(getattr(schema, section.capitalize()).model_fields[leaf].annotation)
            ), key
