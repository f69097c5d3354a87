"""The search spaces that come with the package, by name; light enough for a command's help."""

from __future__ import annotations

from importlib import resources


def presets() -> list[str]:
    """Return the names of the search spaces that come with the package."""
    folder = resources.files("autoprune.search_spaces") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def preset_text(name: str) -> str:
    """Return a preset's YAML."""
    return (resources.files("autoprune.search_spaces") / "presets" / f"{name}.yaml").read_text("utf-8")
