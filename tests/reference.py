"""Slow oracles in NumPy float64 with plain loops, each from the equation it cites."""

import math
from collections.abc import Iterable, Iterator
from itertools import product

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def count(sparsity: float, n: int) -> int:
    """Return k = max(1, floor((1 − s)·n + 1/2))."""
    return max(1, math.floor((1.0 - sparsity) * n + 0.5))


def tie_key(index: int) -> int:
    """Return the first output of splitmix64 seeded with the index (Vigna's splitmix64.c)."""
    z = (index + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def ranked(scores: Array, places: Iterable[int]) -> list[int]:
    """Flat indices in the order of (−abs(score), key)."""
    flat = np.abs(scores).ravel()
    return sorted(places, key=lambda i: (-flat[i], tie_key(i)))


def top_mask(theta: Array, sparsity: float) -> Mask:
    """Largest magnitudes first, ties in the order of their key."""
    ranking = ranked(theta, range(theta.size))
    mask = np.zeros(theta.size, bool)
    mask[ranking[: count(sparsity, theta.size)]] = True
    return mask.reshape(theta.shape)


def block_mask(theta: Array, sparsity: float, block: tuple[int, int], norm: str) -> Mask:
    """Whole blocks over the first two axes, by norm, at each position of the others."""
    rows, columns = block
    grid = (theta.shape[0] // rows, theta.shape[1] // columns, *theta.shape[2:])
    scores = np.zeros(grid)
    for index in product(*map(range, grid)):
        entries = theta[_block(index, block)]
        scores[index] = (entries**2).sum() if norm == "l2" else np.abs(entries).sum()
    chosen = top_mask(scores, sparsity)
    mask = np.zeros(theta.shape, bool)
    for index in product(*map(range, grid)):
        mask[_block(index, block)] = chosen[index]
    return mask


def group_mask(theta: Array, kept: int, group: int) -> Mask:
    """N largest of each M consecutive entries of the second axis, ties by their key."""
    flat = np.arange(theta.size).reshape(theta.shape)
    mask = np.zeros(theta.size, bool)
    for start in range(0, theta.shape[1], group):
        for row, *rest in product(*map(range, (theta.shape[0], *theta.shape[2:]))):
            index: tuple[slice | int, ...] = (row, slice(start, start + group), *rest)
            mask[ranked(theta, map(int, flat[index]))[:kept]] = True
    return mask.reshape(theta.shape)


def _block(index: tuple[int, ...], block: tuple[int, int]) -> tuple[slice | int, ...]:
    i, j, *rest = index
    rows, columns = block
    return (
        slice(i * rows, (i + 1) * rows),
        slice(j * columns, (j + 1) * columns),
        *rest,
    )


def penalty(form: str, theta: Array, forward: Mask, backward: Mask, density: float) -> float:
    """Σ c_i·‖θ_i‖ with c = 1 on A, 1/D on B∖A, 0 on C, in its three readings."""
    if form == "group_l2":
        exploring = theta[backward & ~forward]
        return float(
            math.sqrt((theta[forward] ** 2).sum()) + math.sqrt((exploring**2).sum()) / density
        )
    total = 0.0
    for value, coefficient in _terms(theta, forward, backward, density):
        total += coefficient * (0.5 * value**2 if form == "l2" else abs(value))
    return total


def penalty_gradient(
    form: str, theta: Array, forward: Mask, backward: Mask, density: float
) -> Array:
    """c_i θ_i (l2), c_i sign θ_i (l1), θ/‖θ_A‖ and θ/(D‖θ_{B∖A}‖) (group_l2; 0 at norm 0)."""
    gradient = np.zeros(theta.shape)
    sets = ((forward, 1.0), (backward & ~forward, 1.0 / density))
    for mask, coefficient in sets:
        norm = math.sqrt((theta[mask] ** 2).sum())
        for index in zip(*np.nonzero(mask), strict=True):
            value = theta[index]
            gradient[index] = (
                coefficient
                * {
                    "l2": value,
                    "l1": np.sign(value),
                    "group_l2": value / norm if norm else 0.0,
                }[form]
            )
    return gradient


def _terms(
    theta: Array, forward: Mask, backward: Mask, density: float
) -> Iterator[tuple[float, float]]:
    for index in np.ndindex(*theta.shape):
        if backward[index]:
            yield float(theta[index]), 1.0 if forward[index] else 1.0 / density


def step_at_alpha(theta: Array, forward: Mask, backward: Mask, gradient: Array, lr: float) -> Array:
    """Δθ_i = −η g_i on B with g the gradient at α, 0 elsewhere."""
    after: Array = np.array(theta)
    for index in np.ndindex(*theta.shape):
        if backward[index]:
            after[index] = theta[index] - lr * gradient[index]
    return after


def stored_order(forward: Mask, backward: Mask, block: tuple[int, int]) -> list[list[int]]:
    """Flat indices of the stored blocks: those of A, then of B∖A, each in row-major order."""
    order = []
    for mask in (forward, backward & ~forward):
        for i, j in product(range(0, mask.shape[0], block[0]), range(0, mask.shape[1], block[1])):
            if mask[i, j]:
                within = product(range(i, i + block[0]), range(j, j + block[1]))
                order.append([row * mask.shape[1] + column for row, column in within])
    return order


def sparse_products(
    theta: Array, forward: Mask, backward: Mask, x: Array, g: Array
) -> tuple[Array, Array, Array]:
    """Y = x·αᵀ, ∂/∂x = g·α and (∂/∂θ)_ij = Σ_b g_bi x_bj on B, with α = θ·1_A."""
    y, for_x = np.zeros((len(x), theta.shape[0])), np.zeros(x.shape)
    for_theta = np.zeros(theta.shape)
    for i, j in np.ndindex(*theta.shape):
        if forward[i, j]:
            y[:, i] += theta[i, j] * x[:, j]
            for_x[:, j] += theta[i, j] * g[:, i]
        if backward[i, j]:
            for_theta[i, j] = sum(g[:, i] * x[:, j])
    return y, for_x, for_theta
