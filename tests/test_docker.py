"""The container's scripts, against a `docker` that notes what it is asked, and the compose file beside them.

No engine is needed, and no image is built.
"""

import csv
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
VARIABLES = ("CIFAR100_DATA_DIR", "CIFAR100_RUNS_DIR", "CIFAR100_CACHE_DIR", "HF_HOME")

STUB = """import json, os, sys, time
with open(os.environ["STUB_LOG"], "a") as log:
    log.write(json.dumps([os.getpid(), sys.argv[1:], os.environ.get("DOCKER_BUILDKIT")]) + "\\n")
if sys.argv[1] == "version" and "STUB_NO_DAEMON" in os.environ:
    sys.exit("some advice\\nCannot connect to the Docker daemon")
if sys.argv[1] == "image" and "STUB_NO_IMAGE" in os.environ:
    sys.exit("Error: No such image")
if sys.argv[1] in ("run", "build"):
    time.sleep(float(os.environ.get("STUB_SECONDS", "0")))
    sys.exit(int(os.environ.get("STUB_EXIT", "0")))
"""


@dataclass
class Host:
    """A machine with few programs: the scripts' own tools, and, if it has them, docker and a GPU."""

    bin: Path
    home: Path
    log: Path

    def install(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def environment(self, **variables: str) -> dict[str, str]:
        return {"PATH": str(self.bin), "HOME": str(self.home), "STUB_LOG": str(self.log), **variables}

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [str(DOCKER / script), *arguments]
        environment = self.environment(**variables)
        return subprocess.run(
            command,
            env=environment,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of every `docker NAME` so far."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [arguments for _, arguments, _ in map(json.loads, lines) if arguments[0] == name]

    def only(self, name: str) -> list[str]:
        (call,) = self.calls(name)
        return call


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = Host(tmp_path / "bin", tmp_path / "home", tmp_path / "log")
    made.bin.mkdir()
    made.home.mkdir()
    if os.statvfs(tmp_path).f_flag & os.ST_NOEXEC:
        pytest.skip("temporary files are mounted noexec: TMPDIR names another folder")
    for tool in ("bash", "env", "dirname", "basename", "mkdir", "id", "cat", "chown"):
        found = shutil.which(tool)
        if found is None:
            pytest.skip(f"there is no {tool} here")
        (made.bin / tool).symlink_to(found)
    (tmp_path / "stub.py").write_text(STUB)
    made.install(
        "docker", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(tmp_path / "stub.py"))} "$@"\n'
    )
    return made


def train(host: Host, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`train.bash` with runs elsewhere than in this checkout."""
    return host.run("train.bash", *arguments, **{"CIFAR100_RUNS_DIR": str(host.home / "runs"), **variables})


def each(call: list[str], flag: str) -> list[str]:
    """The values of a flag that may be given more than once."""
    return [value for word, value in pairwise(call) if word == flag]


def mounts(call: list[str]) -> dict[str, dict[str, str]]:
    """Target: fields of each --mount, which are CSV."""
    rows = [dict(field.partition("=")[::2] for field in next(csv.reader([value]))) for value in each(call, "--mount")]
    return {row["target"]: row for row in rows}


def test_training_is_one_docker_run(host: Host) -> None:
    finished = train(host, "quickstart", "--epochs", "2")
    assert (finished.returncode, finished.stderr) == (0, "")
    call = host.only("run")
    image = call.index("cifar100:cpu")
    assert call[image + 1 :] == ["train", "--preset", "quickstart", "--epochs", "2"]
    options = call[:image]
    assert {"--rm", "--init", "--shm-size", "--stop-timeout"} <= set(options)
    assert not {"--gpus", "--tty", "--interactive", "--privileged"} & set(options)
    assert each(call, "--env") == ["NO_COLOR", "FORCE_COLOR", "OMP_NUM_THREADS"]


@pytest.mark.parametrize("teacher", [["--teacher", "runs/a/b"], ["--teacher=runs/a/b"]])
def test_a_teacher_means_distilling(host: Host, teacher: list[str]) -> None:
    assert train(host, "resnet18-arcface-kd", *teacher).returncode == 0
    call = host.only("run")
    assert call[call.index("cifar100:cpu") + 1 :] == ["distill", "--preset", "resnet18-arcface-kd", *teacher]


def test_a_path_for_cd_changes_nothing(host: Host) -> None:
    """With CDPATH, cd prints the folder that it finds."""
    assert train(host, "quickstart", CDPATH=f"{ROOT}:.", CIFAR100_RUNS_DIR="mine/runs").returncode == 0
    assert mounts(host.only("run"))["/cifar100/runs"]["source"] == str(host.home / "mine" / "runs")


def test_folders_are_the_tools_own_and_made_beforehand(host: Host) -> None:
    train(host, "quickstart")
    cache = host.home / ".cache"
    found = mounts(host.only("run"))
    assert {target: Path(row["source"]) for target, row in found.items()} == {
        "/cifar100/data": cache / "cifar100",
        "/cifar100/runs": host.home / "runs",
        "/cifar100/cache": cache / "cifar100" / "computed",
        "/cifar100/huggingface": cache / "huggingface",
    }
    assert all(row["type"] == "bind" and Path(row["source"]).is_dir() for row in found.values())


@pytest.mark.parametrize("name", ["plain", "a b", 'quo"te', "comma,comma", "colon:colon", "$(touch x)", "naïve"])
def test_odd_names_of_folders_arrive_whole(host: Host, name: str) -> None:
    folders = {variable: str(host.home / name / variable.lower()) for variable in VARIABLES}
    assert train(host, "quickstart", **folders).returncode == 0
    found = mounts(host.only("run"))
    assert sorted(row["source"] for row in found.values()) == sorted(folders.values())
    assert all(Path(folder).is_dir() for folder in folders.values())


def test_relative_folders_are_those_of_the_caller(host: Host) -> None:
    assert train(host, "quickstart", CIFAR100_RUNS_DIR="mine/runs").returncode == 0
    assert mounts(host.only("run"))["/cifar100/runs"]["source"] == str(host.home / "mine" / "runs")


def test_runs_are_in_this_repository_by_default(host: Host) -> None:
    copy = host.home / "clone"
    shutil.copytree(DOCKER, copy / "docker")
    (copy / "presets").mkdir()
    (copy / "presets" / "quickstart.yaml").touch()
    subprocess.run([copy / "docker" / "train.bash", "quickstart"], env=host.environment(), cwd=host.home, check=True)
    assert mounts(host.only("run"))["/cifar100/runs"]["source"] == str(copy / "runs")


def test_odd_arguments_arrive_whole(host: Host) -> None:
    odd = ["--set", "a.b=c d", "", "*", "$HOME", 'x"y', "--", "--gpu", "a\nb"]
    assert train(host, "quickstart", *odd).returncode == 0
    assert host.only("run")[-len(odd) :] == odd


def test_a_preset_of_ones_own_is_mounted(host: Host) -> None:
    (host.home / "a, b").mkdir()
    (host.home / "a, b" / "mine.yaml").write_text("seed: 1\n")
    assert train(host, "a, b/mine.yaml").returncode == 0
    call = host.only("run")
    assert call[-3:] == ["train", "--preset", "presets/mine.yaml"]
    row = mounts(call)["/cifar100/presets/mine.yaml"]
    assert row["source"] == str(host.home / "a, b" / "mine.yaml")
    assert "readonly" in row


@pytest.mark.parametrize("gpu", [True, False])
def test_a_gpu_is_used_where_there_is_one(host: Host, gpu: bool) -> None:
    host.install("nvidia-smi", f"#!{host.bin / 'bash'}\nexit {0 if gpu else 9}\n")
    train(host, "quickstart")
    call = host.only("run")
    kind = "gpu" if gpu else "cpu"
    assert f"cifar100:{kind}" in call
    assert each(call, "--gpus") == (["all"] if gpu else [])
    host.run("build.bash")
    assert f"cifar100:{kind}" in host.only("build")


def test_the_choice_of_the_user_comes_first(host: Host) -> None:
    host.install("nvidia-smi", f"#!{host.bin / 'bash'}\n")
    train(host, "--cpu", "quickstart")
    assert "cifar100:cpu" in host.only("run")
    assert "--gpus" not in host.only("run")


@pytest.mark.parametrize("code", [0, 2, 3, 130, 143])
def test_exit_codes_are_passed_on(host: Host, code: int) -> None:
    assert train(host, "quickstart", STUB_EXIT=str(code)).returncode == code
    assert host.run("build.bash", STUB_EXIT=str(code)).returncode == code


def test_signals_reach_docker_itself(host: Host) -> None:
    """The script becomes docker: nothing stands between a signal and it."""
    environment = host.environment(CIFAR100_RUNS_DIR=str(host.home / "runs"), STUB_SECONDS="60")
    with subprocess.Popen([DOCKER / "train.bash", "quickstart"], env=environment) as running:
        while not host.calls("run"):
            assert running.poll() is None
        pid = json.loads(host.log.read_text().splitlines()[-1])[0]
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=30) == -signal.SIGTERM
    assert pid == running.pid


def test_a_terminal_is_handed_on(host: Host) -> None:
    ours, theirs = pty.openpty()
    try:
        environment = host.environment(CIFAR100_RUNS_DIR=str(host.home / "runs"))
        for output in (theirs, subprocess.DEVNULL):
            subprocess.run(
                [DOCKER / "train.bash", "quickstart"], env=environment, stdin=theirs, stdout=output, check=True
            )
    finally:
        os.close(ours)
        os.close(theirs)
    on_terminal, in_pipe = host.calls("run")
    assert {"--interactive", "--tty"} <= set(on_terminal)
    assert not {"--interactive", "--tty"} & set(in_pipe)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a preset"),
        (["nope"], "nope: there is neither a preset nor a YAML file"),
        (["../presets/quickstart"], "there is neither a preset nor"),
        (["--epochs", "3", "quickstart"], "--epochs: options of `cifar100 train` come after the preset"),
    ],
)
def test_mistakes_are_refused_before_docker_is_asked(host: Host, arguments: list[str], said: str) -> None:
    finished = train(host, *arguments)
    assert finished.returncode == 2
    assert said in finished.stderr
    assert finished.stderr.count("\n") == 1
    assert not host.log.exists()
    assert not (host.home / "runs").exists()


@pytest.mark.parametrize("script", ["train.bash", "build.bash"])
def test_docker_that_is_missing_or_asleep(host: Host, script: str) -> None:
    arguments = ["quickstart"] if script == "train.bash" else []
    asleep = host.run(script, *arguments, STUB_NO_DAEMON="1")
    assert asleep.returncode == 1
    assert asleep.stderr.count("\n") == 1
    assert "is it started" in asleep.stderr
    assert asleep.stderr.endswith("Cannot connect to the Docker daemon\n")
    (host.bin / "docker").unlink()
    missing = host.run(script, *arguments)
    assert (missing.returncode, missing.stderr) == (
        1,
        f"docker/{script}: docker is not installed, or not on the PATH\n",
    )


def test_an_image_that_is_not_built_yet(host: Host) -> None:
    finished = train(host, "quickstart", STUB_NO_IMAGE="1")
    assert finished.returncode == 1
    assert "build it: " in finished.stderr
    assert "docker/build.bash --cpu" in finished.stderr
    assert not host.calls("run")
    assert not (host.home / "runs").exists()


@pytest.mark.parametrize("script", ["train.bash", "build.bash"])
def test_help_needs_no_docker(host: Host, script: str) -> None:
    (host.bin / "docker").unlink()
    finished = host.run(script, "--help")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.startswith(f"Usage: docker/{script}")
    assert all(variable in finished.stdout for variable in VARIABLES) or script == "build.bash"


def build_arguments(call: list[str]) -> dict[str, str]:
    return dict(value.partition("=")[::2] for value in each(call, "--build-arg"))


def test_building(host: Host) -> None:
    assert host.run("build.bash", "--cpu", "--pull").returncode == 0
    call = host.only("build")
    assert call[-2:] == ["--pull", str(ROOT)]
    assert call[call.index("--file") + 1] == str(DOCKER / "Dockerfile")
    own = (str(os.getuid() or 1000), str(os.getgid() if os.getuid() else 1000))
    assert build_arguments(call) == {"HOST_UID": own[0], "HOST_GID": own[1]}
    assert "--secret" not in call
    assert json.loads(host.log.read_text().splitlines()[-1])[2] == "1"


def test_bases(host: Host) -> None:
    host.run("build.bash", "--gpu")
    host.run("build.bash", "--gpu", "--base", "somewhere/pytorch:25.03-py3")
    default, named = map(build_arguments, host.calls("build"))
    tag = re.fullmatch(r"nvcr\.io/nvidia/pytorch:(\d+)\.(\d+)-py3", default["BASE"])
    assert tag is not None
    assert tuple(map(int, tag.groups())) >= (26, 4)  # the first with a PyTorch that pyproject.toml takes
    assert named["BASE"] == "somewhere/pytorch:25.03-py3"
    assert host.run("build.bash", "--base").returncode == 2


def test_sudo_is_not_root_in_the_container(host: Host) -> None:
    host.run("build.bash", SUDO_UID="4321", SUDO_GID="8765")
    host.run("build.bash", SUDO_UID="0", SUDO_GID="0")
    by_sudo, by_root = map(build_arguments, host.calls("build"))
    assert (by_sudo["HOST_UID"], by_sudo["HOST_GID"]) == ("4321", "8765")
    assert (by_root["HOST_UID"], by_root["HOST_GID"]) == ("1000", "1000")


def test_settings_of_pip_are_a_secret(host: Host) -> None:
    file = host.home / "pip.conf"
    file.write_text("[global]\n")
    assert host.run("build.bash", PIP_CONFIG_FILE=str(file)).returncode == 0
    call = host.only("build")
    assert call[call.index("--secret") + 1] == f"id=pip.conf,src={file}"
    assert host.run("build.bash", PIP_CONFIG_FILE=str(file) + "x").returncode == 2


# The compose file.


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)["services"]
    return found


def interpolate(text: str, variables: Mapping[str, str]) -> str:
    """${NAME} and ${NAME:-default}, from the inside out."""
    innermost = re.compile(r"\$\{(\w+)(?::-([^${}]*))?\}")
    while found := innermost.search(text):
        name, default = found.groups()
        text = text[: found.start()] + (variables.get(name) or default or "") + text[found.end() :]
    return text


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
@pytest.mark.parametrize("named", [True, False])
def test_compose_and_the_script_agree(host: Host, services: dict[str, Any], kind: str, named: bool) -> None:
    variables = {variable: str(host.home / variable.lower()) for variable in VARIABLES} if named else {}
    if not named:
        variables["CIFAR100_RUNS_DIR"] = str(host.home / "runs")
    train(host, f"--{kind}", "quickstart", **variables)
    call = host.only("run")
    service = services[kind]
    assert service["profiles"] == [kind]
    assert service["image"] == f"cifar100:{kind}"
    assert service["image"] in call
    told = {"HOME": str(host.home), **variables}
    shared = {volume["target"]: interpolate(volume["source"], told) for volume in service["volumes"]}
    assert shared == {target: row["source"] for target, row in mounts(call).items()}
    assert all(volume["bind"] == {"create_host_path": False} for volume in service["volumes"])
    flags = dict(pairwise(call))
    assert service["init"] is True
    assert service["shm_size"] == flags["--shm-size"]
    assert service["stop_grace_period"] == "1m"
    assert flags["--stop-timeout"] == "60"
    assert service["environment"] == each(call, "--env")
    devices = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    assert [device["count"] for device in devices] == ([flags["--gpus"]] if kind == "gpu" else [])


def test_compose_has_runs_where_the_script_has_them(services: dict[str, Any]) -> None:
    (source,) = [volume["source"] for volume in services["cpu"]["volumes"] if volume["target"] == "/cifar100/runs"]
    assert (DOCKER / interpolate(source, {})).resolve() == ROOT / "runs"


def test_git_checks_the_scripts_out_as_bash_reads_them(tmp_path: Path) -> None:
    """On Windows it is mostly set up to give texts CRLF."""
    (tmp_path / "docker").mkdir()
    for name in (".gitattributes", "docker/build.bash", "docker/train.bash"):
        shutil.copy(ROOT / name, tmp_path / name)
    for words in (
        ("init", "-q"),
        ("config", "core.autocrlf", "true"),
        ("add", "."),
        ("checkout-index", "-a", "--prefix=out/"),
    ):
        subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True)
    for script in ("build.bash", "train.bash"):
        assert (tmp_path / "out" / "docker" / script).read_bytes() == (ROOT / "docker" / script).read_bytes()
