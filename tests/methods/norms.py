"""Sequences of norms, and what a method makes of gradients that have them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def healthy(steps: int = 400, seed: int = 0) -> np.ndarray:
    """Norms that fall during a warm-up, then scatter by a fifth around 1, with a spike now and then."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal(scale=0.2, size=steps)) * (1 + 3 * np.exp(-np.arange(steps) / 10))
    sizes[60::45] *= 40
    return sizes.astype(np.float32)


def eventful(steps: int = 400, seed: int = 1) -> np.ndarray:
    """`healthy` norms with zeros, NaN, infinities, a tiny one, and a tenfold shift of the level up, then down."""
    sizes = healthy(steps, seed)
    sizes[130:132] *= 30
    sizes[220:] *= 10
    sizes[320:] /= 30
    sizes[[70, 150, 151, 290]] = 0
    sizes[[100, 260, 261]] = np.nan
    sizes[[101, 340]] = np.inf
    sizes[170] = 1e-12
    return sizes


def run(tx: Any, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any]:
    """Norms after the clip, limits, and the last state, for gradients of one component with the norms ``sizes``."""

    def step(state: Any, size: jax.Array) -> tuple[Any, Any]:
        updates, state = tx.update({"b": jnp.zeros((2, 1)), "w": jnp.stack([-size, jnp.zeros_like(size)])}, state)
        return state, (jnp.max(jnp.abs(updates["w"])), jax.tree.leaves(state.stats.limits)[-1])

    init = tx.init({"b": jnp.zeros((2, 1)), "w": jnp.zeros(2)})
    state, (norms, limits) = jax.jit(lambda sizes: jax.lax.scan(step, init, sizes))(jnp.asarray(sizes))
    return np.asarray(norms), np.asarray(limits), state


def check(tx: Any, oracle: Any, sizes: np.ndarray, rtol: float = 2e-6) -> None:
    """Compares every step: ``oracle(size)`` returns the limit of a finite size and takes it into its history."""
    norms, limits, _ = run(tx, sizes)
    clips = 0
    for i, size in enumerate(sizes.astype(np.float64)):
        if not np.isfinite(size):
            assert np.isnan(norms[i]), f"step {i}"
            continue
        limit = oracle(size)
        clips += size > limit
        np.testing.assert_allclose(limits[i], limit, rtol=rtol, err_msg=f"limit of step {i}")
        np.testing.assert_allclose(norms[i], min(size, limit), rtol=rtol, atol=1e-38, err_msg=f"norm of step {i}")
    assert 0 < clips < len(sizes), "a sequence on which nothing, or everything, is clipped shows little"


def check_healthy(method: Any, sizes: np.ndarray | None = None, **kwargs: Any) -> None:
    """The mend changes no bit of a healthy run."""
    sizes = healthy() if sizes is None else sizes
    mended, _, _ = run(method(**kwargs), sizes)
    paper, _, _ = run(method(**kwargs, patience=None), sizes)
    np.testing.assert_array_equal(mended, paper)


def first_pass(tx: Any, before: np.ndarray, level: float, steps: int) -> int:
    """After ``before``, how many steps at ``level`` are clipped first; ``steps`` if all are."""
    norms, _, _ = run(tx, np.concatenate([before, np.full(steps, level)]).astype(np.float32))
    passed = norms[len(before) :] >= level * (1 - 1e-6)
    return int(np.argmax(passed)) if passed.any() else steps
