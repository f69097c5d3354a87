"""The policy: which choice each layer gets, with everything needed to trust and replay it.

``policy.json`` is the only thing that crosses from search to training. Fields may be added in later schema versions;
files of every older version stay readable.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autoprune.core.choices import Channels, Choice, Dense, parse_choice
from autoprune.core.coupling import Coupling
from autoprune.core.errors import AutopruneError, PolicyError
from autoprune.core.layers import LayerSpec
from autoprune.core.rundir import write_text

SCHEMA_VERSION = 2


class Cost(BaseModel):
    """Cost of a policy; predicted from the table, or measured on the device. Ratios are of the dense network."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    latency_us: float | None = None
    dense_latency_us: float | None = None
    latency_ratio: float | None = None
    macs_ratio: float
    params_ratio: float


class Accuracy(BaseModel):
    """Top-1 accuracies in 0..1; all on validation data but the two test figures. None: not evaluated.

    Where the metric is ``agreement`` they are shares of the dense network's answers, with ``score`` the user's figures.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dense: float | None = None
    pruned: float | None = None
    tuned: float | None = None
    test: float | None = None
    dense_test: float | None = None


class Splits(BaseModel):
    """Which images a search used for what; calibration is a part of training, no other two share an image.

    Attributes:
        train: Images finalists were fine-tuned on; the first ``calibration`` of them gave the layers' input statistics.
        search: Images policies were compared on.
        validation: Images finalists were judged on.
        test: Images of the one closing figure.
        seed: Of the draw that made the splits; None where files or the user decided.
        sha256: Of the images of calibration, search and validation, in that order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: int
    calibration: int
    search: int
    validation: int
    test: int
    seed: int | None = None
    sha256: str


class PolicyFile(BaseModel):
    """The JSON form of a policy. Since version 2: ``metric`` and ``splits``."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    model: str
    model_fingerprint: str
    space: str
    table: str | None = None
    budget: str
    choices: dict[str, str]
    predicted: Cost
    measured: Cost | None = None
    accuracy: Accuracy = Field(default_factory=Accuracy)
    metric: str = "accuracy"
    splits: Splits | None = None
    context: dict[str, str | int | float] = Field(default_factory=dict)
    seed: int = 0
    versions: dict[str, str] = Field(default_factory=dict)
    trials: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Policy:
    """Layer → choice, with provenance.

    Attributes:
        choices: One choice per prunable layer, in execution order; layers not named stay dense.
        file: The record it is stored as.
    """

    choices: Mapping[str, Choice]
    file: PolicyFile = field(repr=False)

    @staticmethod
    def make(
        choices: Mapping[str, Choice],
        layers: Iterable[LayerSpec],
        *,
        model: str,
        budget: str = "none",
        coupling: Coupling | None = None,
    ) -> Policy:
        """Return a policy that was written by hand rather than searched."""
        specs = list(layers)
        record = PolicyFile(
            model=model,
            model_fingerprint=model_fingerprint(specs),
            space="custom",
            budget=budget,
            choices={name: choice.text for name, choice in choices.items()},
            predicted=Cost(
                macs_ratio=macs_ratio(specs, choices, coupling), params_ratio=params_ratio(specs, choices, coupling)
            ),
        )
        return Policy(dict(choices), record)

    @staticmethod
    def load(path: str | Path) -> Policy:
        """Read a policy file.

        Raises:
            PolicyError: Absent, truncated, of a newer schema, or with unknown or missing fields.
        """
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise PolicyError(f"policy {path}: cannot be read ({error.strerror}).") from None
        except ValueError as error:
            raise PolicyError(f"policy {path}: not complete JSON ({error}); restore it or search again.") from None
        return _validate(path, data)

    def save(self, path: str | Path) -> None:
        """Write the policy as JSON, atomically."""
        write_text(Path(path), self.file.model_dump_json(indent=2) + "\n")

    def choice(self, layer: str) -> Choice:
        """Return the layer's choice; ``Dense()`` for a layer the policy does not name."""
        return self.choices.get(layer, Dense())

    def check_model(self, layers: Iterable[LayerSpec]) -> None:
        """Refuse a model whose layers are not those the policy was made for.

        Raises:
            PolicyError: Naming the first layer that differs.
        """
        specs = list(layers)
        by_name = {layer.name: layer for layer in specs}
        for name, choice in self.choices.items():
            if name not in by_name:
                raise PolicyError(
                    f"policy is for model '{self.file.model}': its layer '{name}' is not in this model; "
                    "give the model it was searched for."
                )
            if not choice.fits(by_name[name]):
                raise PolicyError(f"policy is for another model: layer '{name}' here cannot take {choice.text}.")
        if self.file.model_fingerprint != model_fingerprint(specs):
            raise PolicyError(
                f"policy is for model '{self.file.model}' with other layer shapes than this one; "
                "give the model it was searched for."
            )


def _validate(path: Path, data: object) -> Policy:
    if not isinstance(data, dict):
        raise PolicyError(f"policy {path}: got a JSON {type(data).__name__}, want an object.")
    version = data.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise PolicyError(
            f"policy {path}: schema version {version} is newer than {SCHEMA_VERSION}, the newest this autoprune reads; "
            "upgrade autoprune."
        )
    try:
        record = PolicyFile.model_validate(data)
        choices = {name: parse_choice(text) for name, text in record.choices.items()}
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PolicyError(f"policy {path}: field '{where}': {first['msg']}.") from None
    except AutopruneError as error:
        raise PolicyError(f"policy {path}: {error}") from None
    return Policy(choices, record)


def model_fingerprint(layers: Iterable[LayerSpec]) -> str:
    """Return a short hash of the layers' names and shapes, the weights' values left out."""
    text = "\n".join(f"{layer.name} {layer.signature}" for layer in layers)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def macs_ratio(
    layers: Iterable[LayerSpec], choices: Mapping[str, Choice], coupling: Coupling | None = None
) -> float:
    """Return nominal MACs kept over dense MACs, conv and linear layers, batch 1.

    Args:
        layers: Of the whole network.
        choices: Layer → choice; layers not named are dense.
        coupling: Channel groups; without them channels count at the layer that writes them alone.
    """
    return _kept(list(layers), choices, coupling, by_macs=True)


def params_ratio(
    layers: Iterable[LayerSpec], choices: Mapping[str, Choice], coupling: Coupling | None = None
) -> float:
    """Return nominal weights kept over dense weights of conv and linear layers; arguments as of ``macs_ratio``."""
    return _kept(list(layers), choices, coupling, by_macs=False)


def _kept(
    layers: list[LayerSpec], choices: Mapping[str, Choice], coupling: Coupling | None, *, by_macs: bool
) -> float:
    smaller: Iterable[LayerSpec] = layers
    if coupling is not None and coupling.groups:
        smaller = coupling.resized(layers, choices)
        choices = {name: choice for name, choice in choices.items() if not isinstance(choice, Channels)}
    kept = total = 0.0
    for layer, own in zip(layers, smaller, strict=True):
        total += layer.macs if by_macs else layer.weights
        kept += (own.macs if by_macs else own.weights) * choices.get(layer.name, Dense()).density(layer)
    return kept / total if total else 1.0
