"""How the contract runs a case: jitted once, over sequences of gradients, with comparisons that see every bit."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import optclip
from tests.cases import CASES, GRADS, PARAMS, Case

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def row(*values: Any, ordinary: bool, id: str | None = None) -> Any:
    """A row of a matrix that is too wide for the ordinary run: part of that, or of the slow run alone."""
    return pytest.param(*values, id=id, marks=() if ordinary else pytest.mark.slow)


def some_of_the_cases(turn: int, of: int = 2) -> Any:
    """Parametrizes over one case in ``of``, from ``turn`` on; the others are part of the slow run."""
    rows = [row(case, ordinary=i % of == turn) for i, case in enumerate(CASES)]
    return pytest.mark.parametrize("case", rows, ids=lambda case: case.name)


def cases(**fields: Any) -> Any:
    """Parametrizes over the cases with these values of their fields (or, for a callable, where it holds)."""
    holds = lambda case: all(f(getattr(case, k)) if callable(f) else getattr(case, k) == f for k, f in fields.items())
    return pytest.mark.parametrize("case", [c for c in CASES if holds(c)], ids=lambda case: case.name)


def run(tx: Any, grads: Iterable[Any], params: Any = PARAMS, state: Any = None) -> tuple[list[Any], list[Any]]:
    """The updates and the states of one step after the other, all by one compiled program."""
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state = tx.init(params) if state is None else state
    updates, states = [], []
    for grad in grads:
        out, state = update(grad, state, params)
        updates.append(out)
        states.append(state)
    return updates, states


_ran: dict[tuple[str, Callable[..., Any]], tuple[list[Any], list[Any]]] = {}


def standard_run(case: Case, dtypes: Callable[[Any], Any] = lambda tree: tree) -> tuple[list[Any], list[Any]]:
    """`run` of a case over `GRADS`, computed once; ``dtypes`` maps the trees to the dtypes to run in."""
    key = (case.name, dtypes)
    if key not in _ran:
        _ran[key] = run(case.make(), map(dtypes, GRADS), dtypes(PARAMS))
    return _ran[key]


def halves(tree: Any) -> Any:
    """The standard tree in half precision, of both kinds."""
    return {"dense": cast(tree["dense"], ml_dtypes.bfloat16), "head": cast(tree["head"], np.float16)}


HALF_ULP = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}


def limit_value(case: Case) -> float:
    """The limit-like argument of a case: what the row says, or the default."""
    assert case.limit is not None
    default = inspect.signature(getattr(optclip, case.public)).parameters[case.limit].default
    return float(case.kwargs.get(case.limit, default))


def cast(tree: Any, dtype: Any) -> Any:
    """The tree in one dtype, as NumPy arrays."""
    return jax.tree.map(lambda x: np.asarray(x).astype(dtype), tree)


def scaled(tree: Any, factor: float) -> Any:
    """The tree times a factor, in its dtypes."""
    return jax.tree.map(lambda x: (np.asarray(x, np.float64) * factor).astype(x.dtype), tree)


def avals(tree: Any) -> Any:
    """Shapes, dtypes and weak types, for comparison."""
    aval = lambda x: (jnp.shape(x), jnp.result_type(x), bool(getattr(jax.typeof(x), "weak_type", False)))
    return jax.tree.structure(tree), [aval(x) for x in jax.tree.leaves(tree)]


def assert_bits(got: Any, want: Any, where: str = "") -> None:
    """Equal to the last bit, signs of zero and payloads of NaN aside (any NaN is a NaN)."""
    assert jax.tree.structure(got) == jax.tree.structure(want), where
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype, (where, path, a.dtype, b.dtype)
        np.testing.assert_array_equal(_order(a), _order(b), err_msg=f"{where}{jax.tree_util.keystr(path)}")


def _order(x: np.ndarray) -> np.ndarray:
    """Floats as the integers that count them, so that NumPy neither flushes nor forgives."""
    if x.dtype.kind == "c":
        return np.stack([_order(x.real), _order(x.imag)])
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    bits = np.where(x == 0, np.zeros_like(x), np.where(np.isnan(x), np.full_like(x, np.nan), x))
    return np.ascontiguousarray(bits).view(f"i{x.dtype.itemsize}")


def assert_close(got: Any, want: Any, rtol: float, atol: float = 0.0, where: str = "") -> None:
    """Close in every leaf, relative to the largest entry of the leaf, in float64; the structures agree."""
    assert jax.tree.structure(got) == jax.tree.structure(want), where
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        wide = np.complex128 if np.iscomplexobj(a) else np.float64
        a, b = np.asarray(a).astype(wide), np.asarray(b).astype(wide)
        scale = np.max(np.abs(b), initial=0.0, where=np.isfinite(b)) if b.size else 0.0
        bound = rtol * scale + atol
        np.testing.assert_allclose(a, b, rtol=0, atol=bound, err_msg=f"{where}{jax.tree_util.keystr(path)}")


def finite(tree: Any) -> bool:
    """Whether no floating entry of the tree is NaN or infinite."""
    return all(np.all(np.isfinite(np.asarray(x).astype(np.float64))) for x in jax.tree.leaves(tree) if _floats(x))


def has_nan(tree: Any) -> bool:
    """Whether a floating entry of the tree is NaN."""
    return any(np.any(np.isnan(np.asarray(x).astype(np.float64))) for x in jax.tree.leaves(tree) if _floats(x))


def _floats(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def total(tree: Any) -> jax.Array:
    """A smooth scalar of all floating leaves, to take derivatives of."""
    return sum((jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)), jnp.zeros((), jnp.float32))
