"""``autoprune train``."""

from __future__ import annotations

import typer

from autoprune.cli import options


def train(debug: options.Debug = False) -> None:
    """Replay a policy in full training."""
    typer.echo(debug)
