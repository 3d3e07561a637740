"""The pieces: products between terms, single equations at random shapes, what `explain` says."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optclip import per_example as pe
from optclip.per_example import _batch, _convolution, _norms
from optclip.per_example._labels import regroup
from optclip.per_example._terms import Axis, Dense, Factored, OneHot, Term, materialize_term

from . import zoo
from .test_exact import compare

QUICK = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def draw_term(random, kind, shape):
    """A random term of the given shape (n, d, k): stacked dense layers, one array, or rows of a table."""
    sizes = dict(zip("ndk", shape, strict=True), t=random.randint(1, 4))
    names = {name: 100 * random.randint(1, 10**6) + i for i, name in enumerate(sizes)}

    def array(labels):
        labels = random.permutation(list(labels))
        return Dense(jnp.asarray(random.randn(*(sizes[x] for x in labels))), tuple(names[x] for x in labels))

    if kind == "dense":
        factors = (array("ntd"), array("ntk"))
    elif kind == "rows":
        ids = jnp.asarray(random.randint(0, sizes["d"], (sizes["n"], sizes["t"])))
        factors = (OneHot(ids, (names["n"], names["t"]), names["d"], sizes["d"]), array("ntk"))
    else:
        factors = (array("ndk"),)
    return Term(factors, tuple(Axis((names[x],)) for x in "ndk"))


@settings(max_examples=3, **QUICK)
@given(seed=st.integers(0, 10**6))
@pytest.mark.parametrize(
    "kinds", [("dense", "dense"), ("dense", "rows"), ("rows", "rows"), ("array", "rows"), ("array", "dense")]
)
def test_inner_products(kinds, x64, seed):
    random = np.random.RandomState(seed)
    shape = [random.randint(1, 5) for _ in range(3)]
    a, b = (draw_term(random, kind, shape) for kind in kinds)
    wanted = np.sum(materialize_term(a) * materialize_term(b))
    np.testing.assert_allclose(_norms.inner(a, b), wanted, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(_norms.inner(a, a), np.sum(np.square(materialize_term(a))), rtol=1e-10)


def test_places():
    """Slices of a stack: apart they are orthogonal, together or overlapping they are not."""
    term = draw_term(np.random.RandomState(0), "dense", (1, 3, 4))
    at = lambda i, n: Term(term.factors, (Axis(term.axes[0].labels, i, n - 1 - i), *term.axes[1:]))
    square = float(np.sum(np.square(materialize_term(term))))
    for i in range(3):
        for j in range(3):
            np.testing.assert_allclose(_norms.inner(at(i, 3), at(j, 3)), square * (i == j), rtol=1e-5)
    wide = draw_term(np.random.RandomState(1), "dense", (2, 3, 4))
    moved = Term(wide.factors, (Axis(wide.axes[0].labels, 1, 0), *wide.axes[1:]))
    whole = Term(wide.factors, (Axis(wide.axes[0].labels, 0, 1), *wide.axes[1:]))
    wanted = np.sum(materialize_term(moved) * materialize_term(whole))
    np.testing.assert_allclose(_norms.inner(moved, whole), wanted, rtol=1e-5)


@settings(max_examples=8, **QUICK)
@given(seed=st.integers(0, 10**6))
def test_reshapes(seed):
    random = np.random.RandomState(seed)
    shape = [int(random.choice([1, 2, 4, 6])) for _ in range(3)]
    term = draw_term(random, "dense", shape)
    new = shape
    for _ in range(4):  # split and merge at random
        i = random.randint(len(new))
        if new[i] % 2 == 0 and random.rand() < 0.5:
            new = [*new[:i], 2, new[i] // 2, *new[i + 1 :]]
        elif i + 1 < len(new):
            new = [*new[:i], new[i] * new[i + 1], *new[i + 2 :]]
        else:
            new = [*new, 1]
    changed = regroup(term, new)
    wanted = materialize_term(term).reshape(new)
    if changed is not None:
        np.testing.assert_allclose(materialize_term(changed), wanted, rtol=1e-6)


@settings(max_examples=8, **QUICK)
@given(seed=st.integers(0, 10**6))
def test_dot_general_in_every_order(seed, x64):
    random = np.random.RandomState(seed)
    batch, both, left, right = (list(names[: random.randint(0, 3)]) for names in ("ab", "cd", "ef", "gh"))
    sizes = {name: random.randint(1, 4) for name in "abcdefgh"}
    x, w = random.permutation([*batch, *both, *left]), random.permutation([*batch, *both, *right])
    out = random.permutation([*batch, *left, *right])
    spec = f"{''.join(x)},{''.join(w)}->{''.join(out)}"
    swapped = f"{''.join(w)},{''.join(x)}->{''.join(out)}"
    params = jnp.asarray(random.randn(*(sizes[i] for i in w)))
    batch = jnp.asarray(random.randn(3, *(sizes[i] for i in x)))
    loss = lambda w, x: jnp.sum(jnp.sin(jnp.einsum(spec, x[0], w)) + jnp.cos(jnp.einsum(swapped, w, x[0])))
    compare(loss, params, batch, 1e-10)


def test_an_array_alone_is_summed_in_float32():
    """Over examples and over steps, also if it is narrower."""
    random = np.random.RandomState(0)
    array, coefs = jnp.asarray(random.randn(8, 3, 5), jnp.bfloat16), jnp.asarray(random.rand(8), jnp.float32)
    value = Factored((Term((Dense(array, (0, 1, 2)),), (Axis((2,)),)),), (5,), jnp.bfloat16)
    wanted = np.einsum("n,ntd->d", np.asarray(coefs, np.float64), np.asarray(array, np.float64))
    np.testing.assert_allclose(_batch.contract(value, 0, coefs, None), wanted, rtol=1e-5)


@pytest.mark.parametrize("name", ["convolution", "convolution_1d_3d", "depthwise_and_shared_convolution"])
def test_convolutions_position_by_position(name, x64, monkeypatch):
    """The way other devices than CPUs take."""
    monkeypatch.setattr(_convolution, "_by_example", _convolution._by_position)
    compare(*zoo.build(name, seed=3), 1e-10)


def rules(name, seed=0):
    loss, params, batch = zoo.build(name, seed, jnp.float32)
    return {row.leaf: row.rule for row in pe.explain(loss)(params, batch).rows}


def test_explain_names_the_rules():
    w, ids = jnp.ones((64, 64)), jnp.zeros((4, 3), int)
    loss = lambda p, x: jnp.mean(jnp.tanh(p["e"][x] @ p["w"] + p["b"]) @ p["v"]) + jnp.sum(jnp.sort(p["s"]))
    params = {"e": jnp.ones((90, 64)), "w": w, "b": jnp.ones(64), "v": jnp.ones((64, 2)), "s": jnp.ones(9), "u": w}
    table = pe.explain(loss)(params, ids)
    assert {row.leaf: row.rule for row in table.rows} == {
        "['e']": "one-hot",
        "['w']": "gram",
        "['b']": "as it stands (reduce_sum)",
        "['v']": "direct",
        "['s']": "as it stands (scatter-add)",
        "['u']": "zero",
    }
    kept = {row.leaf: row.bytes for row in table.rows}
    assert kept["['w']"] == 4 * 3 * (64 + 64) * 4 and kept["['u']"] == 0
    assert str(table).splitlines()[0].split() == ["leaf", "shape", "rule", "Mflop", "MiB", "kept", "MiB", "vmap(grad)"]
    assert rules("tied_embedding")["['e']"] in ("joint", "direct")
    looped = rules("scanned_checkpoints", seed=2)
    assert all(rule.endswith("in a loop") for rule in looped.values())


def test_low_rank_updates_cost_nothing_for_the_base():
    base = jnp.ones((512, 512))
    loss = lambda p, x: jnp.mean(jnp.tanh(x @ base + (x @ p["a"]) @ p["b"]))
    table = pe.explain(loss)({"a": jnp.ones((512, 4)), "b": jnp.ones((4, 512))}, jnp.ones((8, 2, 512)))
    assert table.total.bytes < 8 * 4 * 4 * (512 + 4) * 4
