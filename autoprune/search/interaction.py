"""How far a policy's error departs from the sum of its layers' errors, learnt from the policies evaluated so far.

To second order an output's divergence is a quadratic form in the layers' disturbances: its diagonal is the sum of the
single-layer errors e_l, its other terms say which layers reinforce or cancel each other. With s_l = sqrt(e_l / Σ e)
the model is

    ln error = ln Σ e + m + sᵀ G s,    every entry of G independently N(0, b²),

a Bayesian linear regression on products s_i s_j. Its kernel is b² (s·s')², so that fitting takes a matrix as large as
the number of evaluations, however many layers there are.

Shapes: N evaluated policies, L layers, C choices.
Source: second-order interactions as in Optimal Brain Surgeon (Hassibi, Stork 1993); posterior draws by Matheron's rule
(Wilson et al. 2020). The combination is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autoprune.envs.problem import FloatArray, IntArray

# Nats. Keeps logarithms finite for errors of (nearly) nothing, and a broken network from ruling the fit.
_LEAST, _MOST = 1e-6, 20.0
_SCALES = (0.1, 0.3, 1.0, 3.0, 10.0)
_NOISES = (0.003, 0.01, 0.03, 0.1, 0.3)


class InteractionModel:
    """Draws plausible error functions, given evaluated policies.

    Args:
        errors_LC: Single-layer errors of the problem, nats.
    """

    def __init__(self, errors_LC: Sequence[FloatArray]) -> None:
        self._errors_LC = [np.clip(np.nan_to_num(errors, nan=_MOST), 0.0, _MOST) for errors in errors_LC]
        self.scale, self.noise, self.mean = 1.0, 0.1, 0.0
        self._share_NL = np.zeros((0, len(errors_LC)))
        self._excess_N = np.zeros(0)

    def fit(self, assignments_NL: IntArray, errors_N: FloatArray) -> None:
        """Take over the evaluated policies, with the scale and noise under which their errors are most probable."""
        self._share_NL, log_N = self._features(assignments_NL)
        self._excess_N = np.log(np.clip(errors_N, 0.0, _MOST) + _LEAST) - log_N
        values_N, vectors_NN = np.linalg.eigh((self._share_NL @ self._share_NL.T) ** 2)
        values_N = np.maximum(values_N, 0.0)
        ones_N, turned_N = vectors_NN.sum(axis=0), vectors_NN.T @ self._excess_N
        best = -np.inf
        for scale in _SCALES:
            for noise in _NOISES:
                variance_N = scale**2 * values_N + noise**2
                mean = float((ones_N * turned_N / variance_N).sum() / (ones_N**2 / variance_N).sum())
                rest_N = turned_N - mean * ones_N
                likelihood = -0.5 * float((rest_N**2 / variance_N + np.log(variance_N)).sum())
                if likelihood > best:
                    best, self.scale, self.noise, self.mean = likelihood, scale, noise, mean
        self._values_N, self._vectors_NN = values_N, vectors_NN

    def draw(self, rng: np.random.Generator) -> FloatArray:
        """Return a matrix G, (L, L), from the posterior."""
        layers = self._share_NL.shape[1]
        prior_LL = rng.normal(0.0, self.scale, (layers, layers))
        noise_N = rng.normal(0.0, self.noise, len(self._excess_N))
        missed_N = self._excess_N - self.mean - _form(prior_LL, self._share_NL) - noise_N
        variance_N = self.scale**2 * self._values_N + self.noise**2
        weight_N = self._vectors_NN @ ((self._vectors_NN.T @ missed_N) / variance_N)
        return np.asarray(prior_LL + self.scale**2 * (self._share_NL.T * weight_N) @ self._share_NL)

    def predict(self, matrix_LL: FloatArray, assignments_NL: IntArray) -> FloatArray:
        """Return ln error of each policy, (N,), under one drawn matrix."""
        share_NL, log_N = self._features(assignments_NL)
        return np.asarray(log_N + self.mean + _form(matrix_LL, share_NL))

    def _features(self, assignments_NL: IntArray) -> tuple[FloatArray, FloatArray]:
        columns = [errors_C[assignments_NL[:, layer]] for layer, errors_C in enumerate(self._errors_LC)]
        error_NL = np.stack(columns, axis=1)
        total_N = error_NL.sum(axis=1) + _LEAST
        return np.sqrt(error_NL / total_N[:, None]), np.log(total_N)


def _form(matrix_LL: FloatArray, share_NL: FloatArray) -> FloatArray:
    return np.asarray(((share_NL @ matrix_LL) * share_NL).sum(axis=1))
