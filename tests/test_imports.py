"""The README's table of files: each imports only from those before it, and the quick commands import no torch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "cifar100cli"


def in_order() -> list[str]:
    """The files of the README's table, in its order."""
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    table = readme.split("| about | files, and what lives there |\n")[1]
    _, *lines = table.split("\n\n")[0].splitlines()
    return [name for line in lines for name in re.findall(r"(?:^ |; )`(\w+)` ", line.split("|")[2])]


def imports_of(path: Path) -> set[str]:
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.stem == "__init__":  # gives names of upper levels when they are asked for, and imports none of them
        tree.body = [node for node in tree.body if not ast.unparse(node).startswith("if TYPE_CHECKING:")]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "cifar100cli":
            names = {alias.name for alias in node.names}
            found |= {name if (PACKAGE / f"{name}.py").exists() else "__init__" for name in names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cifar100cli."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("cifar100cli.")}
    return found


def test_imports_run_downward() -> None:
    names = in_order()
    upward = [
        f"{name} imports {other}"
        for place, name in enumerate(names)
        for other in imports_of(PACKAGE / f"{name}.py") - set(names[:place])
    ]
    assert not upward, "; ".join(upward)


def test_the_readme_says_what_lives_in_every_file() -> None:
    assert sorted(in_order()) == sorted(path.stem for path in PACKAGE.glob("*.py"))


def test_no_files_of_odds_and_ends() -> None:
    assert not {"utils", "helpers", "common", "misc"} & {path.stem for path in PACKAGE.glob("*.py")}


def test_quick_commands_import_no_torch(tmp_path: Path) -> None:
    """One process for all of them: what none imports together, none imports alone."""
    script = """
import sys
from cifar100cli import cli
for arguments in (["--help"], ["--version"], ["train", "--help"], ["report", "--help"],
                  ["presets"], ["presets", "resnet18-baseline"],
                  ["train", "--preset", "nope"], ["train", "--nope"], ["nope"], ["train", "--set", "a.b=1"],
                  ["train", "--lr", "x"], ["train", "--backbone", "resnet1888"], ["train", "--resume"],
                  ["finetune-cifar10", "--unfreeze", "layr3"], ["distill", "--preset", "quickstart"],
                  ["train", "--print-config"], ["train", "quickstart"], ["report", "nowhere"],
                  ["train", "--resume", "nowhere"], ["download", "--dataset", "x"], ["evaluate", "nowhere"],
                  ["train", "--preset", "resnet18-baseline", "--data-dir", "nowhere"]):
    sys.argv = ["cifar100", *arguments]
    try:
        cli.main()
    except SystemExit:
        pass
    reads_presets = "--help" not in arguments and "--version" not in arguments
    for heavy in ("torch", "timm", "torchvision", *([] if reads_presets else ["pydantic", "yaml"])):
        assert heavy not in sys.modules, (heavy, arguments)
"""
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert finished.returncode == 0, finished.stderr


def test_a_report_imports_no_torch(tmp_path: Path) -> None:
    """Of runs that are there, as a page with charts."""
    kept = PACKAGE.parent / "tests" / "kept"
    script = """
import sys
from cifar100cli import cli
try:
    cli.main()
finally:
    assert not {"torch", "timm", "torchvision"} & set(sys.modules)
"""
    command = [sys.executable, "-c", script, "report", str(kept), "--out", "report.html"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")
