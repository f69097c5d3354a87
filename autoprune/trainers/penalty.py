"""Penalties on weights as analytic gradients: group lasso over any grouping, L1 and L2.

Of the group lasso, ClickTrain's modified one is the best known (METHODS §2.4); PruneTrain's takes whole filters and
channels.

``λ Σ_groups ‖w ⊙ removed‖`` with ``‖v‖ = sqrt(Σ v² + ε)``, so a weight's gradient is ``λ·w·removed / ‖w ⊙ removed‖``.
Nothing passes through autograd. Groups of one size are computed together, whatever layer they belong to, and two terms
of one parameter share its weights: a step costs a few operations, not a few per layer. G groups of N weights.
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
        self._terms = terms
        self._batches = [_Batch(members) for members in _by_size(terms)]

    def value(self) -> Tensor:
        """Return the penalty, a float32 scalar that autograd can differentiate."""
        total = torch.zeros(())
        for term in self._terms:
            gated_GN = _rows(term.parameter, term).float() * _rows(term.removed, term).float()
            total = total.to(gated_GN.device) + gated_GN.square().sum(1).add(self.epsilon).sqrt().sum()
        return self.strength * total

    @torch.no_grad()
    def add_gradients(self, scale: float | Tensor = 1.0) -> None:
        """Add the penalty's gradient to each parameter's ``grad``; a parameter without one is left alone.

        Args:
            scale: By which the gradients are multiplied at the moment (a loss scale not yet undone).
        """
        for batch in self._batches:
            batch.add_gradients(self.strength * scale, self.epsilon)


class _Batch:
    """Groups of one size on one device, those of all parameters in one matrix, each parameter's weights once in it.

    Args:
        members: One list of terms a parameter, all of one length and each of one grouping.
    """

    def __init__(self, members: Sequence[Sequence[Term]]) -> None:
        self.terms = [terms[0] for terms in members]
        self.removed = [
            _narrow(torch.cat([_rows(term.removed, term).float() for term in column]))
            for column in zip(*members, strict=True)
        ]
        counts = [_rows(term.removed, term).shape[0] for term in self.terms]
        size = _rows(self.terms[0].removed, self.terms[0]).shape[1]
        # Kept between steps, so that a step is two calls over all parameters and some over the whole matrix.
        self.weights_GN = torch.empty(sum(counts), size, device=self.terms[0].parameter.device)
        self.parts = torch.split(self.weights_GN, counts)
        self.views = [_view(part, term) for part, term in zip(self.parts, self.terms, strict=True)]

    def add_gradients(self, strength: float | Tensor, epsilon: float) -> None:
        """Add ``strength·w·Σ removed / ‖w ⊙ removed‖`` to the gradients that there are."""
        grads = [term.parameter.grad for term in self.terms]
        if all(grad is None for grad in grads):
            return
        self._load()
        weights_GN = self.weights_GN
        square_GN = weights_GN.square()
        factor: Tensor | None = None
        for removed in self.removed:
            if removed.shape[1] == 1:
                norm_G1 = square_GN.sum(1, keepdim=True).mul_(removed)
            else:
                norm_G1 = (square_GN * removed).sum(1, keepdim=True)
            part = removed * (strength / norm_G1.add_(epsilon).sqrt_())
            factor = part if factor is None else factor + part
        assert factor is not None
        weights_GN.mul_(factor)
        found, values = [], []
        for grad, view, part, term in zip(grads, self.views, self.parts, self.terms, strict=True):
            if grad is not None:
                found.append(grad)
                values.append(_unrows(part, term) if view is None else view)
        torch._foreach_add_(found, values)

    def _load(self) -> None:
        views: list[Tensor] = []
        parameters: list[Tensor] = []
        for view, part, term in zip(self.views, self.parts, self.terms, strict=True):
            if view is None:
                part.copy_(_rows(term.parameter, term))
            else:
                views.append(view)
                parameters.append(term.parameter)
        if views:
            torch._foreach_copy_(views, parameters)


def _narrow(removed_GN: Tensor) -> Tensor:
    """Return (G, 1) in place of (G, N) where every group is removed whole or not at all."""
    first_G1 = removed_GN[:, :1]
    return first_G1.clone() if bool((removed_GN == first_G1).all()) else removed_GN


def _view(rows_GN: Tensor, term: Term) -> Tensor | None:
    """Return a part of the matrix in the shape of its parameter; None where no view has it."""
    return None if term.filters > 1 else _unrows(rows_GN, term)


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
        return rows_GN.view(shape[1], shape[0], *shape[2:]).transpose(0, 1)
    if term.filters == 1:
        return rows_GN.view(shape)
    columns = shape[1:].numel()
    flat_KD = rows_GN.reshape(-1, columns, term.filters).transpose(1, 2).reshape(-1, columns)
    return flat_KD[: shape[0]].reshape(shape)


def _by_size(terms: Sequence[Term]) -> list[list[list[Term]]]:
    """Return the terms by size of their groups, device and number, then by parameter."""
    together: dict[tuple[int, int, str], list[Term]] = {}
    for term in terms:
        together.setdefault((id(term.parameter), term.filters, term.by), []).append(term)
    batches: dict[tuple[int, torch.device, int], list[list[Term]]] = {}
    for members in together.values():
        first = members[0]
        size = first.filters if first.filters > 1 else _rows(first.removed, first).shape[1]
        batches.setdefault((size, first.parameter.device, len(members)), []).append(members)
    return list(batches.values())


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
