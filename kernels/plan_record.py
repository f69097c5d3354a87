"""Records a PyTorch model: its graph by symbolic tracing, and what every node returns by running it once."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autoprune.kernels.plan_ops import Refused

# Kept as one node each, whatever class derives from them.
_LEAVES = (
    nn.Conv2d,
    nn.Linear,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.ReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.ZeroPad2d,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.SiLU,
    nn.Sigmoid,
    nn.Flatten,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
)

_KNOWN = (nn.Conv2d.forward, nn.Linear.forward, _BatchNorm.forward)

Results = dict[fx.Node, object]


class LayerTracer(fx.Tracer):
    """Keeps every layer with a rule as one node, whatever class derives from it."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LEAVES) or super().is_leaf_module(m, module_qualified_name)


class _PlanTracer(LayerTracer):
    """Looks into layers whose class has a forward of its own: they pad their maps, or compute with other weights."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.Conv2d | nn.Linear | _BatchNorm) and type(m).forward not in _KNOWN:
            return False
        return super().is_leaf_module(m, module_qualified_name)


class _Recorder(fx.Interpreter):
    """Runs a traced model once and keeps what every node returned."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.results: Results = {}

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        # Shapes are read after an in-place operation may have changed the values, which leaves shapes alone.
        self.results[n] = result
        return result


def eval_view(model: nn.Module) -> nn.Module:
    """Return a copy of a model's structure in eval mode that shares every tensor with it: to read, not to change."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared).eval()


def record(model: nn.Module, example: Tensor) -> tuple[fx.GraphModule, Results]:
    """Return the graph of an eval-mode model and the result of every node on ``example``, (N, …) float32.

    Raises:
        Refused: The model cannot be traced: its code depends on values, or it fails on the example.
    """
    try:
        module = fx.GraphModule(model, _PlanTracer().trace(model))
        recorder = _Recorder(module)
        with torch.no_grad():
            recorder.run(example.clone())
    except Exception as error:  # symbolic tracing runs the user's forward: anything can come out of it
        first_line = (str(error).splitlines() or [""])[0]
        raise Refused("forward", f"it cannot be traced ({type(error).__name__}: {first_line[:120]})") from None
    return module, recorder.results
