"""Evaluate a change of one layer without running what comes before it, and many changes of it side by side.

The values alive at a layer's input are kept while the layer is worked on; a changed layer then costs only the network
behind it. Layers are best visited in execution order: what no later layer needs is forgotten on the way, so that memory
holds one layer's values, not all. A model that torch.fx cannot trace is simply run whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from autoprune.envs.network import BATCH
from autoprune.tasks.outputs import main_output

Parameters = tuple[Tensor, Tensor]
"""Weight and bias of a layer as they are used."""


@dataclass(slots=True)
class _Cursor:
    """How far the dense network has run on some images, and the values that are still needed."""

    images: Tensor
    position: int = 0
    values: dict[fx.Node, object] = field(default_factory=dict)


class PrefixCache:
    """Dense values of one network on fixed images, up to the layer in work.

    Args:
        model: Network in eval mode, dense at every move to another layer; a layer's weights may be exchanged meanwhile.
        images: In the precision and memory format the model runs in.
        layers: Module names to start from.
        part: Images in a part.
    """

    def __init__(self, model: nn.Module, images: Tensor, layers: Sequence[str], part: int = BATCH) -> None:
        self._model = model
        self._parts = torch.split(images, part)
        self._nodes: list[fx.Node] = []
        self._starts: dict[str, int] = {}
        self._calls: dict[str, int] = {}
        try:
            # A graph is taken as it is: tracing it again would look into its functions.
            self._module = model if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model)
        except Exception:  # whatever a forward does that cannot be traced
            return
        self._nodes = list(self._module.graph.nodes)
        wanted = set(layers)
        for index, node in enumerate(self._nodes):
            if node.op == "call_module" and node.target in wanted:
                # a layer called twice is started from its first call
                self._starts.setdefault(str(node.target), index)
                self._calls[str(node.target)] = self._calls.get(str(node.target), 0) + 1
        position = {node: index for index, node in enumerate(self._nodes)}
        self._last_use = {node: max((position[user] for user in node.users), default=-1) for node in self._nodes}
        self._cursors = [_Cursor(part) for part in self._parts]

    @property
    def parts(self) -> int:
        """Number of parts the images are in."""
        return len(self._parts)

    def logits(self, layer: str) -> Tensor:
        """Return float32 logits under the model's present weights, all layers before ``layer`` being unchanged."""
        with torch.inference_mode():
            if layer not in self._starts:
                return torch.cat([main_output(self._model(part)).float() for part in self._parts])
            start = self._starts[layer]
            runs = [self._run(_copied(self._seek(cursor, start)), start) for cursor in self._cursors]
            return torch.cat([logits.float() for logits in runs])

    def branches(self, layer: str, part: int, changed: Sequence[Parameters]) -> list[Tensor] | None:
        """Return float32 logits of one part under each of several parameters of one layer, run as one batch.

        Args:
            layer: Which one changes; its own weights are not touched.
            part: Number of the part.
            changed: Weight and bias of each branch, in the model's precision.
        Returns:
            One ``(images, classes)`` per branch; None where the graph does not allow it: the layer is called twice, or
            something else than a batch of maps passes by it.
        """
        if self._calls.get(layer) != 1:
            return None
        start = self._starts[layer]
        node, images = self._nodes[start], len(self._parts[part])
        with torch.inference_mode():
            values = dict(self._seek(self._cursors[part], start))
            if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
                return None
            x = values[node.args[0]]
            # What passes by is copied into one batch, so that the run behind it may write into its maps.
            passing = {other: value for other, value in values.items() if self._last_use[other] > start}
            if not all(isinstance(v, Tensor) and v.dim() > 0 and len(v) == images for v in (x, *passing.values())):
                return None
            module = self._model.get_submodule(layer)
            names = ("weight", "bias") if module.bias is not None else ("weight",)
            outputs = [
                torch.func.functional_call(module, dict(zip(names, parameters, strict=False)), (x,))
                for parameters in changed
            ]
            wide: dict[fx.Node, object] = {
                n: torch.cat([value] * len(changed)) for n, value in passing.items() if isinstance(value, Tensor)
            }
            wide[node] = torch.cat(outputs)
            return list(torch.split(self._run(wide, start + 1).float(), images))

    def _seek(self, cursor: _Cursor, start: int) -> dict[fx.Node, object]:
        """Run the dense network on to a layer's input; return the values needed from there on."""
        if cursor.position > start:
            cursor.position, cursor.values = 0, {}
        runner = fx.Interpreter(self._module)
        runner.args_iter = iter([cursor.images])
        runner.env = cursor.values
        for index in range(cursor.position, start):
            runner.env[self._nodes[index]] = runner.run_node(self._nodes[index])
        kept = {node: value for node, value in runner.env.items() if self._last_use[node] >= start}
        cursor.position, cursor.values = start, kept
        return kept

    def _run(self, values: dict[fx.Node, object], start: int) -> Tensor:
        runner = fx.Interpreter(self._module)
        runner.env = values
        for index in range(start, len(self._nodes)):
            node = self._nodes[index]
            out = runner.run_node(node)
            if node.op == "output":
                return main_output(out)
            runner.env[node] = out
            for used in node.all_input_nodes:
                if self._last_use[used] == index:
                    del runner.env[used]
        raise AssertionError("a graph ends with its output")


def _copied(values: dict[fx.Node, object]) -> dict[fx.Node, object]:
    """Return values that a network which writes into its maps may be run on, the originals staying as they are."""
    return {node: value.clone() if isinstance(value, Tensor) else value for node, value in values.items()}
