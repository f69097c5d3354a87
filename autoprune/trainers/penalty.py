"""Penalties on weights as analytic gradients: group lasso over any grouping, L1 and L2.

Of the group lasso, ClickTrain's modified one is the best known (METHODS §2.4); PruneTrain's takes whole filters and
channels.

``λ Σ_groups ‖w ⊙ removed‖`` with ``‖v‖ = sqrt(Σ v² + ε)``, so a weight's gradient is ``λ·w·removed / ‖w ⊙ removed‖``.
Nothing passes through autograd. Groups of one size are computed together, whatever layer they belong to: a step costs
a few operations, not a few per layer. G groups of N weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

EPSILON = 1e-8

Grouping = Literal["kernel", "filter", "channel"]


@dataclass(frozen=True, slots=True)
class Term:
    """What one penalty term covers.

    Attributes:
        parameter: (K, C, R, S) or (O, I).
        removed: Boolean, same shape: weights that the term pulls to zero.
        filters: Filters that share one norm at one weight position; 1 groups by ``by`` instead.
        by: One norm for each ``kernel``'s window, each whole ``filter``, or each input ``channel`` of the layer.
    """

    parameter: nn.Parameter
    removed: Tensor
    filters: int = 1
    by: Grouping = "kernel"


class GroupLasso:
    """The penalty over several terms.

    Args:
        terms: One or more; a parameter may appear in several.
        strength: λ.
        epsilon: Under the square root.
    """

    def __init__(self, terms: Sequence[Term], strength: float, epsilon: float = EPSILON) -> None:
        self.strength = strength
        self.epsilon = epsilon
        self._batches = [_Batch(part) for part in _by_size(terms)]

    def value(self) -> Tensor:
        """Return the penalty, a float32 scalar that autograd can differentiate."""
        total = torch.zeros(())
        for batch in self._batches:
            gated_GN = batch.gated()
            total = total.to(gated_GN.device) + _norm(gated_GN, self.epsilon).sum()
        return self.strength * total

    @torch.no_grad()
    def add_gradients(self, scale: float | Tensor = 1.0) -> None:
        """Add the penalty's gradient to each parameter's ``grad``; a parameter without one is left alone.

        Args:
            scale: By which the gradients are multiplied at the moment (a loss scale not yet undone).
        """
        for batch in self._batches:
            gated_GN = batch.gated()
            gated_GN.mul_((self.strength * scale) / _norm(gated_GN, self.epsilon))
            batch.add(gated_GN)


class _Batch:
    """Terms whose groups have one size and live on one device."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms = terms
        self.removed_GN = torch.cat([_rows(term.removed, term).float() for term in terms])
        self.counts = [_rows(term.removed, term).shape[0] for term in terms]

    def gated(self) -> Tensor:
        rows = [_rows(term.parameter, term) for term in self.terms]
        return torch.cat(rows).float() * self.removed_GN

    def add(self, gradient_GN: Tensor) -> None:
        grads, parts = [], []
        for term, part in zip(self.terms, torch.split(gradient_GN, self.counts), strict=True):
            if term.parameter.grad is not None:
                grads.append(term.parameter.grad)
                parts.append(_unrows(part, term).to(term.parameter.grad.dtype))
        # A parameter with two terms appears twice: foreach would race on it, so repeats get a call of their own.
        for index in _rounds(grads):
            torch._foreach_add_([grads[i] for i in index], [parts[i] for i in index])


def _norm(gated_GN: Tensor, epsilon: float) -> Tensor:
    return gated_GN.square().sum(1, keepdim=True).add_(epsilon).sqrt_()


def _rows(value: Tensor, term: Term) -> Tensor:
    """Return (G, N): the weights of each group; the ``filters`` weights of a block are zero-filled at a short end."""
    k, c = value.shape[:2]
    filters = term.filters
    if filters == 1 and term.by == "kernel":
        return value.reshape(k * c, -1)
    if filters == 1:
        return value.reshape(k, -1) if term.by == "filter" else value.transpose(0, 1).reshape(c, -1)
    flat_KD = value.reshape(k, -1)
    short = -k % filters
    if short:
        flat_KD = torch.cat([flat_KD, flat_KD.new_zeros(short, flat_KD.shape[1])])
    return flat_KD.reshape(-1, filters, flat_KD.shape[1]).transpose(1, 2).reshape(-1, filters)


def _unrows(rows_GN: Tensor, term: Term) -> Tensor:
    shape = term.parameter.shape
    if term.filters == 1 and term.by == "channel":
        return rows_GN.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1)
    if term.filters == 1:
        return rows_GN.reshape(shape)
    columns = shape[1:].numel()
    flat_KD = rows_GN.reshape(-1, columns, term.filters).transpose(1, 2).reshape(-1, columns)
    return flat_KD[: shape[0]].reshape(shape)


def _by_size(terms: Sequence[Term]) -> list[list[Term]]:
    batches: dict[tuple[int, torch.device], list[Term]] = {}
    for term in terms:
        size = term.filters if term.filters > 1 else _rows(term.removed, term).shape[1]
        batches.setdefault((size, term.parameter.device), []).append(term)
    return list(batches.values())


def _rounds(grads: Sequence[Tensor]) -> list[list[int]]:
    rounds: list[list[int]] = []
    seen: dict[int, int] = {}
    for index, grad in enumerate(grads):
        turn = seen.get(id(grad), 0)
        seen[id(grad)] = turn + 1
        if turn == len(rounds):
            rounds.append([])
        rounds[turn].append(index)
    return rounds


class Decay:
    """``l1·Σ|w| + l2/2·Σw²`` over some parameters.

    Args:
        parameters: Of any shape.
        l1, l2: Strengths.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], l1: float, l2: float = 0.0) -> None:
        self.parameters, self.l1, self.l2 = parameters, l1, l2

    @torch.no_grad()
    def add_gradients(self, scale: float | Tensor = 1.0) -> None:
        """Add the gradient ``l1·sign(w) + l2·w`` to each parameter that has one already."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                pull = self.l1 * parameter.sign() + self.l2 * parameter
                parameter.grad.add_((pull * scale).to(parameter.grad.dtype))


class Pull:
    """``ρ/2·Σ‖W − A‖²`` towards anchors A, one a parameter: ADMM's penalty with A = Z − U.

    Args:
        anchors: Parameter and its anchor of the same shape, float32.
        rho: ρ.
    """

    def __init__(self, anchors: Sequence[tuple[nn.Parameter, Tensor]], rho: float) -> None:
        self.anchors, self.rho = anchors, rho

    @torch.no_grad()
    def add_gradients(self, scale: float | Tensor = 1.0) -> None:
        """Add the gradient ``ρ·(W − A)`` to each parameter that has one already."""
        for parameter, anchor in self.anchors:
            if parameter.grad is not None:
                pull = (parameter.float() - anchor) * (self.rho * scale)
                parameter.grad.add_(pull.to(parameter.grad.dtype))
