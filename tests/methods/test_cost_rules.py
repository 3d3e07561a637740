"""A rule per leaf costs next to nothing beyond the static clip per leaf: bytes accessed, counted by the compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optclip
from optclip import measures, thresholds

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts of XLA:CPU")
LEAVES = {f"layer{i}": jnp.zeros((64, 128)) for i in range(24)}


def cost(tx):
    state = tx.init(LEAVES)
    analysis = jax.jit(tx.update).lower(LEAVES, state, LEAVES).compile().cost_analysis()
    return analysis["bytes accessed"]


STATIC = {
    2: lambda: optclip.clip_by_leaf_norm(1.0),
    np.inf: lambda: optclip.clip_by(
        lambda tree: measures.leaf_norm(tree, np.inf), thresholds.fixed(1.0), optclip.responses.press
    ),
}
RULES = {
    "adagc": (2, lambda: optclip.adagc()),
    "adagn": (2, lambda: optclip.adagn()),
    "gradient_stabilizer": (2, lambda: optclip.gradient_stabilizer()),
    "norm_growth_limiter": (2, lambda: optclip.norm_growth_limiter()),
    "adaclip": (np.inf, lambda: optclip.adaclip()),
    "ema_ratio": (2, lambda: optclip.clip_by(measures.leaf_norm, thresholds.ema_ratio(2.0))),
    "order_statistic": (2, lambda: optclip.percentile_clipping()),
    "quantile_tracker": (2, lambda: optclip.clip_by_quantile(measure=measures.leaf_norm)),
    "zscore": (2, lambda: optclip.zclip(measure=measures.leaf_norm)),
}  # fmt: skip


@pytest.fixture(scope="module")
def static():
    return {ord: cost(make()) for ord, make in STATIC.items()}


@pytest.mark.parametrize("name", RULES)
def test_at_most_a_tenth_more_than_the_static_clip(name, static):
    ord, make = RULES[name]
    assert cost(make()) <= 1.1 * static[ord]


def test_the_measure_of_cost_sees_a_second_pass(static):
    assert cost(optclip.mars_clip()) > 1.3 * static[2]
