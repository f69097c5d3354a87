"""Evaluate a change of one layer without running what comes before it.

The values alive at each layer's input are kept from one dense pass over a few images; a changed layer then costs only
the network behind it. A model that torch.fx cannot trace is simply run whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from autoprune.envs.network import BATCH


class PrefixCache:
    """Cached layer inputs of one network on fixed images.

    Args:
        model: Network in eval mode, holding its dense weights now; weights exchanged later are seen.
        images: In the precision and memory format the model runs in.
        layers: Module names to start from.
    """

    def __init__(self, model: nn.Module, images: Tensor, layers: Sequence[str]) -> None:
        self._model = model
        self._parts = torch.split(images, BATCH)
        self._nodes: list[fx.Node] = []
        self._starts: dict[str, int] = {}
        self._envs: list[dict[fx.Node, object]] = []
        try:
            self._module = fx.symbolic_trace(model)
        except Exception:  # whatever a forward does that cannot be traced
            return
        self._nodes = list(self._module.graph.nodes)
        wanted = set(layers)
        for index, node in enumerate(self._nodes):
            if node.op == "call_module" and node.target in wanted:
                # a layer called twice is started from its first call
                self._starts.setdefault(str(node.target), index)
        with torch.inference_mode():
            self._envs = [self._fill(part) for part in self._parts]

    def _fill(self, images: Tensor) -> dict[fx.Node, object]:
        position = {node: index for index, node in enumerate(self._nodes)}
        needed = {
            node
            for start in self._starts.values()
            for node in self._nodes[:start]
            if any(position[user] >= start for user in node.users)
        }
        runner = fx.Interpreter(self._module)
        runner.args_iter = iter([images])
        kept: dict[fx.Node, object] = {}
        for node in self._nodes:
            runner.env[node] = runner.run_node(node)
            if node in needed:
                kept[node] = runner.env[node]
        return kept

    def logits(self, layer: str) -> Tensor:
        """Return float32 logits under the model's present weights, all layers before ``layer`` being unchanged."""
        with torch.inference_mode():
            if layer not in self._starts:
                return torch.cat([self._model(part).float() for part in self._parts])
            start = self._starts[layer]
            return torch.cat([self._resume(env, start).float() for env in self._envs])

    def _resume(self, env: dict[fx.Node, object], start: int) -> Tensor:
        runner = fx.Interpreter(self._module)
        runner.env = dict(env)
        for node in self._nodes[start:]:
            runner.env[node] = runner.run_node(node)
            if node.op == "output":
                out = runner.env[node]
                assert isinstance(out, Tensor)
                return out
        raise AssertionError("a graph ends with its output")
