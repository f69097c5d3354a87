"""ClickTrain's modified group lasso as analytic gradients (METHODS §2.4).

``λ Σ_groups ‖w ⊙ removed‖`` with ``‖v‖ = sqrt(Σ v² + ε)``, so a weight's gradient is ``λ·w·removed / ‖w ⊙ removed‖``.
Nothing passes through autograd. Groups of one size are computed together, whatever layer they belong to: a step costs
a few operations, not a few per layer. G groups of N weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

EPSILON = 1e-8


@dataclass(frozen=True, slots=True)
class Term:
    """What one penalty term covers.

    Attributes:
        parameter: (K, C, R, S) or (O, I).
        removed: Boolean, same shape: weights that the term pulls to zero.
        filters: Filters that share one norm at one weight position; 1 groups each kernel's window instead.
    """

    parameter: nn.Parameter
    removed: Tensor
    filters: int = 1


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
        self.removed_GN = torch.cat([_rows(term.removed, term.filters).float() for term in terms])
        self.counts = [_rows(term.removed, term.filters).shape[0] for term in terms]

    def gated(self) -> Tensor:
        rows = [_rows(term.parameter, term.filters) for term in self.terms]
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


def _rows(value: Tensor, filters: int) -> Tensor:
    """Return (G, N): the kernels' windows, or the ``filters`` weights of each block, zero-filled at a short end."""
    k, c = value.shape[:2]
    if filters == 1:
        return value.reshape(k * c, -1)
    flat_KD = value.reshape(k, -1)
    short = -k % filters
    if short:
        flat_KD = torch.cat([flat_KD, flat_KD.new_zeros(short, flat_KD.shape[1])])
    return flat_KD.reshape(-1, filters, flat_KD.shape[1]).transpose(1, 2).reshape(-1, filters)


def _unrows(rows_GN: Tensor, term: Term) -> Tensor:
    shape = term.parameter.shape
    if term.filters == 1:
        return rows_GN.reshape(shape)
    columns = shape[1:].numel()
    flat_KD = rows_GN.reshape(-1, columns, term.filters).transpose(1, 2).reshape(-1, columns)
    return flat_KD[: shape[0]].reshape(shape)


def _by_size(terms: Sequence[Term]) -> list[list[Term]]:
    batches: dict[tuple[int, torch.device], list[Term]] = {}
    for term in terms:
        size = term.filters if term.filters > 1 else term.parameter[0, 0].numel()
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
