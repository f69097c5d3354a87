"""What is tried of every network, one function a stage: each returns what it found in a few words, or raises."""

from __future__ import annotations

import copy
import importlib.util
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autoprune.core.choices import Channels, Choice, Dense
from autoprune.core.layers import LayerSpec
from autoprune.kernels.convert import DeployedModel, PlannedModel, convert
from autoprune.lut.deploy import masked_copy
from autoprune.search_spaces.space import SearchSpace, load_space
from autoprune.search_spaces.trace import trace_report
from autoprune.tasks.networks import untrained
from autoprune.tasks.outputs import main_output
from autoprune.trainers.session import attach

# A converted network's outputs differ from the masked one's by the order of summation.
TOLERANCE = 1e-4


@dataclass
class Subject:
    """A network on its way through the stages."""

    name: str
    model: nn.Module
    example: Tensor
    layers: tuple[LayerSpec, ...] = ()
    space: SearchSpace | None = None
    choices: dict[str, Choice] = field(default_factory=dict)
    masked: nn.Module | None = None
    deployed: DeployedModel | None = None


Stage = Callable[[Subject], str]


def build(name: str) -> Subject:
    """Return a network with random weights, settled, and two images."""
    model, example = untrained(name, "fashion-mnist")
    x = torch.cat([example, example.flip(-1)])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        _settle(model, x)
        scores = main_output(model(x))
    if float((scores[0] - scores[1]).abs().max()) < 1e-3 * float(scores.abs().max()):
        raise ValueError("the outputs do not depend on the image: nothing could be compared")
    return Subject(name, model, x)


def _settle(model: nn.Module, x: Tensor) -> None:
    """Give random weights a trained network's scales: as they come, many leave only the last bias in the outputs."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and "weight" in module._parameters:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, _BatchNorm | nn.LayerNorm | nn.GroupNorm):
            for key, parameter in own.items():
                parameter.uniform_(0.5, 1.5) if key == "weight" else parameter.uniform_(-0.2, 0.2)
        for parameter in own.values():
            # Scales of residual branches begin at 0 or 1e-6.
            if not isinstance(module, _BatchNorm | nn.Conv2d | nn.Linear) and float(parameter.abs().max()) < 1e-2:
                parameter.fill_(0.5)
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
            module.train()
    model(x)
    model.eval()


def trace(subject: Subject) -> str:
    """Find the layers."""
    report = trace_report(subject.model, subject.example)
    subject.layers = report.layers
    left = len(report.uncalled) + len(report.foreign) + sum(bool(layer.fixed) for layer in report.layers)
    return f"{len(report.layers)} layers" + (f", {left} left out" if left else "")


def space(subject: Subject) -> str:
    """Span the space of every scheme, and draw one choice for each layer."""
    subject.space = load_space("mixed", subject.layers)
    draw = random.Random(0)
    options = {layer.name: subject.space.choices[layer.name] for layer in subject.space.searched}
    if not options:
        raise ValueError("no layer is searched: " + "; ".join(sorted({x.fixed for x in subject.layers if x.fixed})))
    subject.choices = {
        name: draw.choice([choice for choice in found if choice != Dense() and not isinstance(choice, Channels)])
        for name, found in options.items()
    }
    return f"{len(subject.choices)} searched"


def masks(subject: Subject) -> str:
    """Mask every layer by its choice; the network still computes finite numbers."""
    subject.masked = masked_copy(subject.model, subject.choices)
    with torch.no_grad():
        result = main_output(subject.masked(subject.example))
    if not bool(torch.isfinite(result).all()):
        raise ValueError("the masked network's outputs are not finite")
    weights = {name: subject.masked.get_submodule(name).weight for name in subject.choices}
    kept = sum(int(torch.count_nonzero(weight)) for weight in weights.values())
    return f"{kept / sum(weight.numel() for weight in weights.values()):.0%} kept"


def convert_stage(subject: Subject) -> str:
    """Put the layers on sparse kernels."""
    assert subject.masked is not None
    subject.deployed = convert(subject.masked, subject.choices, subject.example)
    kernels = [decision.kernel for decision in subject.deployed.decisions]
    sparse = sum(kernel in ("block", "csr") for kernel in kernels)
    if isinstance(subject.deployed, PlannedModel):
        return f"plan, {sparse} sparse"
    return f"nested, {sparse} sparse; no plan: {getattr(subject.deployed, 'refusal', '')}"


def parity(subject: Subject) -> str:
    """Compare the converted network with the masked one, at both batch sizes."""
    assert subject.masked is not None
    assert subject.deployed is not None
    worst = 0.0
    for x in (subject.example, subject.example[:1]):
        with torch.no_grad():
            want, got = main_output(subject.masked(x)), main_output(subject.deployed(x))
        worst = max(worst, float((got - want).abs().max() / want.abs().max().clamp_min(1e-12)))
    if not worst <= TOLERANCE:
        raise ValueError(f"outputs differ by {worst:.1e} of their scale")
    return f"{worst:.0e}"


def backward(subject: Subject) -> str:
    """Train under the policy until its masks are final: the removed weights stay zero, the loss finite."""
    model = copy.deepcopy(subject.model).train().requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    session = attach(model, optimizer, subject.choices, steps_per_epoch=1, epochs=3, method="magnitude")
    labels = torch.tensor([0, 1])
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(main_output(model(subject.example)), labels)
        loss.backward()
        optimizer.step()
    report = session.finalize()
    if not bool(torch.isfinite(loss)) or not report.finished:
        raise ValueError(f"loss {float(loss)}, masks final: {report.finished}")
    return f"{report.sparsity.prunable_sparsity:.0%} sparse"


def channels(subject: Subject) -> str:
    """Take half of the channels of every group out; outputs stay those of the masked network."""
    from autoprune.sparsity.channel_graph import channel_groups
    from autoprune.sparsity.compact import compact, mask_by_policy

    groups = channel_groups(subject.model, subject.example)
    refused = groups.coupling.refused
    if not groups.leaders:
        raise ValueError("; ".join(f"{layer}: {reason}" for layer, reason in list(refused.items())[:2]) or "no group")
    halves = {leader: group.aligned(0.5, 1) for leader, group in groups.coupling.groups.items()}
    chosen = groups.coupling.expanded(halves)
    masked = copy.deepcopy(subject.model)
    mask_by_policy(masked, chosen, subject.example, groups=groups)
    smaller = compact(masked, chosen, subject.example, groups)
    before, after = (sum(p.numel() for p in model.parameters()) for model in (masked, smaller))
    layer, reason = next(iter(refused.items()), ("", ""))
    rest = f"; {len(refused)} layers keep theirs, as {layer}: {reason}" if refused else ""
    return f"{len(groups.leaders)} groups, {after / before:.0%} of the parameters{rest}"


def export(subject: Subject) -> str:
    """Write the masked network as ONNX and compare it in onnxruntime."""
    from autoprune.export.onnx_file import export_onnx

    assert subject.masked is not None
    with tempfile.TemporaryDirectory() as folder:
        found = export_onnx(subject.masked, subject.example, Path(folder) / "network.onnx")
    return f"{found.difference:.0e}"


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


# In order; a stage that raises ends a network's way, but for the last two, which stand on their own.
STAGES: dict[str, Stage] = {
    "trace": trace, "space": space, "masks": masks, "convert": convert_stage, "parity": parity, "backward": backward,
}
# Columns of parts that this version of the package may lack.
PARTS: dict[str, tuple[str, Stage]] = {
    "channels": ("autoprune.sparsity.compact", channels),
    "export": ("autoprune.export.onnx_file", export),
}
OPTIONAL: dict[str, Stage] = {name: stage for name, (module, stage) in PARTS.items() if _has(module)}
COLUMNS = (*STAGES, *PARTS)


def outcomes(subject: Subject) -> dict[str, str]:
    """Return stage → ``pass: …`` or ``refused: …`` with the reason in one line."""
    found: dict[str, str] = {}
    for name, stage in {**STAGES, **OPTIONAL}.items():
        if name in STAGES and any(not text.startswith("pass") for text in found.values()):
            found[name] = "not tried"
            continue
        try:
            found[name] = f"pass: {stage(subject)}"
        except Exception as error:  # foreign networks: whatever comes out of one is a line of the table
            words = " ".join(str(error).split())[:300] or type(error).__name__
            found[name] = f"refused: {words}"
    return found
