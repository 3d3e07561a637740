"""The pictures: every source draws what it holds, with names, marks and limits where they belong."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optclip

STEPS = 60


def run(names, tx, bad=()):
    """The states and summaries of a short run over leaves of these names."""
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(size=(STEPS, len(names)))).astype(np.float32)
    for step in bad:
        scale[step] = np.nan
    grads = {name: scale[:, i] for i, name in enumerate(names)}

    def step(state, grad):
        state = tx.update(grad, state)[1]
        return state, optclip.summary(state, per_leaf=True)

    state = tx.init({name: jnp.zeros(()) for name in names})
    return *jax.jit(lambda s, g: jax.lax.scan(step, s, g))(state, grads), scale


NAMES = ["net/block_1/w", "net/block_2/w", "net/block_10/w"]


@pytest.fixture(scope="module")
def clipped_run():
    return run(NAMES, optclip.observe(optclip.clip_by_global_norm(2.0), history=40), bad=[50])


def labels(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_history_shows_norm_limit_clipped_steps_and_failures(clipped_run):
    state, _, scale = clipped_run
    figure = optclip.plot(state)
    norms = np.linalg.norm(scale, axis=1)[-40:]
    over_time, spread, heat = figure.axes[:3]
    line, limit, bad = over_time.lines
    np.testing.assert_array_equal(line.get_xdata(), np.arange(20, 60))
    np.testing.assert_allclose(line.get_ydata(), norms, rtol=1e-5)
    np.testing.assert_array_equal(limit.get_ydata(), 2.0)
    np.testing.assert_array_equal(bad.get_xdata(), [50])
    marks = over_time.collections[0].get_offsets()
    np.testing.assert_array_equal(marks[:, 0], np.arange(20, 60)[norms > 2.0])
    share = 100 * (np.sum(norms > 2.0) + 1) / 40  # the NaN counts as beyond its limit
    clipped = f"clipped ({share:.3g} % of steps)"
    assert labels(figure) == ["norm before the clip", "limit", clipped, "NaN or infinite (1)"]
    assert over_time.get_yscale() == "log" and over_time.get_ylabel() == "gradient norm"
    assert spread.get_xlabel() == "steps" and heat.get_xlabel() == "step"
    assert [t.get_text() for t in heat.get_yticklabels()] == ["block_1/w", "block_2/w", "block_10/w"]


def test_heat_map_shows_each_leaf_in_its_row(clipped_run):
    state, _, scale = clipped_run
    heat = optclip.plot(state).axes[2].collections[0].get_array()
    want = np.ma.masked_invalid(scale[-40:].T)
    np.testing.assert_allclose(heat, want, rtol=1e-6)
    np.testing.assert_array_equal(np.ma.getmaskarray(heat), np.ma.getmaskarray(want))


def test_summaries_draw_the_same(clipped_run):
    _, summaries, scale = clipped_run
    rows = [{k: float(v[i]) for k, v in summaries.items()} for i in range(STEPS)]
    for source in (summaries, rows):
        over_time = optclip.plot(source).axes[0]
        np.testing.assert_allclose(over_time.lines[0].get_ydata(), np.linalg.norm(scale, axis=1), rtol=1e-5)
        np.testing.assert_array_equal(over_time.lines[1].get_ydata(), 2.0)


def test_summaries_per_leaf_have_a_map():
    _, summaries, scale = run(NAMES, optclip.clip_by_leaf_norm(1.0))
    figure = optclip.plot(summaries)
    np.testing.assert_allclose(figure.axes[2].collections[0].get_array(), scale.T, rtol=1e-6)


def test_numbers_and_a_limit():
    figure = optclip.plot(jnp.array([1.0, 4.0, 0.0, 2.0]), limit=3.0)
    over_time = figure.axes[0]
    np.testing.assert_array_equal(over_time.lines[0].get_ydata(), [1.0, 4.0, np.nan, 2.0])
    np.testing.assert_array_equal(over_time.collections[0].get_offsets(), [[1.0, 4.0]])
    assert "clipped (25 % of steps)" in labels(figure)


def test_without_history_the_course_and_the_shares():
    state, _, scale = run(NAMES, optclip.observe())
    figure = optclip.plot(state, limit=2.0)
    over_time, _, shares = figure.axes
    values, edges, _ = over_time.patches[0].get_data()
    logs = np.log2(np.linalg.norm(scale, axis=1))
    np.testing.assert_allclose(values[:30], 2 ** logs.reshape(30, 2).mean(1), rtol=1e-4)
    assert edges[-1] == STEPS and labels(figure)[0] == "geometric mean of the norm over 2 steps"
    widths = [bar.get_width() for bar in shares.patches[:3]]
    np.testing.assert_allclose(widths, 100 * np.sort(np.asarray(state.share))[::-1], rtol=1e-5)
    assert shares.get_xlabel() == "share of the squared norm (%)"


@pytest.mark.parametrize("n", [1, 3, 300])
def test_draws_few_and_many_leaves(n, tmp_path):
    names = [f"{'decoder/' * (n > 1)}a_rather_long_module_name/layer_{i}/attention/kernel" for i in range(n)]
    rng = np.random.default_rng(0)
    parts = np.exp(rng.normal(size=(1000, n)))
    table = {f"clip/preclip_norm/{name}": parts[:, i] for i, name in enumerate(names)} if n > 1 else {}
    table |= {"clip/preclip_norm": parts.max(1), "clip/limit": np.full(1000, np.inf), "clip/clipped": np.zeros(1000)}
    figure = optclip.plot(table)
    path = tmp_path / "norm.png"
    figure.savefig(path)
    assert path.stat().st_size > 10_000
    if n > 1:
        ticks = [t.get_text() for t in figure.axes[2].get_yticklabels()]
        assert len(ticks) <= 40 and all(len(t) <= 37 for t in ticks) and len(set(ticks)) == len(ticks)
    boxes = [a.get_window_extent() for a in figure.axes[:3]]
    assert all(b.width > 80 and b.height > 80 for b in boxes)  # nothing is squeezed out


@pytest.mark.parametrize("norms", [[0.0, 0.0], [np.nan], [1.0], [np.inf, 1e30, 1e-30]])
def test_odd_runs_can_be_drawn(norms, tmp_path):
    optclip.plot(norms).savefig(tmp_path / "norm.png")


def test_a_state_that_has_seen_nothing_can_be_drawn(tmp_path):
    for history in (0, 5):
        state = optclip.observe(history=history).init({"a": jnp.zeros(2), "b": jnp.zeros(2)})
        optclip.plot(state).savefig(tmp_path / f"{history}.png")


def test_says_what_is_missing(monkeypatch):
    with pytest.raises(ValueError, match="observe"):
        optclip.plot(optclip.clip_by_global_norm(1.0).init({"a": jnp.zeros(2)}))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"optclip\[plot\]"):
        optclip.plot([1.0])


def test_odd_sources_are_named_or_drawn():
    tx = optclip.clip_by_global_norm(1.0)
    _, state = tx.update(jnp.ones(4), tx.init(jnp.ones(4)))
    step = optclip.summary(state)
    for source in ([{**step, "eval": 1.0}, step], (step, step), step):
        assert optclip.plot(source).axes
    for source, error, words in (
        ([], ValueError, "the list is empty"),
        ([{"loss": 1.0}], ValueError, "plot needs a clipper's keys"),
    ):
        with pytest.raises(error, match=words):
            optclip.plot(source)
    with pytest.raises(ValueError, match=r"plot\(limit=-3.0\): limit must be > 0"):
        optclip.plot([1.0, 2.0], limit=-3.0)
