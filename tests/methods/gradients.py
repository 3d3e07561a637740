"""Sequences of gradients with two leaves, and the comparison of every step with a float64 oracle."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Grads = dict[str, np.ndarray]  # stacked over steps


def healthy(steps: int = 320, seed: int = 0) -> Grads:
    """Leaves whose level falls in the beginning, with spikes of a whole leaf and of single elements."""
    rng = np.random.default_rng(seed)
    level = 0.3 + np.exp(-np.arange(steps) / 10)
    grads = {"a": rng.normal(size=(steps, 2, 3)), "b": rng.normal(size=(steps, 4))}
    grads = {k: np.float32(x * level.reshape((-1,) + (1,) * (x.ndim - 1))) for k, x in grads.items()}
    grads["a"][110::45] *= 40
    grads["b"][120::70, 1] *= 300
    return grads


def eventful(steps: int = 320, seed: int = 1) -> Grads:
    """`healthy` gradients with zeros, NaN, infinities, tiny ones and a tenfold shift of the level."""
    grads = healthy(steps, seed)
    grads["b"][:12] = 0  # a leaf that is idle at first
    grads["a"][:45, 0, 0] = 0  # an element that is
    grads["b"][150:160] = 0
    grads["a"][100, 1, 1] = np.nan
    grads["b"][130:132, 2] = np.inf
    grads["b"][180] *= 1e-12
    for leaf in grads.values():
        leaf[220:] *= 10
    return grads


def run(tx: Any, grads: Grads, params: Any = None) -> tuple[Grads, Any]:
    """The updates of every step, and the last state."""
    start = tx.init({k: x[0] for k, x in grads.items()} if params is None else params)
    step = lambda state, grad: tx.update(grad, state, params)[::-1]
    state, updates = jax.jit(lambda grads: jax.lax.scan(step, start, grads))(grads)
    return jax.tree.map(np.asarray, updates), state


def check(tx: Any, oracle: Callable[[Any], Any], grads: Grads, params: Any = None, rtol: float = 1e-5) -> Grads:
    """Compares every step with ``oracle``, which maps the gradients of a step in float64 to updates."""
    updates, state = run(tx, grads, params)
    changed = 0
    for i in range(len(grads["a"])):
        want = oracle({k: x[i].astype(np.float64) for k, x in grads.items()})
        for k, x in want.items():
            scale = np.max(np.abs(x), initial=0, where=np.isfinite(x))
            np.testing.assert_allclose(updates[k][i], x, rtol=0, atol=rtol * scale, err_msg=f"step {i}, leaf {k}")
            changed += not np.allclose(x, grads[k][i], rtol=1e-4)
    assert changed > 3, "nothing was clipped"
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(memory(state))), "non-finite memory"
    return updates


def memory(state: Any) -> Any:
    """A state without its statistics and without the state of an inner optimizer."""
    fields = state._asdict()
    rest = {k: x for k, x in fields.items() if k not in ("clip", "stats", "inner")}
    return (fields["clip"].rule if "clip" in fields else (), rest)


def by_leaf(make: Callable[[], Callable[[np.ndarray], np.ndarray]]) -> Callable[[Any], Any]:
    """An oracle with a memory of its own for each leaf; one that is not finite becomes NaN and is not shown to it."""
    memories: dict[str, Callable[[np.ndarray], np.ndarray]] = {}

    def step(grads: Any) -> Any:
        out = {}
        for k, g in grads.items():
            oracle = memories.setdefault(k, make())
            out[k] = oracle(g) if np.all(np.isfinite(g)) else np.full_like(g, np.nan)
        return out

    return step


def shrink(x: np.ndarray, size: float, limit: float) -> np.ndarray:
    """x * min(1, limit / size)."""
    return x if size <= limit else x * (limit / size)


def check_healthy(method: Any, rtol: float = 0.0, **kwargs: Any) -> None:
    """The mend changes no bit of a healthy run (or only what the compiler rounds differently)."""
    mended, _ = run(method(**kwargs), healthy())
    paper, _ = run(method(**kwargs, patience=None), healthy())
    for k in mended:
        np.testing.assert_allclose(mended[k], paper[k], rtol=rtol, atol=0)
