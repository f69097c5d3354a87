"""What may import what, and how early."""

from __future__ import annotations

import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from torch import nn

import autoprune
from autoprune.core.errors import BudgetError

_ROOT = Path(__file__).parent.parent
_HEAVY = ("torch", "numba", "optuna", "scipy", "plotly", "pandas", "onnxruntime", "stable_baselines3")


def _python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_LOADED = f"import sys; print(sorted(set({_HEAVY!r}) & set(sys.modules)))"


@pytest.mark.parametrize(
    "code",
    [
        "import autoprune; autoprune.__version__; dir(autoprune)",
        "import autoprune.search, autoprune.kernels, autoprune.lut, autoprune.trainers",
        "import autoprune.core.policy, autoprune.core.result, autoprune.core.budget",
        "import autoprune; autoprune.Policy",
        "import autoprune.cli.main",
    ],
)
def test_light_imports_load_nothing_heavy(code: str) -> None:
    assert _python(f"{code}\n{_LOADED}").strip() == "[]"


def test_every_room_has_its_floor() -> None:
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = project["tool"]["importlinter"]["contracts"]
    floors = {room.strip() for floor in contract["layers"] for room in floor.split("|")}
    rooms = {name for name in project["tool"]["setuptools"]["packages"] if name.count(".") == 1}
    assert floors == rooms - {"autoprune.assets"}  # assets hold no code


def test_core_imports_nothing_of_the_engine_above_it() -> None:
    modules = [f"autoprune.core.{path.stem}" for path in (_ROOT / "autoprune" / "core").glob("[a-z]*.py")]
    code = f"import sys, {', '.join(modules)}; print([m for m in sys.modules if m.startswith('autoprune.')])"
    loaded = _python(code)
    assert all(module in loaded for module in modules)
    rooms = {name.split(".")[1] for name in loaded.strip("[]\n").replace("'", "").split(", ")}
    assert rooms == {"core"}


def test_help_loads_nothing_heavy_and_answers_fast() -> None:
    code = f"""
from autoprune.cli.main import run
assert [run([*command, "--help"]) for command in ([], ["search"], ["lut"], ["bench"])] == [0, 0, 0, 0]
{_LOADED}
"""
    assert _python(code).splitlines()[-1] == "[]"
    assert min(_cpu_seconds("-m", "autoprune.cli.main", "--help") for _ in range(3)) < 0.5


def _cpu_seconds(*arguments: str) -> float:
    """Processor time of one Python run: what it takes on an idle core, however busy this one is."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], cwd=_ROOT, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("name", sorted({*autoprune.__all__} - {"__version__", "search"}))
def test_names_of_the_package_are_fetched_when_used(name: str) -> None:
    assert name in dir(autoprune)
    value = getattr(autoprune, name)
    assert getattr(sys.modules[value.__module__], name) is value
    assert value is getattr(autoprune, name)


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'autoprune' has no attribute 'serach'"):
        autoprune.serach  # noqa: B018


@pytest.mark.parametrize(
    "imports",
    [
        "import autoprune",
        "import autoprune, autoprune.search",
        "import autoprune.search",
        "import autoprune; autoprune.search; import autoprune.search.pipeline",
        "import autoprune.search.pipeline, autoprune",
        "from autoprune import search; import autoprune",
    ],
)
def test_search_is_callable_in_every_import_order(imports: str) -> None:
    # A light stand-in for the pipeline: what is tested is who answers to the name, not the search.
    code = f"""
import sys, types
pipeline = types.ModuleType("autoprune.search.pipeline")
pipeline.search = lambda *args, **kwargs: (args, kwargs)
sys.modules[pipeline.__name__] = pipeline
{imports}
assert autoprune.search(1, budget="x") == ((1,), {{"budget": "x"}})
import autoprune.search.base, autoprune.search
assert autoprune.search(1, budget="x") == ((1,), {{"budget": "x"}})
assert autoprune.search.base.__name__ == "autoprune.search.base"
"""
    _python(code)


def test_search_reaches_the_real_pipeline() -> None:
    with pytest.raises(BudgetError, match="add a unit"):
        autoprune.search(nn.Identity(), budget="latency=50")
