"""The soft responses against their formulas in float64, over all sizes and limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optclip import responses
from optclip.measures import global_norm

LARGEST = float(np.finfo(np.float32).max)
FORMULAS = {
    "rescale": lambda s, c: min(s, c),
    "smooth": lambda s, c: s / (1 + s / c),
    "square_root": lambda s, c: s / np.hypot(1, s / c),
    "tanh": lambda s, c: c * np.tanh(s / c),
    "arsinh": lambda s, c: c * np.arcsinh(min(s / c, LARGEST)),
    "log1p": lambda s, c: c * np.log1p(min(s / c, LARGEST)),
    "normalize": lambda s, c: c,
}
SIZES = [1e-30, 1e-12, 1e-4, 0.3, 1.0, 1.7, 40.0, 1e6, 1e19, 1e30, 3e38]
LIMITS = [1e-30, 1e-15, 1e-3, 1.0, 7.0, 1e15, 1e30]


@pytest.mark.parametrize("name", FORMULAS)
def test_the_new_size(name):
    size, limit = (np.float32(x) for x in np.meshgrid(SIZES, LIMITS))
    got = jax.jit(getattr(responses, name))(-size, size, limit)
    with np.errstate(over="ignore"):
        want = np.vectorize(FORMULAS[name])(size.astype(np.float64), limit.astype(np.float64))
    near = want / size < 1e57  # further up, no two float32 factors reach
    np.testing.assert_allclose(-got[near], want[near], rtol=3e-6, atol=2e-38)


@pytest.mark.parametrize("name", FORMULAS)
def test_zero_infinity_and_nan(name):
    response = getattr(responses, name)
    f = lambda *x: float(response(*map(jnp.float32, x)))
    assert f(0.0, 0.0, 1.0) == 0 and f(0.0, 0.0, 0.0) == 0 and f(1.0, 1.0, 0.0) == 0
    assert f(3.0, 3.0, np.inf) == 3
    assert np.isnan(f(1.0, np.nan, 1.0)) and np.isnan(f(1.0, np.inf, 1.0)) and np.isnan(f(1.0, np.inf, np.inf))
    assert np.isnan(f(1.0, 1.0, np.nan))


@pytest.mark.parametrize("name", ["rescale", "normalize", "smooth"])
@pytest.mark.parametrize("size, limit, slope", [(1.0, 0.0, 0.0), (1e30, 0.0, 0.0), (1e30, 1e-20, 1.0)])
def test_the_derivative_far_out(name, size, limit, slope):
    """Of the clip of a size, by the size and by the limit; also where the factor is beyond float32."""
    f = lambda s, c: getattr(responses, name)(s, s, c)
    by_size, by_limit = jax.grad(f, (0, 1))(jnp.float32(size), jnp.float32(limit))
    assert by_size == 0 and by_limit == pytest.approx(slope)


@pytest.mark.parametrize("name", ["smooth", "square_root", "tanh", "arsinh", "log1p"])
def test_smooth_everywhere(name):
    """Slope 1 at zero, rising, below the identity, and a derivative that differences confirm."""
    f = lambda s: getattr(responses, name)(s, s, jnp.ones_like(s))
    sizes = jnp.linspace(0, 20, 400)
    slopes = jax.vmap(jax.grad(lambda s: f(s)))(sizes)
    assert slopes[0] == pytest.approx(1)
    assert np.all(np.diff(slopes) <= 1e-6) and np.all(slopes >= -1e-6)
    middle = np.diff(f(sizes)) / np.diff(sizes)
    np.testing.assert_allclose((slopes[1:] + slopes[:-1]) / 2, middle, atol=2e-3)
    assert np.all(f(sizes)[1:] < sizes[1:])
    grad = jax.grad(lambda g: jnp.sum(getattr(responses, name)(g, global_norm(g), jnp.float32(1))))(jnp.zeros(3))
    np.testing.assert_array_equal(grad, 1)


def test_floored():
    f = lambda s, c, delta: float(responses.floored(delta)(jnp.float32(s), jnp.float32(s), jnp.float32(c)))
    assert f(4.0, 1.0, 0.5) == 2 and f(4.0, 3.0, 0.5) == 3 and f(1.0, 3.0, 0.5) == 1
    assert f(4.0, 1.0, 0.0) == 1 and f(4.0, 1.0, 1.0) == 4
    assert np.isnan(f(np.inf, 1.0, 0.5)) and np.isnan(f(np.nan, 1.0, 0.5))
    with pytest.raises(ValueError, match=r"floored\(delta=1.5\): delta must be in \[0, 1\]"):
        responses.floored(1.5)


def test_clamp():
    u = np.array([-3.0, 1e-40, -1e-45, 0.5, np.inf, np.nan], np.float32)
    for clamp in (responses.clamp, jax.jit(responses.clamp)):
        got = np.asarray(clamp(u, jnp.float32(1), jnp.float32(2)))
        np.testing.assert_array_equal(got.view(np.int32)[1:4], u.view(np.int32)[1:4])
        np.testing.assert_array_equal(got[[0, 4, 5]], [-2, 2, np.nan])


def test_press():
    u = jnp.array([-8.0, 2.0, 0.5, 0.0])
    np.testing.assert_array_equal(responses.press(u, jnp.float32(8), jnp.float32(2)), [-2, 2, 0.5, 0])
    assert np.all(np.isnan(responses.press(u, jnp.float32(np.nan), jnp.float32(2))))
