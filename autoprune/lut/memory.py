"""What a deployed network needs of memory while it runs: feature maps, packed weights, workspace.

Peak = the plan's map buffers, which no policy changes, + the packed weights of all layers + the largest workspace of
any one layer: layers run one after another and share it. Input and output tensors are the caller's. On a CPU the map
buffers are those of the images that pass the network together; a batch that does not split into equal parts needs a
second, smaller program for its rest, which is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from autoprune.core.choices import Choice, Dense
from autoprune.core.errors import MissingLatency, ModelError
from autoprune.core.layers import LayerSpec
from autoprune.kernels.deployed import tile_of
from autoprune.kernels.fused import activation_bytes
from autoprune.kernels.plan import Plan, PlanRefusal, build_plan
from autoprune.lut.context import Context
from autoprune.lut.table import LatencyTable
from autoprune.lut.tile_model import ITEM_BYTES


def map_bytes(model: nn.Module, example: Tensor, context: Context) -> int:
    """Return the bytes of feature maps that the deployed network keeps, whatever its policy.

    Args:
        model: float32, on the CPU.
        example: (N, C, H, W) float32 of the context's batch.
        context: Device, dtype, batch and threads.
    Raises:
        ModelError: The model is not one flat plan: what it keeps is PyTorch's affair.
    """
    plan = build_plan(model, example, {}, threads=context.threads)
    if isinstance(plan, PlanRefusal):
        raise ModelError(f"the memory of this model is not known, because it is not one flat plan: {plan}.")
    return plan_bytes(plan, context)


def plan_bytes(plan: Plan, context: Context) -> int:
    """Return the same of a plan: on a CPU its program's buffers, on a GPU the maps alive at once."""
    if context.device == "cuda":
        return activation_bytes(plan, context.batch, ITEM_BYTES[context.dtype])
    return plan.program(tile_of(context.batch, plan.image_bytes, context.threads)).memory.size_bytes


def workspace_bytes(table: LatencyTable, layer: LayerSpec, choice: Choice) -> int:
    """Return the workspace of a layer under a choice, a table look-up.

    Raises:
        MissingLatency: There is no such row, or the table is older than workspaces.
    """
    found = table.row(layer, choice).workspace_bytes
    if found is None:
        raise MissingLatency(
            f"the latency table holds no workspace of {choice.text} for layer '{layer.name}': it was made by an older "
            "version. Run: autoprune lut build"
        )
    return found


def peak_bytes(
    table: LatencyTable, layers: Iterable[LayerSpec], choices: Mapping[str, Choice], maps_bytes: int
) -> int:
    """Return the peak memory of a network under a policy, bytes, as the module defines it.

    Args:
        table: Holds weight and workspace bytes of every row.
        layers: All layers of the network.
        choices: Layer → choice, as deployed; layers not named are dense.
        maps_bytes: From ``map_bytes``.
    """
    weights = most = 0
    for layer in layers:
        choice = choices.get(layer.name, Dense())
        weights += table.row(layer, choice).weight_bytes
        most = max(most, workspace_bytes(table, layer, choice))
    return maps_bytes + weights + most
