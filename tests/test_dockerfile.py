"""The Dockerfile and what it is made with, read as docker reads them; linted where there are linters."""

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.test_docker import DOCKER, ROOT, VARIABLES

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def instructions() -> list[tuple[str, str]]:
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]  # type: ignore[misc]


def values(name: str) -> list[str]:
    return [value for instruction, value in instructions() if instruction == name]


def environment() -> dict[str, str]:
    return dict(pair.partition("=")[::2] for value in values("ENV") for pair in value.split())


def test_bases_are_arguments_and_pinned() -> None:
    defaults = dict(value.partition("=")[::2] for value in values("ARG"))
    assert [value.split()[0] for value in values("FROM")] == ["${PYTHON}", "${BASE}"]
    assert defaults["BASE"] == "${PYTHON}"
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", defaults["PYTHON"])


def test_the_user_is_not_root() -> None:
    defaults = dict(value.partition("=")[::2] for value in values("ARG"))
    assert values("USER") == ["${HOST_UID}:${HOST_GID}"]
    assert int(defaults["HOST_UID"]) > 0
    assert any('test "${HOST_UID}" -ne 0' in value for value in values("RUN"))


def test_no_secrets_and_nothing_from_afar() -> None:
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    assert not values("ADD")
    assert "://" not in text
    assert not re.search(r"token|password\b(?!,)|api_?key", " ".join(values("ARG") + values("ENV")), re.IGNORECASE)
    installing = [
        value
        for value in values("RUN")
        if "pip install" in value and "--no-index --no-cache-dir --no-deps /d" not in value
    ]
    assert installing
    assert all("--mount=type=secret,id=pip.conf" in value for value in installing)
    assert not values("COPY")[0].startswith(".")


def test_what_pip_installs_is_pinned() -> None:
    installs = re.findall(r"pip install ([^;&|]*)", " ".join(values("RUN")))
    assert len(installs) == 5
    for arguments in installs:
        named = [word for word in arguments.split() if not word.startswith("-")]
        by_file = re.search(r"--(constraint|requirement) /tmp/\w+\.txt", arguments)
        assert by_file or "--no-index" in arguments or all("==" in word for word in named), arguments
        assert "--no-cache-dir" in arguments
    pins = [line for line in (DOCKER / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.match(r"[a-z0-9-]+==[\w.]+( ;|$)", line) for line in pins)
    assert not any("://" in line for line in pins)


def pinned(python: str) -> dict[str, str]:
    """The image's versions on 64-bit Intel machines with this Python."""
    lines = (DOCKER / "requirements.txt").read_text().splitlines()
    machine = {"sys_platform": "linux", "platform_machine": "x86_64", "python_full_version": f"{python}.0"}
    found = {}
    for requirement in (Requirement(line) for line in lines if not line.startswith("#")):
        if requirement.marker is None or requirement.marker.evaluate(machine):
            assert requirement.name not in found
            found[requirement.name] = str(requirement.specifier).removeprefix("==")
    return found


@pytest.mark.parametrize("python", ["3.12", "3.13"])
def test_the_pins_are_what_pyproject_asks_for(python: str) -> None:
    versions = pinned(python)
    for requirement in map(Requirement, PROJECT["dependencies"]):
        assert requirement.specifier.contains(versions[requirement.name]), requirement


def test_the_bases_own_pytorch_stays_where_pyproject_allows_it() -> None:
    (asked,) = re.findall(r'--no-index --no-cache-dir --no-deps ("torch.*?);', " ".join(values("RUN")))
    bounds = [entry for entry in PROJECT["dependencies"] if entry.startswith("torch")]
    assert re.findall(r'"([^"]+)"', asked) == bounds
    # And nothing that belongs to it is installed beside it.
    (pattern,) = re.findall(r"sed -E '/(.*)/d'", " ".join(values("RUN")))
    left = {name for name, version in pinned("3.12").items() if not re.search(pattern, f"{name}=={version}")}
    assert not {name for name in left if name.startswith(("torch", "nvidia", "cuda", "triton"))}
    assert left >= {"numpy", "timm", "huggingface-hub", "sympy"}


def test_folders_of_the_image() -> None:
    found = environment()
    # Of runs nothing is said: they go to runs in the folder at hand, and runs/... is the same inside and outside.
    runs = f"{values('WORKDIR')[-1]}/runs"
    folders = [found.get(variable, runs) for variable in VARIABLES]
    assert "CIFAR100_RUNS_DIR" not in found
    assert json.loads(values("VOLUME")[0]) == folders
    made = next(value for value in values("RUN") if "install --directory" in value)
    assert all(folder in made.split() for folder in folders)
    assert values("ENTRYPOINT") == ['["cifar100"]']


def ignored(path: str) -> bool:
    """As docker: the last pattern that fits a path, or a folder above it, decides."""
    result = False
    parts = path.split("/")
    above = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            for folder in above:
                name = folder.split("/")[-1] if pattern.startswith("**/") else folder
                if name.count("/") == pattern.removeprefix("**/").count("/") and fnmatch.fnmatch(
                    name, pattern.removeprefix("**/")
                ):
                    result = not line.startswith("!")
    return result


def test_what_docker_is_sent() -> None:
    for value in values("COPY"):
        *sources, _ = value.split()
        assert all((ROOT / source).exists() and not ignored(source) for source in sources)
    assert not ignored("docker/requirements.txt")
    assert not ignored("cifar100cli/page.html.jinja")
    kept_out = (".git", ".venv/bin/python", ".uv", "runs/x/model.safetensors", "data", "uv.lock", "tests/test_cli.py")
    assert all(map(ignored, (*kept_out, ".env", "docker/train.bash", "cifar100cli/__pycache__/cli.cpython-312.pyc")))


# Linters, where there are some.


@pytest.mark.parametrize(
    "command", [["hadolint", "Dockerfile"], ["shellcheck", "build.bash", "train.bash"]], ids=lambda command: command[0]
)
def test_linters_find_nothing(command: list[str]) -> None:
    beside_python = Path(sys.executable).parent / command[0]
    tool = str(beside_python) if beside_python.exists() else shutil.which(command[0])
    if tool is None:
        pytest.skip(f"{command[0]} is not installed here")
    finished = subprocess.run([tool, *command[1:]], cwd=DOCKER, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout) == (0, "")
