"""What rules with a history share: the words of feeding, warm-up, patience, the cap, schedules."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip import thresholds
from optclip.thresholds import accepted, clipped, ema_ratio, raw, winsorized
from tests.methods import norms


def limits(rule, sizes):
    """The limits of a rule over a sequence of scalar sizes, and its last memory."""

    def step(memory, size):
        limit, memory = rule.update(size, memory, None)
        return memory, limit

    memory, out = jax.jit(lambda s: jax.lax.scan(step, rule.init(s[0]), s))(jnp.asarray(sizes, jnp.float32))
    return np.asarray(out), memory


@pytest.mark.parametrize(
    "feeding, fed",
    [(raw, 100.0), (clipped, 2.0), (winsorized(3.0), 6.0), (accepted, None)],
    ids=["raw", "clipped", "winsorized", "accepted"],
)
def test_what_a_spike_feeds(feeding, fed):
    rule = ema_ratio(2.0, 0.9, feeding=feeding, warmup=2)
    _, memory = limits(rule, [1.0] * 20 + [100.0])
    mean = 1.0 if fed is None else 0.9 * 1.0 + 0.1 * fed
    assert float(memory.inner.mean) == pytest.approx(mean, rel=1e-6)
    assert int(memory.entered) == (20 if fed is None else 21)


def test_the_warm_up_has_a_static_limit_and_takes_raw_sizes():
    """And a static limit is no reason to lose patience: the warm-up would never end."""
    out, _ = limits(ema_ratio(2.0, warmup=3, warmup_limit=0.5, patience=2), [4.0, 4.0, 4.0, 4.0])
    np.testing.assert_allclose(out, [0.5, 0.5, 0.5, 8.0])


def test_patience_counts_clips_in_a_row_and_starts_afresh():
    rule = ema_ratio(2.0, warmup=1, patience=3, feeding=accepted)
    sizes = [1.0, 1.0, 9.0, 9.0, 1.0, 9.0, 9.0, 9.0, 9.0]
    out, memory = limits(rule, sizes)
    np.testing.assert_allclose(out, [np.inf, 2, 2, 2, 2, 2, 2, np.inf, 18])
    assert int(memory.entered) == 2
    held, _ = limits(ema_ratio(2.0, warmup=1, patience=None, feeding=accepted), sizes)
    np.testing.assert_allclose(held[1:], 2.0)


def test_zeros_are_no_news_unless_patience_is_off():
    _, mended = limits(ema_ratio(2.0, warmup=1), [1.0, 0.0, 0.0])
    _, paper = limits(ema_ratio(2.0, warmup=1, patience=None), [1.0, 0.0, 0.0])
    assert int(mended.entered) == 1 and int(paper.entered) == 3
    assert float(mended.inner.mean) == 1.0 and float(paper.inner.mean) < 0.5


@pytest.mark.parametrize("odd", [np.nan, np.inf])
@pytest.mark.parametrize("feeding", [raw, clipped, winsorized(3.0), accepted])
def test_a_size_that_is_not_finite_changes_nothing(odd, feeding):
    rule = thresholds.zscore(warmup=3, feeding=feeding)
    sizes = norms.healthy(60)
    _, before = limits(rule, sizes)
    _, after = limits(rule, [*sizes, odd, odd])
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_the_cap_bounds_limits_but_not_the_memory():
    sizes = norms.healthy(100)
    free, memory = limits(thresholds.zscore(warmup=5), sizes)
    capped, memory_capped = limits(thresholds.zscore(warmup=5, cap=1.1), sizes)
    np.testing.assert_array_equal(capped, np.minimum(free, np.float32(1.1)))
    jax.tree.map(np.testing.assert_array_equal, memory, memory_capped)


def test_schedules_count_steps_also_those_that_feed_nothing():
    ratio = optax.piecewise_constant_schedule(2.0, {3: 5.0})
    out, memory = limits(ema_ratio(ratio, warmup=1, feeding=accepted), [1.0, 1.0, 50.0, 50.0, 1.0])
    np.testing.assert_allclose(out, [np.inf, 2, 2, 10, 10])
    assert int(memory.step) == 5
    cap = optax.piecewise_constant_schedule(1.0, {2: 3.0})
    out, _ = limits(thresholds.past_percentile(50.0, 3, cap=cap), [9.0, 9.0, 9.0])
    np.testing.assert_allclose(out, [1, 1, 3])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: optclip.autoclip(101.0), r"autoclip\(percent=101.0\): percent must be in \[0, 100\]"),
        (lambda: optclip.autoclip(window=0), r"autoclip\(window=0\): window must be an integer >= 1"),
        (lambda: optclip.zclip(patience=0), r"zclip\(patience=0\): patience must be an integer >= 1"),
        (lambda: optclip.zclip(warmup=0), r"zclip\(warmup=0\): warmup must be an integer >= 1"),
        (lambda: optclip.zclip(max_norm=0.0), r"zclip\(max_norm=0.0\): max_norm must be > 0"),
        (lambda: optclip.zclip(decay=1.0), r"zclip\(decay=1.0\): decay must be in \[0, 1\)"),
        (lambda: optclip.clip_by_quantile(1.0), r"clip_by_quantile\(quantile=1.0\): quantile must be in \(0, 1\)"),
        (lambda: optclip.clip_by_median(0.0), r"clip_by_median\(ratio=0.0\): ratio must be > 0"),
        (lambda: optclip.percentile_clipping(100), r"percentile_clipping\(percentile=100\): .* in \[0, 100\)"),
        (lambda: optclip.clip_by_percentile(max_norm=-1.0), r"clip_by_percentile\(max_norm=-1.0\)"),
        (lambda: thresholds.past_percentile(5.0, cap=-1.0), r"past_percentile\(cap=-1.0\)"),
        (lambda: optclip.clip_by_ema_sigma(first_limit=0.0), r"clip_by_ema_sigma\(first_limit=0.0\)"),
        (lambda: optclip.clip_by_historical_norm(window=1), r"clip_by_historical_norm\(window=1\)"),
        (lambda: thresholds.window_zscore(ddof=-1), r"window_zscore\(ddof=-1\)"),
        (lambda: winsorized(-1.0), r"winsorized\(factor=-1.0\)"),
    ],
)
def test_bad_arguments_raise_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_windows_count_in_int32():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        for tx in (optclip.autoclip(window=40), optclip.percentile_clipping(window=8)):
            grads = {"a": jnp.ones(3, jnp.float32), "b": jnp.ones(4, jnp.float32)}
            state = tx.init(grads)
            chex.assert_trees_all_equal_shapes_and_dtypes(jax.jit(tx.update)(grads, state)[1], state)
