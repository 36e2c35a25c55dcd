"""Run folders: made once, never overwritten, read with suspicion."""

import contextlib
import csv
import errno
import inspect
import json
import os
import shutil
import sys
import threading
import unittest.mock
from pathlib import Path

import filelock
import pytest

from cifar100cli import atomic, checkpoint, choosing, runs
from cifar100cli.errors import CifarError, DataError, FolderError
from cifar100cli.runs import RunDir
from cifar100cli.schema import Config
from tests.conftest import last_run

ROW = {"train_loss": 1.0, "train_top1": 0.1, "seconds": 1.0, "images_per_second": 9.0}


def make_run(root: Path, epochs: int = 0, preset: str = "mine") -> RunDir:
    run = RunDir.create(root, preset, Config(seed=3), {"device": "cpu"})
    for epoch in range(1, epochs + 1):
        run.append_metrics({**ROW, "epoch": epoch})
    return run


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    made: list[RunDir] = []
    threads = [threading.Thread(target=lambda: made.append(make_run(tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({run.path for run in made}) == 8
    assert all("-seed3" in run.path.name and run.path.parent == tmp_path / "mine" for run in made)


def test_opens_what_it_made(tmp_path: Path) -> None:
    run = RunDir.open(make_run(tmp_path, epochs=2).path)
    assert (run.preset, run.config(), run.complete) == ("mine", Config(seed=3), False)
    assert [row["epoch"] for row in run.metrics()] == [1, 2]
    run.write_result({"test": 1})
    assert run.complete
    with pytest.raises(DataError, match=r"result\.json: preset is missing"):
        run.result()


def test_a_line_that_a_crash_cut_short(tmp_path: Path) -> None:
    run = make_run(tmp_path, epochs=3)
    with (run.path / runs.METRICS).open("a") as file:
        file.write('{"epoch": 4, "tra')
    assert len(run.metrics()) == 3
    run.forget_after(2)
    with (run.path / runs.TABLE).open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    assert [row["epoch"] for row in run.metrics()] == [1, 2]
    assert (run.path / runs.METRICS).read_text().count("\n") == 2


def test_lines_that_are_gone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing or broken before epoch 5"):
        make_run(tmp_path, epochs=3).forget_after(5)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (runs.ENVIRONMENT, "{", "not valid JSON"),
        (runs.ENVIRONMENT, "[]", "not a JSON object"),
        (runs.ENVIRONMENT, "[" * 100_000, "not valid JSON"),
        (runs.ENVIRONMENT, "{}", "format number"),
        (runs.ENVIRONMENT, json.dumps({"format": 99}), "newer cifar100"),
        (runs.CONFIG, "a: [", "not valid YAML"),
        (runs.CONFIG, "nope: 1", "unknown key"),
    ],
)
def test_broken_folders(tmp_path: Path, name: str, content: str, words: str) -> None:
    path = make_run(tmp_path).path
    (path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        RunDir.open(path).config()


@pytest.mark.parametrize("value", ["1e300", "-1e300", "9" * 400])
def test_a_figure_beyond_measure_ends_the_epochs(tmp_path: Path, value: str) -> None:
    """Means, curves and charts cannot be made of it."""
    run = make_run(tmp_path, epochs=2)
    lines = (run.path / runs.METRICS).read_text().splitlines()
    (run.path / runs.METRICS).write_text(f'{lines[0]}\n{lines[1][:-1]}, "val_top1": {value}}}\n')
    assert [row["epoch"] for row in run.metrics()] == [1]


def test_a_trackers_files_are_no_run(tmp_path: Path) -> None:
    """wandb keeps a `config.yaml` in a folder of its own, in the run's."""
    run = make_run(tmp_path)
    for name in ("wandb/run-20260101_120000-abcd/files", "tensorboard"):
        (run.path / name).mkdir(parents=True)
        (run.path / name / runs.CONFIG).write_text("_wandb: {value: {}}")
    (run.path / "wandb" / "latest-run").symlink_to(run.path / "wandb" / "run-20260101_120000-abcd")
    assert runs.find_runs(tmp_path) == [run.path]
    with pytest.raises(DataError, match=f"the latest run below it is {run.path}$"):
        RunDir.open(tmp_path)


def test_a_run_whose_lock_is_not_ours_holds_up_no_other(tmp_path: Path) -> None:
    mine, other = make_run(tmp_path), make_run(tmp_path)
    (other.path / runs.LOCK).mkdir()
    assert other.in_use
    assert last_run(tmp_path) == mine


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes there alone")
def test_folders_whose_names_are_no_text_hold_no_models(tmp_path: Path) -> None:
    """safetensors does not open a file there: that is better told before the first epoch than after the last."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    for root in (folder, folder / "runs"):
        with pytest.raises(FolderError, match=r"caf\\udce9 is not UTF-8"):
            runs.check_writable(root)
    runs.check_writable(tmp_path / "café")
    run = make_run(folder)
    (run.path / runs.MODEL).write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="is not UTF-8: rename it"):
        checkpoint.read(run.path / runs.MODEL)


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run folder"):
        RunDir.open(tmp_path / "none")
    with pytest.raises(DataError, match=r"not a run folder: it has no config\.yaml$"):
        RunDir.open(tmp_path)
    run = make_run(tmp_path)
    for path, words in (
        (run.path.parent, f"; the latest run below it is {run.path}"),
        (run.path / runs.CONFIG, "of a run; "),
    ):
        with pytest.raises(DataError, match=words):
            RunDir.open(path)


def test_last_is_the_unfinished_run_begun_last(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no unfinished run"):
        last_run(tmp_path)
    first, second, third = make_run(tmp_path, preset="other"), make_run(tmp_path), make_run(tmp_path)
    for written, run in enumerate((first, second, third)):  # maybe within one tick of the disk's clock
        os.utime(run.path / runs.CONFIG, (written, written))
    assert last_run(tmp_path) == third
    third.write_result({})
    assert last_run(tmp_path) == second
    assert last_run(tmp_path, "other").preset == "other"
    with pytest.raises(DataError, match="of nothing"):
        last_run(tmp_path, "nothing")


def test_the_same_run_may_differ_in_what_does_nothing(tmp_path: Path) -> None:
    """Momentum under AdamW; under SGD it is another run."""
    for name, found in (("adamw", True), ("sgd", False)):
        optimizer = {"name": name, "momentum": 0.5}
        run = RunDir.create(tmp_path, name, Config.model_validate({"optimizer": optimizer}), {})
        other = Config.model_validate({"optimizer": {**optimizer, "momentum": 0.9}})
        assert choosing.same_run(tmp_path, name, other, {}) == (run if found else None)
        assert choosing.same_run(tmp_path, name, run.config(), {}) == run
        assert choosing.same_run(tmp_path, name, other.model_copy(update={"seed": 1}), {}) is None


def test_the_same_run_is_a_complete_one_or_the_last_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_run(tmp_path), make_run(tmp_path)
    for written, run in enumerate((first, second)):
        os.utime(run.path / runs.CONFIG, (written, written))

    def same() -> RunDir | None:
        return choosing.same_run(tmp_path, "mine", Config(seed=3), {})

    assert same() == second, "from the start"
    with second.exclusively():
        assert same() == first
    second.append_metrics({**ROW, "epoch": 1})
    assert same() == first, "without its state, an epoch leads nowhere"
    (second.path / runs.STATE).touch()
    assert same() == second
    first.write_result({})
    assert same() == second, "what is no result is not taken"
    monkeypatch.setattr(RunDir, "result", lambda _: {})
    assert same() == first


def test_the_same_run_may_have_had_its_files_elsewhere(tmp_path: Path) -> None:
    """Its teacher and the weights that it began from are known by what is in them."""
    for name, key, recorded in (
        ("taught", {"distillation": {"teacher": "PLACE"}}, runs.TEACHER_DIGEST),
        ("begun", {"model": {"weights": "PLACE", "pretrained": True}}, runs.WEIGHTS_DIGEST),
    ):
        here, there = (
            Config.model_validate(json.loads(json.dumps(key).replace("PLACE", place))) for place in ("here", "there")
        )
        run = RunDir.create(tmp_path, name, here, {recorded: "abc"})
        assert choosing.same_run(tmp_path, name, there, {recorded: "abc"}) == run
        assert choosing.same_run(tmp_path, name, there, {recorded: "another"}) is None
        assert choosing.same_run(tmp_path, name, there, {}) is None, "nobody knows"
        old = RunDir.create(tmp_path, f"old {name}", here, {})
        assert choosing.same_run(tmp_path, f"old {name}", there, {}) is None, "nor of either"
        assert choosing.same_run(tmp_path, f"old {name}", here, {}) == old
        assert choosing.same_run(tmp_path, name, Config(), {recorded: "abc"}) is None, "without it is another run"


def test_a_teacher_is_where_it_was_seen_last(tmp_path: Path) -> None:
    """A place for a night is left again: then it is where it was before, if it is there."""
    places = [tmp_path / name for name in ("own", "first night", "second night")]
    config = Config.model_validate({"distillation": {"teacher": str(places[0])}})
    run = RunDir.create(tmp_path, "taught", config, {})
    for place in places[1:]:
        run.note_resumption({runs.TEACHER_PLACE: str(place)})

    def teacher() -> str | None:
        distillation = run.settings().distillation
        return distillation.teacher if distillation is not None else None

    assert teacher() == str(places[2]), "which is told as missing"
    for place in places:
        place.mkdir()
        assert teacher() == str(place)
    assert make_run(tmp_path).settings() == Config(seed=3)


def test_a_launch_goes_on_with_its_own_run(tmp_path: Path) -> None:
    """Not with one of other settings, whose launch happened to have the same name."""
    other = RunDir.create(tmp_path, "mine", Config(seed=3), {"launch": "none of process 1 on host"})
    other.write_result({})
    make_run(tmp_path)
    for seed, launch, expected in ((3, "none of process 1 on host", other), (3, "mine", None), (3, None, None)):
        assert choosing.begun_by(tmp_path, "mine", Config(seed=seed), launch) == expected
    assert choosing.begun_by(tmp_path, "mine", Config(seed=4), "none of process 1 on host") is None
    (other.path / runs.CONFIG).write_text("no settings")
    assert choosing.begun_by(tmp_path, "mine", Config(seed=3), "none of process 1 on host") is None


def test_what_was_otherwise_when_a_run_went_on_stands_beside_its_beginning(tmp_path: Path) -> None:
    """An older run has none of it, and in a run of somebody else anything may stand there."""
    run = RunDir.create(tmp_path, "mine", Config(), {"device": "cuda:0", "data_dir": "/a", "threads": 2})
    assert (run.each_time("device"), run.latest("device"), run.latest("nothing")) == (["cuda:0"], "cuda:0", None)
    begun = run.environment()
    run.note_resumption({"started": "1", "device": "cpu", "data_dir": "/a", "threads": 2})
    run.note_resumption({"started": "2", "device": "cuda:0", "data_dir": "/b", "threads": 4})
    resumed = [{"started": "1", "device": "cpu"}, {"started": "2", "data_dir": "/b", "threads": 4}]
    assert run.environment() == {**begun, "resumed": resumed}
    assert run.each_time("device") == ["cuda:0", "cpu", "cuda:0"]
    assert [run.latest(key) for key in ("device", "data_dir", "started")] == ["cuda:0", "/b", "2"]
    assert run.recorded("data_dir") == "/a"
    for odd in ("cpu", [1, None, {"device": ["cpu"]}, {"device": "\x1b[2J"}], {"device": "cpu"}, None):
        (run.path / runs.ENVIRONMENT).write_text(json.dumps({**begun, "resumed": odd}))
        assert "cpu" not in run.each_time("device")
        assert run.latest("device") == "cuda:0"
    (run.path / runs.ENVIRONMENT).write_text("{")
    assert run.latest("device") is None


def test_a_run_that_is_requeued_for_ever_remains_readable(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for number in range(runs.MOST_RESUMED + 2):
        run.note_resumption({"started": str(number)})
    assert len(run.environment()["resumed"]) == runs.MOST_RESUMED
    assert run.latest("started") == str(runs.MOST_RESUMED + 1)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic.write_text(path, "old")

    def fail() -> None:
        with atomic.replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o666 & ~atomic._umask()


def test_who_may_read_a_file_may_read_the_one_that_takes_its_place(tmp_path: Path) -> None:
    """A report that its owner has made private was everybody's when it was written again."""
    path = tmp_path / "file"
    for mode in (0o600, 0o640, 0o664):
        path.touch()
        path.chmod(mode)
        atomic.write_text(path, "new")
        assert path.read_text() == "new"
        assert path.stat().st_mode & 0o777 == mode


def in_use(monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> list[Path]:
    """Files of this name cannot be replaced at first; returns those that somebody tried to replace."""
    tried: list[Path] = []
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if target.name == name:
            tried.append(target)
            if len(tried) <= times:
                raise PermissionError(errno.EACCES, "Access is denied", str(self))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    return tried


def test_windows_is_asked_again_to_replace_a_file_that_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    atomic.write_text(path, "old")
    tried = in_use(monkeypatch, path.name, 2)
    with pytest.raises(PermissionError, match="Access is denied"):  # elsewhere it says that the folder is shut
        atomic.write_text(path, "new")
    assert (path.read_text(), len(tried)) == ("old", 1)
    monkeypatch.setattr(sys, "platform", "win32")
    atomic.write_text(path, "new")
    assert (path.read_text(), len(tried)) == ("new", 3)
    monkeypatch.setattr(atomic, "PATIENCE", 0.1)
    in_use(monkeypatch, path.name, 1000)
    with pytest.raises(PermissionError) as refusal:
        atomic.write_text(path, "newer")
    assert refusal.value.filename == str(path)
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def test_a_spreadsheet_with_the_table_open_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_use(monkeypatch, runs.TABLE, 1)
    run = make_run(tmp_path, epochs=1)
    assert not (run.path / runs.TABLE).exists()
    run.append_metrics({**run.metrics()[0], "epoch": 2})
    assert len(run.metrics()) == 2
    assert (run.path / runs.TABLE).read_text().count("\n") == 3


def test_the_last_lines_of_the_table_are_written_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_use(monkeypatch, runs.TABLE, 1)
    run = make_run(tmp_path, epochs=1)
    run.write_result({})
    assert (run.path / runs.TABLE).read_text().count("\n") == 2


def test_a_run_is_held_by_one_process(tmp_path: Path) -> None:
    first, second = make_run(tmp_path), make_run(tmp_path)
    with second.exclusively():
        assert second.in_use
        assert not first.in_use
        with pytest.raises(CifarError, match="another process is training"), RunDir(second.path).exclusively():
            pass
        assert last_run(tmp_path) == first
    assert not second.in_use
    assert last_run(tmp_path) == second
    assert not list(second.path.glob(".*"))


def test_jobs_that_are_started_together_go_on_with_a_run_each(tmp_path: Path) -> None:
    made = [make_run(tmp_path) for _ in range(3)]
    for written, run in enumerate(made):
        os.utime(run.path / runs.CONFIG, (written, written))
    said: list[str] = []
    with contextlib.ExitStack() as jobs:
        for run in reversed(made):
            assert jobs.enter_context(choosing.latest_unfinished(tmp_path, passed_over=said.append)) == run
            assert run.in_use
        in_use = f"{made[-1].path}: another process is training this run right now"
        assert said == [f"passed over: {in_use}", f"passed over: {in_use} (and 1 other)"]
        words = f"there is no other unfinished run of mine to resume: {in_use} \\(and 2 others\\)$"
        with pytest.raises(DataError, match=words):
            last_run(tmp_path, "mine")
    assert last_run(tmp_path) == made[-1]


def test_a_run_that_ends_as_it_is_chosen_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make_run(tmp_path), make_run(tmp_path)
    for written, run in enumerate((first, second)):
        os.utime(run.path / runs.CONFIG, (written, written))
    exclusively = RunDir.exclusively

    def ended(run: RunDir, patience: float) -> contextlib.AbstractContextManager[None]:
        if run == second:
            run.write_result({})
        return exclusively(run, patience)

    monkeypatch.setattr(RunDir, "exclusively", ended)
    assert last_run(tmp_path) == first


def test_a_run_that_somebody_removed_is_not_made_anew(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    shutil.rmtree(run.path)
    with pytest.raises(FolderError, match="is gone"), run.exclusively():
        pass
    assert not run.path.exists()


def test_lines_that_vanish_while_training(tmp_path: Path) -> None:
    run = make_run(tmp_path, epochs=2)
    (run.path / runs.METRICS).unlink()
    with pytest.raises(DataError, match="missing or broken before epoch 3"):
        run.append_metrics({"epoch": 3, "train_loss": 1.0})
    assert not (run.path / runs.METRICS).exists()
    run.path.rename(tmp_path / "elsewhere")  # which takes no line away
    with pytest.raises(FileNotFoundError):
        run.append_metrics({"epoch": 3, "train_loss": 1.0})


def test_a_lock_on_a_file_that_is_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has opened a file that its holder then removes must not go on beside one who has made a new file."""
    fcntl = pytest.importorskip("fcntl")
    run = make_run(tmp_path)
    holder, next_one = contextlib.ExitStack(), contextlib.ExitStack()
    holder.enter_context(run.exclusively())
    flock, overtaken = fcntl.flock, False

    def overtaking(file: int, operation: int) -> None:
        nonlocal overtaken
        if not overtaken:
            overtaken = True
            holder.close()
            next_one.enter_context(run.exclusively())
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", overtaking)
    with next_one, pytest.raises(FolderError, match="another process"), run.exclusively(patience=0.1):
        pass
    assert overtaken


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_mark_of_another_machine_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that cannot lock files, what a job leaves that was killed cannot be told from one that runs."""
    fcntl = pytest.importorskip("fcntl")
    if "holder" not in inspect.signature(filelock.Timeout).parameters:
        pytest.skip("this filelock does not name the holder")
    monkeypatch.setattr(
        fcntl, "flock", unittest.mock.Mock(side_effect=OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)))
    )
    run = make_run(tmp_path)
    (run.path / runs.LOCK).write_text("123\nanother-node\n")
    told = f"right now: pid 123 on another-node, .*; if that job is gone, remove {run.path / runs.LOCK}$"
    with pytest.raises(FolderError, match=told), run.exclusively(patience=0):
        pass
    (run.path / runs.LOCK).unlink()
    with run.exclusively():
        assert run.in_use
    assert not run.in_use


def test_a_stray_file_above_the_runs_hides_none(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (tmp_path / runs.CONFIG).write_text("seed: 1")
    assert run.path in runs.find_runs(tmp_path)
    assert last_run(tmp_path) == run


def test_links_are_followed_and_folders_refused(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    atomic.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        atomic.write_text(tmp_path / "folder", "x")
    with pytest.raises(OSError, match="nowhere/file"):
        atomic.write_text(tmp_path / "nowhere" / "file", "x")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with atomic.replacing(tmp_path / "pipe") as target:
        assert target == tmp_path / "pipe"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
