"""L = E + Σ A / x^α fitted to the losses of trained models, with what is uncertain about it (Hoffmann et al. 2022, approach 3).

x is the number of parameters N and of training tokens D, or one of them alone, or compute C: then it is the same law with one term.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy import optimize

DELTA = 1e-3  # of the Huber loss of log L, as Hoffmann et al. have it: nearly absolute, so that a run that went wrong moves little
EXPONENTS = (0.1, 0.3, 0.6, 1.2)  # starts
RESTARTS = 4  # at most: where a term is not needed, its factor falls for ever
LEVEL = 0.05  # of the intervals
NAMES = {"N": ("A", "α"), "D": ("B", "β"), "C": ("K", "γ")}  # variable → how its factor and its exponent are called


@dataclass(frozen=True)
class Law:
    """A fitted law. floor: E; factors, exponents: of each of the variables; objective: the Huber loss of the fit, in δ²."""

    variables: tuple[str, ...]
    floor: float
    factors: tuple[float, ...]
    exponents: tuple[float, ...]
    objective: float = 0.0

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The loss at x [n, K]."""
        return self.floor + (np.array(self.factors) * np.asarray(x, np.float64) ** -np.array(self.exponents)).sum(axis=-1)

    @property
    def parameters(self) -> dict[str, float]:
        """Name → value: E, and A and α, B and β, or K and γ."""
        named = [NAMES[variable] for variable in self.variables]
        factors = dict(zip([factor for factor, _ in named], self.factors, strict=True))
        return {"E": self.floor} | factors | dict(zip([power for _, power in named], self.exponents, strict=True))

    def __str__(self) -> str:
        terms = zip(self.variables, self.factors, self.exponents, strict=True)
        return f"{self.floor:.4g}" + "".join(f" + {factor:.4g} / {name}^{power:.4g}" for name, factor, power in terms)


def fit(variables: tuple[str, ...], x: np.ndarray, loss: np.ndarray, *, start: Law | None = None) -> Law:
    """The law with the smallest Huber loss of log L over points x [n, K] with losses [n].

    log L is written as a logsumexp and minimized by BFGS, from `start`, or else from a grid of exponents, each with the E and A
    that fit best in least squares. (L-BFGS, the same for many parameters, takes more steps for five, and BLAS threads to each.) Two
    mistakes of the original are avoided (Besiroglu et al. 2024): losses are neither averaged nor small numbers, on which the
    optimizer's tolerances end it early, and nothing is rounded. Variables are taken relative to their geometric means, or A and α
    could hardly be told apart.
    """
    log_x, log_loss = np.log(np.asarray(x, np.float64)), np.log(np.asarray(loss, np.float64))
    middle_K = log_x.mean(axis=0)
    z_nK = log_x - middle_K
    if start is None:
        starts = [_start(z_nK, loss, np.array(e)) for e in itertools.product(EXPONENTS, repeat=len(variables))]
    else:
        powers = np.array(start.exponents)
        starts = [np.concatenate(([np.log(start.floor)], np.log(start.factors) - powers * middle_K, powers))]
    best = min((_minimized(theta, z_nK, log_loss) for theta in starts), key=lambda found: found[0])
    value, (floor, factors_K, powers_K) = best[0], _parts(best[1])
    factors = np.exp(factors_K + powers_K * middle_K)
    return Law(variables, float(np.exp(floor)), tuple(factors.tolist()), tuple(powers_K.tolist()), float(value))


def _parts(theta: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """log E, log A [K] at the geometric means, α [K]."""
    terms = len(theta) // 2
    return theta[0], theta[1 : 1 + terms], theta[1 + terms :]


def _start(z_nK: np.ndarray, loss: np.ndarray, powers_K: np.ndarray) -> np.ndarray:
    """E and A of the non-negative least squares fit with these exponents, none of them quite zero, where no gradient would be."""
    columns = np.column_stack([np.ones(len(loss)), np.exp(-z_nK * powers_K)])
    found, _ = optimize.nnls(columns, loss)
    return np.concatenate((np.log(np.maximum(found, 0.01 * np.min(loss))), powers_K))


def _minimized(theta: np.ndarray, z_nK: np.ndarray, log_loss: np.ndarray) -> tuple[float, np.ndarray]:
    """The value and the place of the minimum below a start; begun again where it ended while that gains anything."""
    value = np.inf
    for _ in range(RESTARTS):
        found = optimize.minimize(
            objective, theta, (z_nK, log_loss), method="BFGS", jac=True, options={"gtol": 1e-5, "maxiter": 300}
        )
        before = value
        if found.fun < value:
            value, theta = float(found.fun), found.x
        if value >= before * (1 - 1e-6):
            break
    return value, theta


def objective(theta: np.ndarray, z_nK: np.ndarray, log_loss: np.ndarray) -> tuple[float, np.ndarray]:
    """Σ Huber(log L̂ - log L) / δ² and its gradient; theta: log E, log A [K], α [K]."""
    floor, factors_K, powers_K = _parts(theta)
    terms = np.column_stack([np.full(len(z_nK), floor), factors_K - powers_K * z_nK])
    largest_n1 = terms.max(axis=1, keepdims=True)
    shares = np.exp(terms - largest_n1)
    sums_n1 = shares.sum(axis=1, keepdims=True)
    predicted, shares = (largest_n1 + np.log(sums_n1))[:, 0], shares / sums_n1
    units = (predicted - log_loss) / DELTA
    slope = np.clip(units, -1, 1)
    value = float(np.sum(slope * (units - slope / 2)))
    by_term_nK = (slope / DELTA)[:, None] * shares  # no matrix product: threads take longer to wake than it takes
    by_power_nK = -by_term_nK[:, 1:] * z_nK
    return value, np.concatenate((by_term_nK.sum(axis=0), by_power_nK.sum(axis=0)))


def bootstrap(law: Law, x: np.ndarray, loss: np.ndarray, *, draws: int, seed: int = 0) -> list[Law]:
    """Laws that other runs might have given: each fitted to as many runs, drawn from these with replacement.

    Draws with no more different points than the law has parameters are drawn again. (Drawing residuals instead, or their signs,
    covers what is true far too seldom with a dozen points, because a nearly absolute loss goes exactly through some of them.)
    """
    rng, n = np.random.default_rng(seed), len(loss)
    cells = np.unique(np.asarray(x, np.float64), axis=0, return_inverse=True)[1].ravel()
    enough = min(len(law.parameters) + 1, len(np.unique(cells)))
    found: list[Law] = []
    while len(found) < draws:
        drawn = rng.integers(0, n, n)
        if len(np.unique(cells[drawn])) >= enough:
            found.append(fit(law.variables, x[drawn], loss[drawn], start=law))
    return found


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95% of draws."""
    low, high = np.quantile(np.asarray(values, np.float64), [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)
