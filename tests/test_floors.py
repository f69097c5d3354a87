"""What may import what, and how early."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

import autoprune

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


def test_core_imports_nothing_of_the_engine_above_it() -> None:
    modules = [f"autoprune.core.{path.stem}" for path in (_ROOT / "autoprune" / "core").glob("[a-z]*.py")]
    code = f"import sys, {', '.join(modules)}; print([m for m in sys.modules if m.startswith('autoprune.')])"
    loaded = _python(code)
    assert all(module in loaded for module in modules)
    rooms = {name.split(".")[1] for name in loaded.strip("[]\n").replace("'", "").split(", ")}
    assert rooms == {"core"}


def test_help_loads_nothing_heavy_and_answers_fast() -> None:
    code = (
        "import sys\nfrom autoprune.cli.main import run\nfor argv in (['--help'], ['search', '--help'], ['lut', '--help']):\n"
        f"    assert run(argv) == 0\nprint('loaded', set({_HEAVY!r}) & set(sys.modules))"
    )
    assert _python(code).strip().endswith("loaded set()")
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "autoprune.cli.main", "--help"], cwd=_ROOT, capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    bare = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", ""], check=True)
        bare.append(time.perf_counter() - start)
    # Half a second on an idle core; a core slowed by others slows Python's own start as well.
    assert min(times) < max(0.5, 20.0 * min(bare))


@pytest.mark.parametrize("name", ["attach", "convert", "LatencyTable", "Policy", "SearchSpace"])
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
    code = f"""
{imports}
import autoprune.core.errors
try:
    autoprune.search(budget="latency=50")
except autoprune.core.errors.BudgetError as error:
    print(error)
import autoprune.search.pipeline
assert callable(autoprune.search) and autoprune.search.pipeline.__name__ == "autoprune.search.pipeline"
"""
    assert "add a unit: 'latency=50%'" in _python(code)
