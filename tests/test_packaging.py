"""The package list, the folders on disk and the built wheel agree."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))
_TOOL = _PROJECT["tool"]["setuptools"]
_TOP = {"autoprune.envs": "envs", "autoprune.search_spaces": "search_spaces", "autoprune.kernels": "kernels"}


def _folders() -> dict[str, Path]:
    """Dotted name → folder of every package on disk; a folder of data alone is one as well."""
    found = {}
    for name, folder in {"autoprune": "autoprune", **_TOP}.items():
        root = _ROOT / folder
        for path in [root, *(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())]:
            dotted = ".".join((name, *path.relative_to(root).parts))
            if path.name != "__pycache__" and any(file.is_file() for file in path.iterdir()):
                found[dotted] = path
    return found


def _files() -> set[str]:
    """Every file that an installed package must hold, as its path inside the wheel."""
    return {
        "/".join((*dotted.split("."), path.name))
        for dotted, folder in _folders().items()
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".")
    }


def test_package_list_is_what_lies_on_disk() -> None:
    assert sorted(_TOOL["packages"]) == sorted(_folders())
    assert _TOOL["package-dir"] == _TOP


def test_links_inside_the_package_point_to_the_top_folders() -> None:
    for dotted, folder in _TOP.items():
        link = _ROOT.joinpath(*dotted.split("."))
        assert link.is_symlink()
        assert link.resolve() == (_ROOT / folder).resolve()


@pytest.mark.parametrize("name", sorted(_TOP.values()))
def test_bare_import_of_a_top_folder_is_refused(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"ImportError: import autoprune.{name}, not {name}" in done.stderr


def test_wheel_holds_every_module_and_asset(tmp_path: Path) -> None:
    source = tmp_path / "source"
    skipped = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "*.egg-info", "build", ".*_cache", "tests")
    shutil.copytree(_ROOT, source, symlinks=True, ignore=skipped)
    code = (
        "import setuptools.build_meta as backend; "
        "print(backend.build_wheel(" + repr(str(tmp_path)) + ").strip())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "absent from the `packages` configuration" not in done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    held = {name for name in names if name.startswith("autoprune/")}
    assert held == _files()
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert any(name.endswith("/fashion-mnist-LICENSE.txt") and "dist-info" in name for name in names)


def test_readme_names_the_commands_that_ci_and_make_run() -> None:
    readme = (_ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.split("<!-- test-command -->\n", 1)[1].split("```")[1]
    assert block.splitlines()[1:] == ["make test"]
    assert "make search" in readme
    makefile = (_ROOT / "Makefile").read_text(encoding="utf-8")
    for tool in ("pytest", "ruff check", "mypy --strict", "lint-imports"):
        assert tool in makefile


def test_ci_runs_the_readmes_command_in_an_environment_of_its_own(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(_ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    command = 'echo ran in "$VENV"\ntest ! -e "$VENV"\ncat'
    readme = f"text\n<!-- test-command -->\n```sh\n{command}\n```\n```sh\nfalse\n```\n"
    (tmp_path / "README.md").write_text(readme)
    done = subprocess.run([tmp_path / ".ci" / "run"], input="stdin", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    where = done.stdout.splitlines()[-1].removeprefix("ran in ")
    assert not where.startswith(str(tmp_path / ".venv"))
    assert not Path(where).exists()
    assert "stdin" not in done.stdout


@pytest.mark.parametrize(("readme", "code"), [("no marker\n", 1), ("<!-- test-command -->\n```sh\nexit 7\n```\n", 7)])
def test_ci_fails_when_the_command_fails_or_is_absent(tmp_path: Path, readme: str, code: int) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(_ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "README.md").write_text(readme)
    done = subprocess.run([tmp_path / ".ci" / "run"], capture_output=True, text=True, check=False)
    assert done.returncode == code
