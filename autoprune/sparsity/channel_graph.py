"""Finds the channel groups of a model: torch-pruning's dependency graph, taken apart channel by channel.

The graph says which positions of which layers leave with a filter. Positions are joined until nothing more is shared;
what is joined leaves as one unit, and units in the same places make a group. Whether that is right for this model is
then tried out: units are masked and taken out, and outputs are compared. What disagrees is refused by name.

Source: Fang et al., "DepGraph: towards any structural pruning" (arXiv 2301.12900).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from autoprune.core.coupling import ChannelGroup, Coupling, LayerSides, Share, Side
from autoprune.core.errors import ModelError
from autoprune.sparsity.channel_trial import tried
from autoprune.sparsity.channels import ChannelGroups, Layer, Norm, Place, Slot, as_arguments
from autoprune.sparsity.graph_steps import Steps, bounded

# Position of one side of a module.
_Node = tuple[str, str, int]

def channel_groups(model: nn.Module, example: object, *, probe: bool = True) -> ChannelGroups:
    """Return the channel groups of a model.

    Args:
        model: Any module; left as it was.
        example: One input with batch dimension, or a tuple of several.
        probe: Whether groups are tried out, two forward passes and a few more for each group that is wrong. Without it
            a group may be wrong where the graph is; compare outputs yourself.
    """
    with torch.random.fork_rng(devices=[]):
        double = copy.deepcopy(model).cpu().double().eval().requires_grad_(True)
        # The graph runs its model with gradients; what a model then keeps of that run, LeViT's biases, has no copy.
        finder = _Finder(copy.deepcopy(double), _double(example))
        groups = finder.groups()
        return tried(double, finder.example, groups) if probe else groups


def _double(example: object) -> tuple[object, ...]:
    def one(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().cpu()
        return value.double() if value.is_floating_point() else value

    return tuple(one(value) for value in as_arguments(example))


class _Entrance(nn.Module):
    """A model behind layers that leave its inputs as they are: the graph knows the channels of what a layer made.

    Without them an image that is concatenated to maps has no channels, and everything behind it shifts.
    """

    def __init__(self, model: nn.Module, example: tuple[object, ...]) -> None:
        super().__init__()
        self.model = model
        self.gates = nn.ModuleList(_gate(value) for value in example)

    def forward(self, *inputs: object) -> object:
        return self.model(*(gate(value) for gate, value in zip(self.gates, inputs, strict=True)))


@torch.no_grad()
def _gate(value: object) -> nn.Module:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() not in (2, 3, 4):
        return nn.Identity()
    channels = value.shape[1] if value.dim() == 4 else value.shape[-1]
    image = value.dim() == 4
    gate = nn.Conv2d(channels, channels, 1, bias=False) if image else nn.Linear(channels, channels, bias=False)
    gate.weight.copy_(torch.eye(channels).reshape(gate.weight.shape))
    return gate.double()


@dataclass
class _Finder:
    """Collects which positions belong together; ``model`` is a copy in double precision."""

    model: nn.Module
    example: tuple[object, ...]
    parent: dict[_Node, _Node] = field(default_factory=dict)
    poison: list[tuple[_Node, str]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    steps: Steps = field(default_factory=Steps)

    def __post_init__(self) -> None:
        self.gates: set[nn.Module] = set()
        self.modules = dict(self.model.named_modules())
        self.order = _execution_order(self.model, self.example)
        self.layers = [name for name in self.order if isinstance(self.modules[name], Layer)]

    def groups(self) -> ChannelGroups:
        """Return the groups as the graph has them."""
        try:
            self._join()
        except Exception as error:  # the graph's own limits, and whatever a user's forward raises
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            reason = f"torch-pruning cannot follow this network ({line})"
            return ChannelGroups(Coupling(refused=dict.fromkeys(self.layers, reason)))
        return _assemble(self)

    def find(self, node: _Node) -> _Node:
        """Return what stands for everything joined with a position."""
        root = node
        while self.parent.setdefault(root, root) != root:
            root = self.parent[root]
        while self.parent[node] != root:
            self.parent[node], node = root, self.parent[node]
        return root

    def union(self, first: _Node, second: _Node) -> None:
        """Let two positions leave together."""
        self.parent[self.find(first)] = self.find(second)

    def _join(self) -> None:
        import torch_pruning

        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the graph's remarks on what it does not know; outputs are compared
            entrance = _Entrance(self.model, self.example)
            graph = torch_pruning.DependencyGraph().build_dependency(
                entrance, example_inputs=list(self.example), verbose=False
            )
            self.gates = set(entrance.gates)
            widest = max((max(self.modules[name].weight.shape) for name in self.layers), default=0)
            self.steps = bounded(graph.module2node.values(), widest)
            names = {module: name for name, module in self.modules.items()}
            for name in self.layers:
                module = self.modules[name]
                assert isinstance(module, Layer)
                self._check_module(name, module)
                if module in graph.module2node:
                    self._join_writer(graph, names, name, module)
                else:
                    self.refused[name] = "the dependency graph does not reach it"

    def _check_module(self, name: str, module: Layer) -> None:
        count = len(module.weight)
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            per_in, per_out = module.in_channels // module.groups, module.out_channels // module.groups
            for position in range(module.in_channels):
                self.union((name, "in", position), (name, "out", position // per_in * per_out))
            for position in range(count):
                self.union((name, "out", position), (name, "out", position // per_out * per_out))
        if not isinstance(getattr(module, "weight", None), nn.Parameter):
            self._poison((name, "out", 0), f"the weight of '{name}' is computed (a parametrization)")
        shared = [other for other in self.layers if other != name and self.modules[other].weight is module.weight]
        if shared:
            for position in range(count):
                self.poison.append(((name, "out", position), f"'{name}' and '{shared[0]}' share one weight"))

    def _join_writer(self, graph: object, names: Mapping[nn.Module, str], name: str, module: Layer) -> None:
        from torch_pruning import ops, prune_conv_out_channels, prune_linear_out_channels

        prune = prune_linear_out_channels if isinstance(module, nn.Linear) else prune_conv_out_channels
        self.steps.taken = 0
        try:
            group = graph.get_pruning_group(module, prune, list(range(len(module.weight))))  # type: ignore[attr-defined]
        except Exception as error:  # see groups()
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            self._poison((name, "out", 0), f"torch-pruning cannot follow its filters ({line})")
            return
        for item in group:
            target, positions, roots = item.dep.target.module, list(item.idxs), list(item.root_idxs)
            if isinstance(target, ops._OutputOp):
                self._poison_all(name, roots, "they are outputs of the network")
                continue
            if isinstance(target, nn.Parameter):
                self._poison_all(name, roots, "a bare parameter of the model goes along with them")
                continue
            if target in self.gates:
                self._poison_all(name, roots, "they meet channels of the network's input")
                continue
            if target not in names:
                continue  # an operation without parameters
            side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"  # type: ignore[attr-defined]
            self._join_item(name, roots, (names[target], side), positions)

    def _join_item(self, writer: str, roots: list[int], place: tuple[str, str], positions: list[int]) -> None:
        target, side = place
        module = self.modules[target]
        size = _size(module, side) if isinstance(module, Layer | Norm | nn.PReLU) else len(self.modules[writer].weight)
        if len(roots) != len(positions) or None in roots or not all(0 <= p < size for p in positions):
            self._poison((writer, "out", 0), f"their way to '{target}' is not one to one")
            return
        if not isinstance(module, Layer):
            side = "out"
            if isinstance(module, nn.PReLU) and module.num_parameters == 1:
                return
            if not isinstance(module, Norm | nn.PReLU) and any(True for _ in module.parameters(recurse=False)):
                kind = type(module).__name__
                self._poison_all(writer, roots, f"{kind} '{target}' works on all of them together")
                return
            if not isinstance(module, Norm | nn.PReLU):
                return
        for root, position in zip(roots, positions, strict=True):
            self.union((writer, "out", int(root)), (target, side, int(position)))

    def _poison(self, node: _Node, reason: str) -> None:
        module = self.modules[node[0]]
        for position in range(len(module.weight)):
            self.poison.append(((node[0], node[1], position), reason))

    def _poison_all(self, writer: str, positions: Iterable[int | None], reason: str) -> None:
        self.poison += [((writer, "out", int(p)), reason) for p in positions if p is not None]


def _execution_order(model: nn.Module, example: tuple[object, ...]) -> list[str]:
    order: dict[str, None] = {}
    handles = [
        module.register_forward_hook(lambda m, i, o, name=name: order.setdefault(name))
        for name, module in model.named_modules()
        if isinstance(module, Layer | Norm | nn.PReLU)
    ]
    try:
        with torch.no_grad():
            model(*example)
    except Exception as error:  # a model is foreign code
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"the model does not run on the example in double precision: {line}") from error
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


def _assemble(finder: _Finder) -> ChannelGroups:
    """Gather joined positions into units, and units in the same places into groups."""
    bad: dict[_Node, str] = {}
    for node, reason in finder.poison:
        bad.setdefault(finder.find(node), reason)
    units: dict[_Node, list[_Node]] = {}
    for node in list(finder.parent):
        units.setdefault(finder.find(node), []).append(node)
    classes: dict[frozenset[tuple[str, str, int]], list[list[_Node]]] = {}
    refused = dict(finder.refused)
    for root, nodes in units.items():
        counts: dict[tuple[str, str], int] = {}
        for name, side, _ in nodes:
            counts[name, side] = counts.get((name, side), 0) + 1
        reason = bad.get(root, "")
        if not reason and not any(side == "in" and not _is_grouped(finder, name) for name, side in counts):
            reason = "no layer of the network reads them"
        if reason:
            refused.update({name: reason for name, side in counts if side == "out" and name in finder.layers})
            continue
        classes.setdefault(frozenset((*place, count) for place, count in counts.items()), []).append(nodes)
    return _grouped(finder, list(classes.values()), refused)


def _is_grouped(finder: _Finder, name: str) -> bool:
    module = finder.modules[name]
    return isinstance(module, nn.Conv2d) and module.groups > 1


def _grouped(finder: _Finder, classes: list[list[list[_Node]]], refused: dict[str, str]) -> ChannelGroups:
    place_of = {name: index for index, name in enumerate(finder.order)}
    found: list[tuple[ChannelGroup, list[list[_Node]]]] = []
    for members in classes:
        written: dict[str, int] = {}
        for name, side, _ in (node for unit in members for node in unit):
            if side == "out" and name in finder.layers:
                written[name] = written.get(name, 0) + 1
        whole = sorted(
            (name for name, count in written.items()
             if count == len(finder.modules[name].weight) and not _is_grouped(finder, name)),
            key=lambda name: place_of[name],
        )
        if not whole:
            refused.update({name: "its filters go different ways" for name in written})
            continue
        leader = whole[0]
        members.sort(key=lambda unit: min(p for name, side, p in unit if (name, side) == (leader, "out")))
        found.append((ChannelGroup(leader, tuple(whole), len(members), written[leader] // len(members)), members))
    found.sort(key=lambda pair: place_of[pair[0].leader])
    refused = {name: reason for name, reason in refused.items() if all(name not in g.writers for g, _ in found)}
    return _with_slots(finder, found, refused)


def _with_slots(
    finder: _Finder, found: list[tuple[ChannelGroup, list[list[_Node]]]], refused: dict[str, str]
) -> ChannelGroups:
    slots: dict[Place, Slot] = {}
    for index, (_, members) in enumerate(found):
        for unit, nodes in enumerate(members):
            for name, side, position in nodes:
                place: Place = (name, "in" if side == "in" else "out")
                if side == "in" and _is_grouped(finder, name):
                    continue
                if place not in slots:
                    size = _size(finder.modules[name], side)
                    slots[place] = Slot(torch.full((size,), -1), torch.full((size,), -1))
                slots[place].group_P[position] = index
                slots[place].unit_P[position] = unit
    leaders = tuple(group.leader for group, _ in found)
    # Grouped convolutions own input positions by way of their groups alone.
    names = [name for name in finder.layers if (name, "in") in slots or (name, "out") in slots]
    sides = {name: _sides(finder.modules[name], name, slots, leaders) for name in names}
    return ChannelGroups(Coupling({group.leader: group for group, _ in found}, sides, refused), leaders, slots)


def _size(module: nn.Module, side: str) -> int:
    if side == "in" and isinstance(module, Layer):
        return int(module.weight.shape[1]) * (module.groups if isinstance(module, nn.Conv2d) else 1)
    weight = module.weight if not isinstance(module, Norm) else module.running_mean
    if weight is None:
        assert isinstance(module, Norm)
        return int(module.num_features)
    assert isinstance(weight, Tensor)
    return len(weight)


def _sides(module: nn.Module, name: str, slots: Mapping[Place, Slot], leaders: tuple[str, ...]) -> LayerSides:
    assert isinstance(module, Layer)
    outputs_ = _side(slots.get((name, "out")), len(module.weight), leaders)
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        per_out, per_in = module.out_channels // module.groups, module.in_channels // module.groups
        grouped = Side(tuple(replace(s, each=s.each // per_out) for s in outputs_.shares), outputs_.fixed // per_out)
        inputs = Side(tuple(replace(s, each=s.each * per_in) for s in grouped.shares), grouped.fixed * per_in)
        return LayerSides(inputs, outputs_, grouped)
    return LayerSides(_side(slots.get((name, "in")), int(module.weight.shape[1]), leaders), outputs_)


def _side(slot: Slot | None, size: int, leaders: tuple[str, ...]) -> Side:
    if slot is None:
        return Side(fixed=size)
    shares = []
    for index in sorted(set(slot.group_P.tolist()) - {-1}):
        own_P = slot.group_P == index
        shares.append(Share(leaders[index], int(own_P.sum()) // (int(slot.unit_P[own_P].max()) + 1)))
    return Side(tuple(shares), int((slot.group_P == -1).sum()))
