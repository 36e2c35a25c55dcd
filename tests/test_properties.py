"""What holds for every input that can be thought of, tried on generated ones; always the same ones."""

import contextlib
import functools
import gzip
import io
import json
import pickle
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_equal
from safetensors.torch import save_file

from cifar100cli import checkpoint, console, page, report, report_text, runs, unpack
from cifar100cli.analysis import read_predictions
from cifar100cli.card import KEY
from cifar100cli.config import load_preset
from cifar100cli.download import OFFICIAL
from cifar100cli.errors import CifarError, DataError, UsageError
from cifar100cli.optim import learning_rate
from cifar100cli.schema import Config, Schedule
from cifar100cli.unpickle import PickleError, read_pickle
from tests.test_checkpoint import make_card, make_model
from tests.test_report import make_run
from tests.weather import (
    BODY,
    HALF,
    Behaviour,
    Server,
    assert_complete,
    assert_one_line,
    claiming,
    dropping,
    from_too_far,
    good,
    in_broken_chunks,
    in_chunks,
    install,
    nonsense,
    serving,
    short_without_length,
    status,
    whole,
    whole_from_start,
    without_length,
)
from tests.weather import (
    page as web_page,
)


def trying(examples: int) -> settings:
    """The same inputs in every run; how long one takes depends on the machine."""
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=examples, derandomize=True, deadline=None, suppress_health_check=quiet, database=None)


def refusal(kind: type[CifarError], call: Callable[[], object]) -> CifarError | None:
    """The error of this kind that it ends in, if it does."""
    try:
        call()
    except kind as error:
        return error
    return None


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A fresh one for each input."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


# ------------------------------------------------------------------------------------------------ pickles


TEXT = st.text(max_size=8)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT | st.binary(max_size=8)
ARRAYS = st.builds(
    lambda shape, kind, order: np.arange(np.prod(shape)).reshape(shape).astype(kind, order=order),
    st.lists(st.integers(0, 4), min_size=1, max_size=4),
    st.sampled_from(["uint8", "int8", "<i2", ">i4", "int64", "bool"]),
    st.sampled_from("CF"),
)
VALUES = st.recursive(
    PLAIN | ARRAYS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(TEXT | st.binary(max_size=4), inner, max_size=4)
        | st.tuples(PLAIN, PLAIN)
    ),
    max_leaves=8,
)


@trying(100)
@given(VALUES, st.integers(0, 5))
def test_a_pickle_says_what_python_reads(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    found = read_pickle(data)
    expected = pickle.loads(data)  # noqa: S301 - made here
    assert type(found) is type(expected)
    assert_equal(found, expected)


NAMES = ("numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype", "_codecs encode", "os system")
PARTS = st.sampled_from(
    [
        *(
            b"(",
            b")",
            b"]",
            b"}",
            b"a",
            b"e",
            b"s",
            b"u",
            b"t",
            b"l",
            b"d",
            b"R",
            b"b",
            b"N",
            b"\x85",
            b"\x86",
            b"\x87",
        ),
        *(b"K\x01", b"K\x00", b"J\xff\xff\xff\xff", b"C\x04abcd", b"X\x02\0\0\0u1", b"X\x01\0\0\0|", b"Vlatin1\n"),
        *(b"q\x00", b"h\x00", b"q\x01", b"h\x01", b"\x94", b"\x88", b"\x93", b"I3\n", b"G" + bytes(8), b"\x8a\x01\x05"),
        *(f"c{name.replace(' ', chr(10))}\n".encode() for name in NAMES),
    ]
)


@trying(300)
@given(st.lists(PARTS, max_size=40).map(b"".join) | st.binary(max_size=80))
def test_any_pickle_is_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(PickleError):
        read_pickle(data + b".")


# ------------------------------------------------------------------------------------------------ presets


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
SECTIONS = {name: field for name, field in Config.model_fields.items() if name not in ("description", "seed")}
KEYS = [
    (section, key)
    for section, field in SECTIONS.items()
    for annotation in [field.annotation, *getattr(field.annotation, "__args__", ())]
    for key in getattr(annotation, "model_fields", {})
]


def nested(pairs: list[tuple[tuple[str, str], Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for (section, key), value in pairs:
        found.setdefault(section, {})[key] = value
    return found


NEARLY = st.lists(
    st.tuples(st.sampled_from(KEYS), JSON | st.sampled_from([1, 0.5, "arcface", "cosine", True])), max_size=3
)


@trying(100)
@given(st.dictionaries(st.sampled_from([*Config.model_fields, "x"]) | TEXT, JSON, max_size=3) | NEARLY.map(nested))
def test_any_yaml_is_a_preset_or_refused_in_one_line(content: Any) -> None:
    with folder() as here:
        path = here / "mine.yaml"
        path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
        refused = refusal(UsageError, lambda: load_preset(str(path)))
        text = str(refused or "").replace(str(path), "")
        assert len(text) < 600
        assert "\n" not in text


def test_a_line_is_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """What an error quotes may hold anything; the terminal gets one line without its escape codes."""
    console.error("a key \x1b[31m\n\u2028\x85 of \ud800 mine")
    (line,) = capsys.readouterr().err.split("\n")[:-1]
    assert line.isprintable()


def number(low: float, high: float, exclude_min: bool = False, exclude_max: bool = False) -> st.SearchStrategy[float]:
    return st.floats(low, high, exclude_min=exclude_min, exclude_max=exclude_max)


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
VALID = st.fixed_dictionaries(
    {},
    optional={
        "description": WORDS,
        "seed": st.integers(0, 2**32 - 1),
        "published": st.fixed_dictionaries({"top1": number(0, 1), "source": TEXT.filter(str.isprintable)}),
        "data": st.fixed_dictionaries(
            {
                "fraction": number(0, 1, exclude_min=True),
                "val_fraction": number(0, 0.9),
                "batch_size": st.integers(1, 65536),
            }
        ),
        "model": st.fixed_dictionaries({"backbone": WORDS}),
        "optimizer": st.fixed_dictionaries(
            {
                "lr": number(0, 100, exclude_min=True),
                "weight_decay": number(0, 10),
                "betas": st.tuples(number(0, 1, exclude_max=True), number(0, 1, exclude_max=True)).map(list),
            }
        ),
        "schedule": st.fixed_dictionaries({"warmup_epochs": number(0, 100_000)}),
        "finetune": st.fixed_dictionaries({"unfreeze": st.sampled_from(["fc", "1", "no", "null", "1e3", "~", " a "])}),
    },
)


@trying(60)
@given(VALID)
def test_a_preset_comes_back_as_it_was_written(content: dict[str, Any]) -> None:
    if "finetune" in content:  # the stages of the usual ResNets are known by name
        content = {**content, "model": {**content.get("model", {}), "backbone": "test_resnet"}}
    config = Config.model_validate(content)
    with folder() as here:
        (here / "mine.yaml").write_text(config.to_yaml(), encoding="utf-8")
        assert load_preset(str(here / "mine.yaml")).config == config


# ----------------------------------------------------------------------------------------------- archives


MEMBERS = st.tuples(
    st.sampled_from(
        ["in", "in/a", "in/b", "in/c", "in/./a", "in//b", "in/a/b", "../a", "in/../a", "/in/a", "x", "in/.."]
    ),
    st.sampled_from([tarfile.REGTYPE] * 12 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]),
    st.binary(max_size=5),
)


@trying(150)
@given(st.lists(MEMBERS, max_size=4), st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]))
def test_an_archive_is_taken_when_every_rule_holds(members: list[tuple[str, bytes, bytes]], kind: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, sort, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = sort, "a"
            info.size = len(content) if sort == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(content))
    paths = [PurePosixPath(name) for name, _, _ in members]
    plain = all(sort in (tarfile.REGTYPE, tarfile.DIRTYPE) for _, sort, _ in members)
    inside = all(path.parts[0] == "in" and ".." not in path.parts for path in paths)
    wanted = {
        path.name: content
        for path, (_, sort, content) in zip(paths, members, strict=True)
        if sort == tarfile.REGTYPE and str(path) in ("in/a", "in/b")
    }
    right = plain and inside and len(set(paths)) == len(paths) and set(wanted) == {"a", "b"}
    with folder() as here:
        (here / "out").mkdir()
        (here / "archive").write_bytes(gzip.compress(buffer.getvalue()))
        archive, out = here / "archive", here / "out"
        refused = refusal(
            DataError, lambda: unpack.unpack(archive, "archive", "in", ["a", "b"], out, lambda done, total: None)
        )
        assert (refused is None) == right
        assert str(refused).isprintable()
        if right:
            assert {path.name: path.read_bytes() for path in out.iterdir()} == wanted
        assert {path.name for path in here.iterdir()} == {"out", "archive"}


# ------------------------------------------------------------------------------------- models and run folders


DESCRIBED = make_card().model_dump(mode="json")


@trying(25)
@given(st.dictionaries(st.sampled_from([*DESCRIBED, "best_epoch", "x"]), JSON, max_size=3) | JSON)
def test_any_description_is_a_models_or_refused(changes: Any) -> None:
    """Whatever a file says of itself; what it says of the network is left as it is, to be quick."""
    about = {**DESCRIBED, **changes} if isinstance(changes, dict) else changes
    if isinstance(about, dict):
        about["config"] = DESCRIBED["config"]
    with folder() as here:
        path = here / "model.safetensors"
        state = {name: tensor.contiguous() for name, tensor in STATE.items()}
        save_file(state, path, {KEY: json.dumps(about)})
        for reader in (checkpoint.load_model, checkpoint.read_state):
            refused = refusal(DataError, functools.partial(reader, path))
            assert "\n" not in str(refused)


STATE = make_model().state_dict()
FIGURES = st.sampled_from(["epoch", "train_loss", "train_top1", "val_top1", "test_top1", "test_loss", "seconds", "x"])
NUMBERS = st.floats() | st.integers(-3, 10**20) | st.just(None) | JSON
ROW = st.dictionaries(FIGURES, NUMBERS, max_size=3)
RESULT = st.dictionaries(
    st.sampled_from(["test", "best", "seed", "select", "device", "epochs", "ranks", "seconds"]), JSON, max_size=2
)


@trying(30)
@given(
    st.lists(ROW, max_size=3),
    RESULT,
    st.dictionaries(TEXT | st.sampled_from(["preset", "device_name"]), JSON, max_size=2),
)
def test_any_run_is_reported(rows: list[dict[str, Any]], result: dict[str, Any], environment: dict[str, Any]) -> None:
    with folder() as here:
        run = make_run(here, "resnet18-baseline", 0.44)
        measured = {"train_loss": 1.0, "train_top1": 0.1, "seconds": 1, "images_per_second": 1}
        lines = [json.dumps({"epoch": epoch, **measured, **row}) for epoch, row in enumerate(rows, start=1)]
        (run.path / runs.METRICS).write_text("\n".join(lines))
        for name, changes in ((runs.RESULT, result), (runs.ENVIRONMENT, environment)):
            content = json.loads((run.path / name).read_text())
            (run.path / name).write_text(json.dumps({**content, **changes}))
        found = report.collect([here])
        assert len(found.rows) + len(found.unusable) == 1
        for form in ("json", "csv", "markdown", "table"):
            report_text.render(found, form)
        if len(lines) == 2:  # its charts take their time
            page.render(found)


@trying(100)
@given(
    st.lists(
        st.tuples(*[st.sampled_from(["0", "1", "2", "a", "b", "", "0.5", "nan", "-1", '"', "\n", "\0"])] * 5),
        max_size=3,
    )
)
def test_any_predictions_are_read_or_refused(rows: list[tuple[str, ...]]) -> None:
    with folder() as here:
        path = here / "file.csv"
        head = "index,true,predicted,confidence,correct\n"
        path.write_text(head + "".join(",".join(row) + "\n" for row in rows), encoding="utf-8")
        with contextlib.suppress(DataError):
            found = read_predictions(path, ["a", "b"])
            assert len(found) == len(rows)
            assert ((found.confidence >= 0) & (found.confidence <= 1)).all()


# ---------------------------------------------------------------------------------------------- downloads


WRONG = BODY[:-20] + bytes(20)
WEATHER: list[Behaviour] = [
    *(good, whole, whole_from_start, from_too_far, in_chunks, in_broken_chunks, without_length, short_without_length),
    *(
        nonsense,
        web_page,
        status(429),
        status(503),
        status(404),
        status(416),
        status(302, Location="/a"),
        serving(WRONG),
    ),
    *(dropping(HALF), dropping(HALF + 9), dropping(len(BODY) - 1), dropping(1), claiming(f"bytes {HALF}-9/*")),
    serving(gzip.compress(BODY), **{"Content-Encoding": "gzip"}),
]


@pytest.mark.usefixtures("waits")
@trying(60)
@given(st.lists(st.integers(0, len(WEATHER) - 1), min_size=1, max_size=6), st.booleans())
def test_any_weather_ends_with_the_right_bytes_or_one_line(server: Server, chosen: list[int], known: bool) -> None:
    url = server.url("/a", *(WEATHER[number] for number in chosen))
    server.exchanges.clear()
    with folder() as here:
        refused = refusal(CifarError, lambda: install(here, url, retries=3, sha256=OFFICIAL if known else None))
        if refused is None:
            assert_complete(here)
        else:
            assert_one_line(refused)
            assert refused.exit_code in (1, 3)
            assert list(here.glob("cifar-100-python")) == []
    assert len(server.exchanges) < 30


# ----------------------------------------------------------------------------------------- training's numbers


@trying(150)
@given(
    st.floats(1e-12, 100),
    st.sampled_from(["constant", "cosine"]),
    st.floats(0, 100_000),
    st.integers(1, 10_000),
    st.integers(1, 100_000),
    st.floats(0, 1, exclude_max=True),
)
def test_the_rate_stays_between_nothing_and_its_peak(
    peak: float, name: Any, warmup: float, steps: int, epochs: int, share: float
) -> None:
    schedule = Schedule(name=name, warmup_epochs=warmup)
    step = int(share * steps * epochs)
    rate = learning_rate(peak, schedule, step, steps, epochs)
    assert 0 <= rate <= peak
    assert rate > 0 or step == steps * epochs
