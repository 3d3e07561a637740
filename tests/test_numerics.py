"""Norms against NumPy in float64: over all magnitudes, dtypes and orders, on each kind of backend, with derivatives."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optclip
from optclip import _numerics, _vectors, measures

ORDS = (0.5, 1, 2, 3, np.inf)
BACKENDS = ("cpu", "gpu")  # which of the two programs; both run here


def draw(scale: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Small, packed, folded and library-sized leaves."""
    rng = np.random.default_rng(seed)
    shapes = {"scalar": (), "small": (3, 5), "vector": (1536,), "matrix": (96, 64), "empty": (0, 3)}
    return {k: (rng.uniform(0.25, 1, s) * rng.choice([-1, 1], s) * scale).astype(np.float32) for k, s in shapes.items()}


def norm(arrays: list[np.ndarray], ord: float) -> float:
    x = np.concatenate([np.abs(np.asarray(a, np.complex128)).ravel() for a in arrays])
    top = x.max(initial=0)
    return top if ord == np.inf or top in (0, np.inf) else top * np.sum((x / top) ** ord) ** (1 / ord)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    return request.param


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("scale", [1.0, 2e19, 1e20, 1e34, 3e-19, 1e-25, 1e-36, 0.0])
def test_any_magnitude(scale: float, ord: float, backend: str):
    if ord in (0.5, 1) and scale > 1e30:
        scale = 1e28  # the norm of so many elements must itself be a float32
    tree = draw(scale)
    assert measures.global_norm(tree, ord) == pytest.approx(norm(list(tree.values()), ord), rel=4e-6, abs=0)
    for key, size in measures.leaf_norm(tree, ord).items():
        assert size == pytest.approx(norm([tree[key]], ord), rel=4e-6, abs=0), key


@pytest.mark.parametrize("scale", [1.0, 1e20, 1e-25])
def test_units_of_all_magnitudes_side_by_side(scale: float, backend: str):
    x = draw(scale)["matrix"] * np.float32([1, 1e-12, 1e12, 0] * 16)
    sizes = np.asarray(measures.unit_norm([x])[0])
    np.testing.assert_allclose(sizes[0], [norm([column], 2) for column in x.T], rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_subnormal=False), min_size=7, max_size=7))
def test_any_finite_floats(values: list[float]):
    x = np.asarray(values, np.float32)
    got, expected = float(NORM(x)), norm([x], 2)
    if not np.isfinite(x).all():
        assert not np.isfinite(got)
    elif expected < 3.3e38:
        assert got == pytest.approx(expected, rel=1e-6, abs=0)


NORM = jax.jit(measures.global_norm)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("key", ["scalar", "vector", "matrix"])
def test_not_finite_is_seen(bad: float, ord: float, key: str, backend: str):
    tree = draw(1.0)
    tree[key] = np.array(tree[key])
    tree[key].reshape(-1)[-1] = bad
    assert not np.isfinite(measures.global_norm(tree, ord))
    finite = {k: bool(np.isfinite(s)) for k, s in measures.leaf_norm(tree, ord).items()}
    assert finite == {k: k != key for k in tree}


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e30, 1e-25])
def test_of_constants(scale: float, backend: str):
    """The compiler reckons with constants: of (x k)^2 it makes x^2 k^2, and of that of 0 it makes NaN."""
    tree = draw(scale)
    for measure in (measures.leaf_norm, measures.unit_norm):
        got, want = jax.jit(lambda measure=measure: measure(tree))(), measure(tree)
        chex.assert_trees_all_close(got, want, rtol=1e-6)
    assert jax.jit(lambda: _numerics.finite(tree["matrix"]))()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "complex64", "complex128"])
def test_dtypes(dtype: str, backend: str):
    # XLA:CPU adds up one by one what a GPU adds up as a tree.
    near = 1e-5 if backend == "gpu" and jax.devices()[0].platform == "cpu" and dtype.endswith("16") else 2e-6
    with jax.enable_x64(True):
        wide = dtype in ("float64", "complex128")
        for scale in (1e150, 1e-200) if wide else (100.0,):
            x = jnp.asarray(draw(1.0)["matrix"].astype("float64") * scale).astype(dtype)
            x = x * (1 + 1j) if dtype.startswith("complex") else x
            got = measures.global_norm([x])
            assert got.dtype == ("float64" if wide else "float32")
            assert float(got) == pytest.approx(norm([np.asarray(x)], 2), rel=1e-13 if wide else near, abs=0)


@pytest.mark.parametrize("ord", ORDS)
def test_complex_numbers_are_pairs(ord: float, backend: str):
    z = (draw(1.0)["small"] + 1j * draw(1.0, 1)["small"]).astype(np.complex64)
    assert measures.global_norm([z], ord) == pytest.approx(norm([z], ord), rel=4e-6)
    if ord >= 1:
        slope = jax.grad(lambda x, y: measures.global_norm([x + 1j * y], ord), (0, 1))(z.real, z.imag)
        unit = np.abs(z.astype(np.complex128)) / norm([z], ord)
        weight = (unit == unit.max()) if ord == np.inf else unit ** (ord - 1)
        want = [part / np.abs(z) * weight for part in (z.real, z.imag)]
        np.testing.assert_allclose(slope, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ord", [1.5, 2, 3])
@pytest.mark.parametrize("scale", [1.0, 1e20, 1e-25])
def test_derivatives(ord: float, scale: float, backend: str):
    for key in ("small", "matrix"):
        x, tangent = draw(scale)[key], draw(1.0, 1)[key]
        size = norm([x], ord)
        slope = np.sign(x) * (np.abs(x.astype(np.float64)) / size) ** (ord - 1)
        f = lambda x: measures.global_norm([x], ord)
        np.testing.assert_allclose(jax.jit(jax.grad(f))(x), slope, rtol=1e-5)
        np.testing.assert_allclose(jax.jvp(f, (x,), (tangent,))[1], np.sum(slope * tangent), rtol=1e-5)


@pytest.mark.parametrize("ord", ORDS)
def test_derivative_at_zero_is_zero(ord: float, backend: str):
    for shape in ((3,), (64, 64)):
        assert not np.any(jax.jit(jax.grad(lambda x: measures.global_norm([x], ord)))(jnp.zeros(shape)))


@pytest.mark.parametrize("tx", [optclip.clip_by_global_norm(1.0), optclip.adaptive_grad_clip(0.01), optclip.adagc()])
def test_derivatives_of_a_clip(tx: Any, monkeypatch: pytest.MonkeyPatch):
    """First and second derivatives, in reverse, of the program for a GPU are those of the CPU's."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    tree, weights = (jax.tree.map(jnp.asarray, draw(1.0, seed)) for seed in (0, 1))
    state = tx.init(tree)
    loss = lambda g: optax.tree.vdot(tx.update(g, state, tree)[0], weights)
    slope = lambda g: jax.tree.map(jnp.sum, jax.grad(loss)(g))["matrix"]
    got = jax.jit(jax.grad(loss))(tree), jax.jit(jax.grad(slope))(tree)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    jax.clear_caches()
    want = jax.jit(jax.grad(loss))(tree), jax.jit(jax.grad(slope))(tree)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_many_leaves_of_one_shape(scale: float, backend: str):
    leaves = [draw(scale * 10.0 ** (i % 5), i)["matrix"] for i in range(100)]
    np.testing.assert_allclose(measures.global_norm(leaves), norm(leaves, 2), rtol=1e-6)
    labels = [i % 3 for i in range(100)]
    sizes = measures.group_norm(leaves, labels)
    want = [norm([x for x, g in zip(leaves, labels, strict=True) if g == label], 2) for label in range(3)]
    np.testing.assert_allclose(sizes[:3], want, rtol=1e-6)


def test_large_leaves_of_one_number_are_summed_in_parts(backend: str):
    leaves = [np.full((1024, 1024), 0.37, np.float32)] * 2
    np.testing.assert_allclose(measures.global_norm(leaves), norm(leaves, 2), rtol=2e-5)


def test_vmap_is_a_loop(backend: str):
    for key in ("small", "matrix"):
        xs = np.stack([draw(s)[key] for s in (1.0, 1e20, 1e-25, 0.0)])
        np.testing.assert_allclose(jax.vmap(measures.global_norm)(xs), [norm([x], 2) for x in xs], rtol=1e-6)


def test_numbers_come_out_of_a_vector_in_order(backend: str):
    for n in (2, 32, 70):
        numbers, tangents = jax.jvp(_vectors.apart, (jnp.arange(1.0 * n),), (10 * jnp.arange(1.0 * n),))
        assert list(map(float, numbers)) == list(range(n)) and list(map(float, tangents)) == list(range(0, 10 * n, 10))
    leaves = [jnp.float32(1), jnp.full(2, 2.0), jnp.float32(3), jnp.full((1, 2), 4.0), jnp.float32(5)]
    for some in (leaves, leaves[:2], leaves[1:2], leaves[::2], []):
        packs, unpack = _vectors.pack(some)
        assert len(packs) == sum(x.ndim > 0 for x in some) + any(x.ndim == 0 for x in some)
        for got, want in zip(unpack(packs), some, strict=True):
            np.testing.assert_array_equal(got, want, strict=True)


def test_equal_shapes_are_traced_once():
    count = 0
    squares = _numerics._squares.norms

    def counted(*args: object) -> object:
        nonlocal count
        count += 1
        return squares(*args)

    tree = {"w": jnp.ones((11, 13)), "b": jnp.ones(17)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_numerics._squares, "norms", counted)
        jax.jit(lambda a, b: (measures.unit_norm(a), measures.unit_norm(b)))(tree, tree)
    assert count == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, np.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (70, 700)])
def test_finite_tells_the_largest_number_from_infinity(dtype, shape):
    top = float(ml_dtypes.finfo(np.float32 if dtype == np.complex64 else dtype).max)
    look = jax.jit(_numerics.finite)
    assert look(np.full(shape, top).astype(dtype)) and look(np.full(shape, -top).astype(dtype))
    if 0 not in shape:
        for bad in (np.nan, np.inf, -np.inf):
            x = np.full(shape, top).astype(dtype)
            x.reshape(-1)[-1] = bad
            assert not look(x), bad


SHAPES = [(), (1,), (31,), (33,), (1024,), (1025,), (4097,), (5003,), (70, 0), (0, 70), (97, 3), (4096, 2), (8, 33, 40)]


def every_axes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The first axes, one or more, and the last."""
    return [tuple(range(n)) for n in range(1, len(shape) + 1)] + [(-1,)] * (len(shape) > 0)


def sizes_of(x: jax.Array, ord: float) -> list[jax.Array]:
    """The norm of all, and the norms over `every_axes`, from one program."""
    units = lambda x: [measures.unit_norm(x, axis, ord) for axis in every_axes(x.shape)]
    return jax.jit(lambda x: [measures.global_norm(x, ord), *units(x)])(x)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64"])
def test_the_maximum_of_any_shape(dtype: str, backend: str):
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        x = jnp.asarray(rng.uniform(-1, 1, shape), jnp.float32).astype(dtype)
        wide = np.abs(np.asarray(x.astype(jnp.complex64)))
        whole, *units = sizes_of(x, np.inf)
        assert whole == wide.max(initial=0), shape
        for axes, got in zip(every_axes(shape), units, strict=True):
            want = wide.max(axis=axes, keepdims=True, initial=0)
            np.testing.assert_array_equal(got, want, err_msg=f"{shape} {axes}")
        for bad in (np.nan, -np.nan) if x.size else ():
            lost = x.ravel().at[-1].set(bad).reshape(shape)
            assert measures.global_norm(lost, np.inf) == np.inf, shape


@pytest.mark.parametrize("dtype", ["float16", "complex64"])
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_sums_of_squares_in_two_steps(dtype: str, backend: str):
    rng = np.random.default_rng(0)
    for shape in [*SHAPES, (300, 33), (64, 64), (4099, 3), (20, 30, 40)]:
        x = jnp.asarray(rng.uniform(-1, 1, shape), jnp.float32).astype(dtype)
        wide = np.abs(np.asarray(x.astype(jnp.complex64)).astype(np.complex128)) ** 2
        whole, *units = sizes_of(x, 2)
        np.testing.assert_allclose(whole, np.sqrt(wide.sum()), rtol=1e-6, err_msg=str(shape))
        for axes, got in zip(every_axes(shape), units, strict=True):
            want = np.sqrt(wide.sum(axis=axes, keepdims=True))
            np.testing.assert_allclose(got, want, rtol=1e-6, err_msg=f"{shape} {axes}")


@pytest.mark.parametrize("scale", [1.0, 1e25, 1e-25])
def test_units_beside_small_vectors_of_any_length(scale: float, backend: str):
    rng = np.random.default_rng(0)
    shapes = [(n,) for n in (0, 1, 31, 32, 33, 768, 1000, 1024, 1025, 2304, 3071, 4095)] + [(), (5, 7)]
    tree = [(rng.uniform(-1, 1, shape) * scale).astype(np.float32) for shape in shapes]
    for x, size in zip(tree, jax.jit(measures.unit_norm)(tree), strict=True):
        wide = np.sqrt(np.sum(np.square(x, dtype=np.float64), axis=0 if x.ndim else None, keepdims=True))
        np.testing.assert_allclose(size, wide, rtol=1e-6, err_msg=str(x.shape))


@pytest.mark.parametrize("axis", [None, 0, 1, (), (0, 2)])
@pytest.mark.parametrize("scale", [1.0, 1e25, 1e-25])
def test_units_of_many_small_leaves(scale: float, axis: Any, backend: str):
    rng = np.random.default_rng(0)
    shapes = [(3, 5, 2), (4, 4, 4), (3, 5, 2), (0, 3, 2), (3, 0, 2), (3, 0, 2), (0, 3, 2), (16, 16, 16), (3, 5, 2)] * 3
    tree = [(rng.uniform(-1, 1, shape) * scale).astype(np.float32) for shape in shapes]
    for x, size in zip(tree, jax.jit(lambda tree: measures.unit_norm(tree, axis))(tree), strict=True):
        wide = np.sqrt(np.sum(np.square(x, dtype=np.float64), axis=0 if axis is None else axis, keepdims=True))
        np.testing.assert_allclose(size, wide, rtol=1e-6, err_msg=str(x.shape))
