"""Nobody can make a rule's memory non-finite or stuck: every rule of the shelf, fed arbitrary sequences of sizes."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from optclip import thresholds


class Row(NamedTuple):
    """What a rule states: a constant level is accepted after ``steps`` steps, up to a factor of ``slack``, for good."""

    rule: str
    kwargs: dict[str, Any]
    steps: int
    slack: float = 1.0
    accepts: Callable[[Any, Any, float], Any] = lambda size, limit, slack: size / slack <= limit * (1 + 1e-5)

    def make(self) -> thresholds.Threshold:
        return getattr(thresholds, self.rule)(**self.kwargs)


ROWS = [
    Row("ema_band", {"high": 1.5}, 0, slack=1 / 0.9),
    # Without the static limit of its warm-up, which holds whatever lies beyond it.
    Row("ema_from_min", {"ratio": 2.0, "decay": 0.5, "warmup": 5, "warmup_limit": np.inf, "patience": 10}, 20),
    Row("ema_ratio", {"ratio": 2.0, "warmup": 5, "patience": 10}, 15),
    Row("ema_sigma", {"patience": 10}, 11),
    Row("growth_ratio", {"ratio": 1.5, "patience": 10}, 15),
    Row("median_ratio", {"ratio": 2.0, "window": 20}, 30),
    # Its first moment falls to a new level by 0.6 in a step, and the second follows it every 20.
    Row("moment_ratio", {"b1": 0.6, "b2": 0.999, "debias": True, "patience": 20}, 320,
        accepts=lambda size, limit, slack: limit >= 0.2),
    Row("order_statistic", {"rank": 5, "window": 20}, 15),
    Row("past_percentile", {"percent": 95.0, "window": 20}, 20),
    Row("percentile", {"percent": 10.0, "window": 20}, 20),
    Row("quantile_tracker", {"patience": 10}, 10, slack=float(np.exp(0.2))),
    Row("running_mean", {"decay": 0.9, "patience": 10}, 35, slack=1.1),
    # Its limit grows 2.4 times in a step; the sizes here span 60 decades, 70 where subnormal ones are not flushed.
    Row("spike_ratio", {}, 165 if jax.default_backend() == "cpu" else 190),
    Row("window_zscore", {"z": 6.0, "window": 16, "warmup": 4}, 2),
    Row("zscore", {"warmup": 5, "patience": 10}, 15),
]  # fmt: skip

WITHOUT_MEMORY = {"fixed", "param_ratio", "trust_ratio"}
NO_RULES = {"Feed", "History", "Threshold", "accepted", "clipped", "history", "per_size", "raw", "reciprocal", "to_max",
            "to_mean", "winsorized"}  # fmt: skip
LENGTH, AFTER = 60, 10

TINY = float(np.finfo(np.float32).tiny)
FREAKS = [0.0, 1e-45, TINY, 1e-20, 1e20, 3e38, float(np.finfo(np.float32).max), np.inf, np.nan]
values = st.one_of(st.sampled_from(FREAKS), st.floats(-30, 30).map(lambda e: 10.0**e), st.floats(0.5, 2.0))
segments = st.lists(st.tuples(values, st.integers(1, 30)), min_size=1, max_size=12)
levels = st.one_of(st.just(1.0), st.floats(-30, 30).map(lambda e: 10.0**e))


def test_every_rule_has_a_row():
    rules = {row.rule for row in ROWS}
    assert rules | WITHOUT_MEMORY | NO_RULES == set(thresholds.__all__)
    for name in NO_RULES & rules:
        pytest.fail(f"{name} is no rule")


@cache
def runner(rule: str) -> tuple[Row, Any, Any]:
    """The row of a rule, its first memory, and a compiled run: sizes to limits, and the memory at each step."""
    row = next(row for row in ROWS if row.rule == rule)
    threshold = row.make()

    def step(memory: Any, size: jax.Array) -> tuple[Any, Any]:
        limit, memory = threshold.update(size, memory, None)
        return memory, (limit, memory)

    memory = threshold.init(jax.ShapeDtypeStruct((), jnp.float32))
    return row, memory, jax.jit(lambda sizes: jax.lax.scan(step, memory, sizes)[1])


@pytest.mark.parametrize("rule", [row.rule for row in ROWS])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(parts=segments, level=levels)
@example(parts=[(1.0, 60)], level=10.0)
@example(parts=[(1.0, 60)], level=0.1)
@example(parts=[(0.0, 60)], level=1.0)
@example(parts=[(1e-38, 60)], level=1e30)
@example(parts=[(1.0, 40), (np.nan, 3), (np.inf, 3)], level=1.0)
@example(parts=[(1.0, 40), (3e38, 1), (1e-30, 1)], level=1.0)
def test_memory_stays_finite_and_a_level_is_accepted(rule, parts, level):
    row, first, run = runner(rule)
    before = np.repeat([v for v, _ in parts], [n for _, n in parts])[:LENGTH].astype(np.float32)
    before = np.concatenate([np.full(LENGTH - len(before), before[0]), before])
    sizes = np.concatenate([before, np.full(row.steps + AFTER, level)]).astype(np.float32)
    limits, memories = run(sizes)

    measured = np.isfinite(sizes) & ((sizes == 0) | (sizes > 4 * TINY))  # less is flushed to zero on the way
    assert np.all(np.asarray(limits)[measured] > 0)
    for start, now in zip(jax.tree.leaves(first), jax.tree.leaves(memories), strict=True):
        finite = np.isfinite(np.asarray(now))
        assert np.all(finite | ~np.isfinite(np.asarray(start))), "not finite, and no more the empty memory"

    end = slice(LENGTH + row.steps, None)
    accepted = row.accepts(sizes[end], np.asarray(limits, np.float64)[end], row.slack)
    assert np.all(accepted), "not accepted in the stated steps"


@pytest.mark.parametrize("rule", [row.rule for row in ROWS])
def test_one_rule_at_every_scope(rule):
    """A tree of scalars, of arrays and of both gives each size the limit it has alone."""
    row, _, run = runner(rule)
    length = LENGTH + row.steps + AFTER
    sizes = np.exp(np.random.default_rng(0).normal(size=(length, 3))).astype(np.float32)
    threshold = row.make()
    tree = {"a": jnp.asarray(sizes[:, 0]), "b": {"c": jnp.asarray(sizes[:, 1:, None]), "d": jnp.asarray(sizes[:, 0])}}

    def step(memory: Any, size: Any) -> tuple[Any, Any]:
        limits, memory = threshold.update(size, memory, None)
        return memory, limits

    memory = threshold.init(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree))
    limits = jax.jit(lambda tree: jax.lax.scan(step, memory, tree)[1])(tree)
    alone = [np.asarray(run(sizes[:, i])[0]) for i in range(3)]
    for got, want in ((limits["a"], alone[0]), (limits["b"]["d"], alone[0]), (limits["b"]["c"][:, 0, 0], alone[1]),
                      (limits["b"]["c"][:, 1, 0], alone[2])):  # fmt: skip
        np.testing.assert_allclose(got, want, rtol=1e-5)
