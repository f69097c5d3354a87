"""Flags that several commands share, each spelt and explained once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="Network to prune, by name.")]
Data = Annotated[str, typer.Option(help="Data set, by name.")]
DataDir = Annotated[Path | None, typer.Option(help="Folder that holds the full data set.")]
Space = Annotated[str, typer.Option(help="Search space: a preset's name or a YAML file.")]
Batch = Annotated[int, typer.Option(min=1, help="Images per forward pass of the deployed network.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads of the deployed network.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random draw.")]
Device = Annotated[str, typer.Option(help="Where the network is to be deployed: cpu or cuda.")]
Run = Annotated[str | None, typer.Option(help="Name of the run's folder.", show_default="made from the settings")]
RunsDir = Annotated[Path, typer.Option(help="Folder of all runs.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Set an existing run of this name aside and start over.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; everything else goes to stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
