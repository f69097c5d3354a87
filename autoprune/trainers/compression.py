"""Gradients of removed weights that are not sent: a communication hook for DistributedDataParallel.

Once masks are final, every process knows which weights are kept, so the values alone travel, packed in one fixed order
and without indices. Received, they are put back among zeros: what the optimizer sees is the dense mean under the mask.

Source: ClickTrain, arXiv 2011.10170, §4 (METHODS §2).
"""
# Without ``from __future__ import annotations``: DistributedDataParallel checks the hook's annotations as objects.

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from autoprune.trainers.schedule import TrainerError


class GradientCompression:
    """The hook of one data-parallel model: dense sums until ``freeze``, kept weights alone afterwards.

    Attributes:
        sent_bytes: Payload that this process has given to the all-reduce so far.
        dense_bytes: What it would have been without masks.
    """

    def __init__(self) -> None:
        self.sent_bytes = 0
        self.dense_bytes = 0
        self._kept: dict[Tensor, Tensor] = {}
        self._index: dict[tuple[Tensor, ...], Tensor] = {}

    def freeze(self, kept: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Send only what is kept of these parameters from now on.

        Args:
            kept: Parameter and boolean of its shape, the same on every process.
        """
        self._kept = dict(kept)
        self._index.clear()

    def register(self, model: DistributedDataParallel) -> None:
        """Install the hook; to be done before the first backward pass.

        Raises:
            TrainerError: The model has a communication hook already.
        """

        def hook(
            state: object, bucket: dist.GradBucket  # type: ignore[name-defined]
        ) -> torch.futures.Future[torch.Tensor]:
            return self._reduce(model.process_group, bucket)

        try:
            model.register_comm_hook(None, hook)
        except RuntimeError as error:
            raise TrainerError(
                f"compress_gradients: this model takes no further communication hook ({str(error).splitlines()[0]}); "
                "register none of your own, and call it once, before the first step."
            ) from None

    def _reduce(
        self, group: dist.ProcessGroup, bucket: dist.GradBucket  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()
        index = self._packing(bucket) if self._kept else None
        values = buffer if index is None else buffer.index_select(0, index)
        values.div_(group.size())
        self.dense_bytes += buffer.numel() * buffer.element_size()
        self.sent_bytes += values.numel() * values.element_size()
        work = dist.all_reduce(values, group=group, async_op=True)
        assert work is not None

        def unpack(done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
            total = done.value()[0]
            return total if index is None else buffer.zero_().index_copy_(0, index, total)

        return work.get_future().then(unpack)

    def _packing(self, bucket: dist.GradBucket) -> Tensor | None:  # type: ignore[name-defined]
        """Return where a bucket's kept gradients lie in its buffer, in order; None when all are kept."""
        # By parameters, not by number: buckets are dealt anew after the first backward pass.
        key = tuple(bucket.parameters())
        if key not in self._index:
            self._index[key] = self._find(bucket, key)
        index = self._index[key]
        return None if len(index) == bucket.buffer().numel() else index

    def _find(
        self, bucket: dist.GradBucket, parameters: Sequence[Tensor]  # type: ignore[name-defined]
    ) -> Tensor:
        buffer = bucket.buffer()
        keep = torch.ones(buffer.numel(), dtype=torch.bool, device=buffer.device)
        for parameter, gradient in zip(parameters, bucket.gradients(), strict=True):
            kept = self._kept.get(parameter)
            if kept is not None:
                place = gradient.storage_offset() - buffer.storage_offset()
                keep.as_strided(gradient.shape, _strides(parameter), place).copy_(kept)
        return keep.nonzero().flatten()


def _strides(parameter: Tensor) -> tuple[int, ...]:
    """Return how a gradient lies in its bucket: as its parameter does, row by row where that has gaps or overlaps.

    The views that a bucket gives of its gradients are row by row in any case.
    """
    like = torch.empty_like(parameter, device="meta").stride()
    return like if like == parameter.stride() else torch.empty(parameter.shape, device="meta").stride()
