"""The commands of the README and its records, run as they stand, block by block, in a folder that has what they name.

What a test cannot have is replaced below the command line: the data sets by a few drawn images, timm's hub by random
weights, the network by a server on this machine, and hours by presets that are made small after the flags are read.
"""

import contextlib
import gzip
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.distributed import run as torchrun

import cifar100cli
from cifar100cli import benchmark, config, datasets, download, models, options, synthetic, time_limit, timing
from cifar100cli.config import DEFAULT_PRESET, Override, Preset
from cifar100cli.datasets import Dataset, Split
from cifar100cli.runs import MODEL, RESULT
from tests import readme
from tests.conftest import Cli
from tests.readme import ROOT, Command
from tests.test_readme import flags_in
from tests.weather import BODY, MD5S, Server, make_tar, serving, sha256_of

# Runs that commands name, and one that is always there.
NAMED = re.compile(r"runs/([\w.-]+)/\d{8}-\d{6}-seed(\d+)")
FIRST = "runs/resnet18-baseline/20251231-100000-seed0"
UNFINISHED = "runs/quickstart/20251231-110000-seed0"

TEXT = readme.README.read_text(encoding="utf-8")
BLOCKS = [
    list(readme.commands(block))
    for path in (readme.README, *readme.RECORDS)
    for block in readme.blocks(path.read_text(encoding="utf-8"), "bash")
]
# Whole commands within sentences, each for itself; RUN is a run.
BLOCKS += [
    list(readme.commands(span.replace("RUN", FIRST)))
    for span in dict.fromkeys(readme.spans(TEXT))
    if re.match(r"cifar100 \S+ \S", span) and not re.search(r"\b(?!RUN\b)[A-Z]{2}|\.\.\.|[<|]", span)
]
COMMANDS = [command for block in BLOCKS for command in block]

# Who checks the commands that are not run here. A script of ours is seen to exist and to know the flags.
ELSEWHERE = {
    r"python3 -m pip install --quiet --upgrade --target \.uv uv": ".ci/run",
    r"\.uv/bin/uv build": ".ci/release",
    r"(python3? -m pip|uv pip|pip|pipx|uv tool) install .*|\.uv/bin/uvx .*": ".ci/release",  # tries both archives
    r"(ruff|mypy|pytest)\b.*": ".ci/run",
    r"git clone .*|cd .*": "README.md",
    r"cifar100 --(install|show)-completion.*": "tests/test_completion.py",
    r"docker .*": "tests/test_docker.py",
    r"docker/\w+\.bash.*": "tests/test_docker.py",
    r"\.ci/(lowest|release).*": ".ci/run",
    r"\.ci/image.*": "README.md",  # run by hand, where there is a docker
    r"python -m tests\.hollow": "tests/test_hollow.py",
    r"python -m tests\.kills.*": "tests/test_kills.py",
    r"python -m tests\.faults.*": "tests/test_faults.py",
    r"python -m tests\.fuzz.*": "tests/test_fuzz.py",
    r"python -m tests\.records.*": "tests/test_records.py",
    r"python -m tests\.(together|ordeal|readme).*": "README.md",  # run by hand
}


def is_run(command: Command) -> bool:
    """Whether it is ours, or torchrun's of ours."""
    return command.words[0] in ("cifar100", "torchrun") and _elsewhere(command) is None


def _elsewhere(command: Command) -> str | None:
    return next((file for pattern, file in ELSEWHERE.items() if re.fullmatch(pattern, str(command))), None)


@pytest.mark.parametrize("command", [command for command in COMMANDS if not is_run(command)], ids=str)
def test_other_commands_are_checked_elsewhere(command: Command) -> None:
    file = _elsewhere(command)
    assert file is not None, "say in ELSEWHERE who checks it"
    assert (ROOT / file).is_file()
    for word in command.words:
        assert (ROOT / word).exists() or not re.match(r"(docker|tests|\.ci)/", word), word
    script = re.match(r"python -m (tests)\.(\w+)|(docker|\.ci)/(\S+)", str(command))
    if script:
        known = flags_in(ROOT / script[1] / f"{script[2]}.py" if script[1] else ROOT / script[3] / script[4])
        if script[4] == "train.bash":  # which hands them on
            known |= readme.flags(readme.APP.commands["train"])
        assert {word for word in command.words if word.startswith("--")} <= known


# --------------------------------------------------------------------------------------------- stand-ins


def stand_in(patch: pytest.MonkeyPatch, drawings: synthetic.Drawn) -> None:
    """Replace data, weights and hours."""
    patch.setattr(synthetic, "draw", lambda: drawings)
    drawn = replace(datasets.load("synthetic", Path()), name="cifar100")
    patch.setattr(datasets, "find", lambda name, data_dir: data_dir)
    patch.setattr(datasets, "READERS", {"cifar100": lambda folder: drawn, "cifar10": lambda folder: _of_ten(drawn)})

    build = timm.create_model
    patch.setattr(timm, "create_model", lambda name, pretrained=False, **how: build(name, **how))
    patch.setattr(models, "_hub_answers", lambda: True)

    load = config.load_preset

    def load_small(name: str = DEFAULT_PRESET, overrides: Iterable[Override] = ()) -> Preset:
        return _small(load, name, list(overrides))

    patch.setattr(config, "load_preset", load_small)
    patch.setattr(time_limit, "within", lambda preset, *_: preset)
    patch.setattr(timing, "TURN", dict.fromkeys(timing.TURN, 0.0))
    patch.setattr(benchmark, "REPEATS", 1)
    patch.setattr(timing, "TEST_BATCHES", 1)


def _of_ten(dataset: Dataset) -> Dataset:
    train, test = (Split(split.images, split.labels % 10) for split in (dataset.train, dataset.test))
    return Dataset("cifar10", dataset.classes[:10], train, test)


def _small(load: Callable[[str, list[Override]], Preset], name: str, given: list[Override]) -> Preset:
    """The preset and what the user gave, which must be right as it is; then an epoch of few and small images.

    The network is timm's smallest, unless a flag names one. Weights that are named are put there.
    """
    real = load(name, given).config
    small: dict[str, object] = {"train.epochs": 1, "data.image_size": 32, "data.batch_size": 200}
    if real.data.first_image_size is not None:
        small["data.first_image_size"] = 16
    if real.schedule.milestones:
        small |= {"train.epochs": 2, "schedule.milestones": [1]}
    made = [Override(key, value, "the test") for key, value in small.items()]
    preset = load(name, [Override("model.backbone", "test_resnet", "the test"), *given, *made])
    model = preset.config.model
    if model.weights is not None and not Path(model.weights).exists():
        weights = timm.create_model(model.backbone).state_dict()
        if model.weights.endswith(".safetensors"):
            save_file(weights, model.weights)
        else:
            torch.save(weights, model.weights)
    return preset


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory: pytest.TempPathFactory, few_drawings: synthetic.Drawn) -> Path:
    """The runs that commands name, trained."""
    root = tmp_path_factory.mktemp("readme")
    named = [match[0] for command in COMMANDS for match in NAMED.finditer(str(command))]
    unfinished = [name for command in COMMANDS for word, name in pairwise(command.words) if word == "--resume"]
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch, few_drawings)
        for path in dict.fromkeys((FIRST, UNFINISHED, *named)):
            name, seed = re.fullmatch(NAMED, path).groups()  # type: ignore[union-attr]
            overrides: dict[str, object] = {"seed": int(seed)}
            if config.load_preset(name).config.distillation is not None:
                overrides["distillation.teacher"] = str(root / FIRST)
            preset = cifar100cli.load_preset(name, overrides)
            result = cifar100cli.train(preset, runs_dir=root / "runs", data_dir=root, device="cpu")
            Path(result["run_dir"]).rename(root / path)
            if path in (UNFINISHED, *unfinished):
                (root / path / RESULT).unlink()
    return root / "runs"


@pytest.fixture
def downloads(server: Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The archives' names and contents; they are small ones, which a server here has."""
    ten = gzip.compress(make_tar(folder=download.ARCHIVES["cifar10"].folder), mtime=0)
    bodies, archives = {"cifar100": BODY, "cifar10": ten}, {}
    for name, body in bodies.items():
        archive = download.ARCHIVES[name]
        url = server.url(f"/{archive.filename}", serving(body))
        archives[name] = replace(archive, url=url, size=len(body), sha256=sha256_of(body), files=MD5S)
    monkeypatch.setattr(download, "ARCHIVES", archives)
    return {archives[name].filename: body for name, body in bodies.items()}


def put_files(command: Command, downloads: Mapping[str, bytes]) -> None:
    """What a command names, in this folder: pictures, folders of pictures, models, archives."""
    picture = Image.new("RGB", (60, 40), "orange")
    for before, word in pairwise(command.words):
        path = Path(word)
        if re.search(r"\.(jpe?g|png|webp|gif|bmp)$", word, flags=re.IGNORECASE):
            picture.save(path)
        elif before not in ("--out", "--data-dir") and re.fullmatch(r"[\w.-]+/", word):
            path.mkdir(exist_ok=True)
            picture.save(path / "one.png")
        elif word.endswith(".safetensors") and before != "--weights" and not path.exists():
            shutil.copy(Path(FIRST) / MODEL, path)
        elif path.name in downloads and "://" not in word:
            path.write_bytes(downloads[path.name])


# ------------------------------------------------------------------------------------------------ running


@pytest.mark.parametrize(
    "block",
    [kept for block in BLOCKS if (kept := [command for command in block if is_run(command)])],
    ids=lambda block: str(block[0]),
)
def test_commands_run(
    block: list[Command],
    run_cli: Cli,
    runs_folder: Path,
    few_drawings: synthetic.Drawn,
    downloads: dict[str, bytes],
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    stand_in(monkeypatch, few_drawings)
    shutil.copytree(runs_folder, "runs")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    for command in block:
        put_files(command, downloads)
        arguments = _arguments(command, server.url("/mirror.tar.gz", serving(BODY)))
        if command.needs_gpu:
            check(arguments)
            continue
        with monkeypatch.context() as patch:
            for name, value in command.variables.items():
                patch.setenv(name, value)
            outcome = run_cli(*arguments)
        # The figures of such short runs are far from any that is published.
        assert outcome.code == (5 if "--check" in arguments else 0), f"{command}\n{outcome.err}"
        assert "the run goes on without it" not in outcome.err
        if "--json" in arguments:
            json.loads(outcome.out)
        if command.output is not None:
            Path(command.output).write_text(outcome.out, encoding="utf-8")


def _arguments(command: Command, mirror: str) -> list[str]:
    """What `cifar100` is given. What torchrun would start is one process here: see test_ranks.py for several."""
    words = list(command.words[1:])
    if command.words[0] == "torchrun":
        launch = torchrun.get_args_parser().parse_args(words)
        assert launch.module
        assert launch.training_script == "cifar100cli"
        words = launch.training_script_args
    return [mirror if re.match("https?://", word) else word for word in words]


def check(arguments: list[str]) -> None:
    """Read a command as Typer does, and the preset with its overrides; run nothing."""
    command = readme.APP.commands[arguments[0]]
    given = command.make_context(arguments[0], arguments[1:]).params
    if "settings" in given:
        config.load_preset(given["preset"] or DEFAULT_PRESET, options.overrides(given))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["train", "--preset", "resnet18-cifar", "--device", "cuda"], None),
        (["train", "--nope"], "No such option"),
        (["train", "--preset", "resnet18-nope"], "unknown preset"),
        (["bench", "--set", "augment.nope=1"], "unknown key"),
        (["distill", "--epochs", "many"], "must be a whole number"),
    ],
)
def test_what_needs_a_gpu_is_read(arguments: list[str], error: str | None) -> None:
    with contextlib.nullcontext() if error is None else pytest.raises(Exception, match=error):
        check(arguments)
