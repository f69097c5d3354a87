"""Tables measured elsewhere: those inside the package, by name, and any other by its file."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from autoprune.core.errors import TableMismatch
from autoprune.core.layers import LayerSpec
from autoprune.core.policy import model_fingerprint
from autoprune.lut.table import LatencyTable

FOLDER = "tables"


def place_name(name: str) -> str:
    """Return a machine's short name for file names: ``h200`` of ``NVIDIA H200``."""
    short = re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia")).strip("-")
    return short or "device"


def embedded() -> dict[str, Path]:
    """Return the tables inside the package, by name without ending."""
    folder = Path(str(resources.files("autoprune.assets"))) / FOLDER
    return {path.stem: path for path in sorted(folder.glob("*.json"))} if folder.is_dir() else {}


def find_table(name: str, layers: tuple[LayerSpec, ...], batch: int) -> Path:
    """Return the file of a table: a path as it stands, or the embedded table of that name for a network and batch.

    Args:
        name: Path of a file, or the beginning of an embedded table's name, such as ``h200``.
        layers: Of the network that is searched.
        batch: Images per call.
    Raises:
        TableMismatch: There is no such file, no table of that name, or none for this network and batch.
    """
    path = Path(name)
    if path.exists() or path.suffix == ".json" or len(path.parts) > 1:
        return path
    known = embedded()
    found = [file for stem, file in known.items() if stem == name or stem.startswith(f"{name}-")]
    if not found:
        have = f"embedded tables: {', '.join(known)}" if known else "no table is embedded in this version"
        raise TableMismatch(
            f"--table {name}: no such file, and no embedded table of that name ({have}); measure one where the device "
            "is: autoprune lut build --device cuda --out FILE.json, and give that file."
        )
    fingerprint = model_fingerprint(layers)
    for file in found:
        table = LatencyTable.load(file)
        if table.whole is not None and table.whole.fingerprint == fingerprint and table.context.batch == batch:
            return file
    raise TableMismatch(
        f"--table {name}: none of {', '.join(file.stem for file in found)} is for this network at batch {batch}; "
        "give another --batch or --model, or measure one where the device is: autoprune lut build --device cuda."
    )
