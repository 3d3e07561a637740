"""The picture: the norm over time with its limit, how it is distributed, and which leaf it came from."""

import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from optclip import _checks, sketch
from optclip._finite import meant
from optclip._observe import ObserveState, find, part_names

BLUE, ORANGE, RED, GREY = "#0072B2", "#E69F00", "#D55E00", "#666666"  # told apart by colour-blind eyes (Okabe, Ito)
COLUMNS, LABELS = 400, 40  # of the heat map


class _Series(NamedTuple):
    """Steps one by one, oldest first; T steps, n parts."""

    step: np.ndarray
    norm: np.ndarray
    limit: np.ndarray  # infinite where there is none
    clipped: np.ndarray
    parts: np.ndarray  # (T, n)
    names: list[str]


def plot(source: Any, *, limit: Any = None) -> Any:
    """Draws the norm over time (log axis) with its limit and the clipped steps, its distribution, and a map of leaves.

    When to use: to see in one look whether a limit fits: how often it clips, how far, and for whose sake. Needs
    matplotlib (``pip install optclip[plot]``), which is imported only here.

    Args:
      source: one of
        an optimizer state with `observe` in it: with ``history`` the last steps one by one, without it the level over
        the whole run and each leaf's share;
        a list of the dicts that `summary` returned, step by step, or one such dict of arrays, as ``lax.scan`` stacks
        them (``per_leaf=True`` gives the map);
        an array of norms.
      limit: a number or an array (one per step) to draw where the source has no limit of its own.

    Returns:
      A ``matplotlib.figure.Figure``: ``plot(state).savefig("norm.png")``.

    Example:
      >>> figure = optclip.plot([1.0, 2.0, 30.0, 1.5], limit=3.0)
      >>> len(figure.axes)
      2
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install optclip[plot]") from error
    if limit is not None:
        _checks.check_limits("plot", "limit", limit)
    series, state = _read(source)
    if series is None:
        assert state is not None
        return _draw_sketch(Figure(layout="constrained"), state, limit)
    if limit is not None:
        limits = np.where(np.isfinite(series.limit), series.limit, np.asarray(limit, np.float64))
        series = series._replace(limit=limits, clipped=series.clipped | (series.norm > limits))
    return _draw_series(Figure(layout="constrained"), series)


def _read(source: Any) -> tuple[_Series | None, ObserveState | None]:
    if isinstance(source, Mapping) and any(str(k).endswith("/preclip_norm") for k in source):
        return _from_summaries(source), None
    if isinstance(source, (list, tuple)) and source and all(isinstance(row, Mapping) for row in source):
        common = [k for k in source[0] if all(k in row for row in source)]
        if any(str(k).endswith("/preclip_norm") for k in common):
            return _from_summaries({k: np.stack([np.asarray(row[k]) for row in source]) for k in common}), None
        if isinstance(source, list):  # a tuple may be an optimizer state
            raise ValueError("plot needs a clipper's keys in every dict, as summary returns them")
    if isinstance(source, list) or getattr(source, "ndim", 0) == 1:
        norm = np.asarray(source, np.float64)
        if not norm.size:
            raise ValueError("plot: nothing to draw, the list is empty")
        none = np.full(norm.shape, np.inf)
        return _Series(np.arange(len(norm)), norm, none, np.zeros(norm.shape, bool), norm[:, None][:, :0], []), None
    state = find(source)
    now = int(state.course.step)
    if state.recent is None or now == 0:
        return None, state
    size = len(state.recent.norm)
    steps = np.arange(max(0, now - size), now)
    norm, parts, limit, clipped = (np.asarray(x)[steps % size] for x in state.recent)
    return _Series(steps, norm.astype(np.float64), meant(limit), clipped, parts, part_names(state)), state


def _from_summaries(summaries: Mapping[str, Any]) -> _Series:
    table = {k: np.atleast_1d(np.asarray(v)) for k, v in summaries.items()}
    name = next(k for k in table if k.endswith("/preclip_norm")).removesuffix("/preclip_norm")
    norm, limit, clipped = (table[f"{name}/{k}"] for k in ("preclip_norm", "limit", "clipped"))
    paths = [k for k in table if k.startswith(f"{name}/preclip_norm/") and np.ndim(table[k]) == 1]
    parts = np.stack([table[k] for k in paths], 1) if paths else np.zeros((len(norm), 0))
    names = [k.removeprefix(f"{name}/preclip_norm/") for k in paths]
    return _Series(np.arange(len(norm)), norm.astype(np.float64), limit, clipped.astype(bool), parts, names)


def _draw_series(figure: Any, series: _Series) -> Any:
    n = len(series.names) if len(series.names) > 1 else 0
    over_time, spread, below = _panels(figure, n)
    step, norm, limit, clipped = series.step, series.norm, series.limit, series.clipped
    drawn = np.isfinite(norm) & (norm > 0)
    over_time.plot(step, np.where(drawn, norm, np.nan), color=BLUE, lw=0.8, label="norm before the clip")
    if np.isfinite(limit).any():
        shown = np.where(np.isfinite(limit), limit, np.nan)
        over_time.plot(step, shown, color=ORANGE, lw=1.6, label="limit", drawstyle="steps-post")
    hit = clipped & drawn
    if hit.any():
        label = f"clipped ({100 * np.mean(clipped):.3g} % of steps)"
        over_time.scatter(step[hit], norm[hit], s=9, color=RED, zorder=3, linewidths=0, label=label)
    bad = ~np.isfinite(norm)
    if bad.any():
        over_time.plot(
            step[bad], np.full(bad.sum(), 0.97), "x", color="black", ms=6, mew=1.5, ls="", clip_on=False,
            transform=over_time.get_xaxis_transform(), label=f"NaN or infinite ({bad.sum()})",
        )  # fmt: skip
    _time_axis(over_time, norm[drawn], limit)
    if drawn.any():
        low, high = norm[drawn].min(), norm[drawn].max()
        bins = np.geomspace(low / 1.001, high * 1.001, 41)
        counts = [norm[drawn & ~clipped], norm[hit]]
        spread.hist(counts, bins, orientation="horizontal", stacked=True, color=[BLUE, RED])
    _spread_axis(spread, limit[-1])
    if n:
        _heat_map(figure, below, series)
        over_time.sharex(below)
        over_time.tick_params(labelbottom=False)
    else:
        over_time.set_xlabel("step")
    return figure


def _draw_sketch(figure: Any, state: ObserveState, limit: Any) -> Any:
    names = part_names(state)
    n = len(names) if len(names) > 1 else 0
    over_time, spread, below = _panels(figure, min(n, 12))
    stride, step = int(state.course.stride), int(state.course.step)
    count, level = np.asarray(state.course.entered), np.asarray(state.course.level, np.float64)
    starts = np.arange(len(level) + 1) * stride
    values = np.where(count > 0, 2.0**level, np.nan)
    over_time.stairs(values, np.minimum(starts, step), baseline=None, color=BLUE, lw=1.6,
                     label="geometric mean of the norm" + (f" over {stride} steps" if stride > 1 else ""))  # fmt: skip
    limits = np.asarray(np.inf if limit is None else limit, np.float64).reshape(-1)
    if np.isfinite(limits[-1]):
        above = 100 * float(sketch.fraction_above(state.norm, limits[-1]))
        over_time.axhline(limits[-1], color=ORANGE, lw=1.6, label=f"limit (clips {above:.3g} % of the steps)")
    low, high = float(meant(state.norm.low)), float(state.norm.high)
    ends = np.array([x for x in (low, high) if 0 < x < np.inf])
    _time_axis(over_time, ends, limits)
    over_time.set_xlabel("step")
    edges, counts = sketch.edges(state.norm), np.asarray(state.norm.counts)
    beyond = edges[:-1] >= limits[-1]
    spread.stairs(np.where(beyond, 0, counts), edges, orientation="horizontal", fill=True, color=BLUE)
    spread.stairs(np.where(beyond, counts, 0), edges, orientation="horizontal", fill=True, color=RED)
    _spread_axis(spread, limits[-1])
    if n:
        order = np.argsort(-np.asarray(state.share))[:12]
        shares, peaks = (100 * np.asarray(x)[order] for x in (state.share, state.peak))
        rows = np.arange(len(order))
        below.barh(rows - 0.2, shares, 0.4, color=BLUE, label="mean over the run")
        below.barh(rows + 0.2, peaks, 0.4, color=ORANGE, label="largest step")
        below.set_yticks(rows, _short([names[i] for i in order]), fontsize=9)
        below.invert_yaxis()
        below.set_xlabel("share of the squared norm (%)" + (f", the 12 largest of {n}" if n > 12 else ""))
        below.legend(frameon=False, loc="lower right")
        below.spines[["top", "right"]].set_visible(False)
    return figure


def _panels(figure: Any, n: int) -> tuple[Any, Any, Any]:
    """Norm over time and its distribution side by side on one axis, and room for ``n`` parts below."""
    height = float(np.clip(0.2 * n, 1.6, 5.0)) if n else 0.0
    figure.set_size_inches(10, 3.4 + height)
    grid = figure.add_gridspec(2 if n else 1, 2, width_ratios=[5, 1], height_ratios=[3.4, height] if n else [1])
    over_time = figure.add_subplot(grid[0, 0])
    spread = figure.add_subplot(grid[0, 1], sharey=over_time)
    return over_time, spread, figure.add_subplot(grid[1, 0]) if n else None


def _time_axis(axis: Any, norms: np.ndarray, limits: np.ndarray) -> None:
    axis.set_yscale("log")
    seen = np.concatenate([norms, limits[np.isfinite(limits)]])
    if len(seen):
        low, high = seen.min(), seen.max()
        room = max((high / low) ** 0.08, 1.15)
        axis.set_ylim(low / room, high * room)
    axis.set_ylabel("gradient norm")
    axis.figure.legend(frameon=False, loc="outside upper center", ncols=4, handlelength=1.5)
    axis.grid(axis="y", color="0.92")
    axis.margins(x=0)
    axis.spines[["top", "right"]].set_visible(False)


def _spread_axis(axis: Any, limit: Any) -> None:
    if np.isfinite(limit):
        axis.axhline(limit, color=ORANGE, lw=1.6)
    axis.set_xlabel("steps")
    axis.tick_params(labelleft=False)
    axis.spines[["top", "right"]].set_visible(False)


def _heat_map(figure: Any, axis: Any, series: _Series) -> None:
    from matplotlib.colors import LogNorm

    order = sorted(range(len(series.names)), key=lambda i: _natural(series.names[i]))
    names = _short([series.names[i] for i in order])
    parts = np.where(np.isfinite(series.parts) & (series.parts > 0), series.parts, 0)[:, order].astype(np.float64)
    width = -(-len(parts) // COLUMNS)
    starts = np.arange(0, len(parts), width)
    columns = np.maximum.reduceat(parts, starts, axis=0)  # the largest of each few steps, so that no spike is lost
    shown = np.ma.masked_equal(columns, 0)
    ends = [*series.step[starts], series.step[-1] + 1]
    rows = np.arange(len(names) + 1) - 0.5
    low = max(shown.min(), shown.max() * 1e-6) if shown.count() else 1.0
    high = max(shown.max(), low * 10) if shown.count() else 10.0
    image = axis.pcolormesh(ends, rows, shown.T, norm=LogNorm(low, high), cmap="cividis", rasterized=True)
    axis.set_facecolor("0.85")
    ticks = np.arange(0, len(names), -(-len(names) // LABELS))
    axis.set_yticks(ticks, [names[i] for i in ticks], fontsize=9 if len(ticks) < 20 else 7)
    axis.invert_yaxis()
    axis.set_xlabel("step")
    label = "norm" if width == 1 else f"norm, largest of {width}"
    scale = axis.inset_axes((1.03, 0, 0.02, 1))
    scale.set_in_layout(False)  # it lies in the free corner below the distribution
    bar = figure.colorbar(image, cax=scale, label=label)
    bar.outline.set_visible(False)


def _natural(name: str) -> list[Any]:
    """A key that sorts block_2 before block_10."""
    return [(0, int(x), "") if x.isdigit() else (1, 0, x) for x in re.split(r"(\d+)", name)]


def _short(names: list[str], width: int = 36) -> list[str]:
    """The names without the folders they share, and no longer than ``width``."""
    folders = zip(*(name.split("/")[:-1] for name in names), strict=False)
    shared = len(list(itertools.takewhile(lambda level: len(set(level)) == 1, folders)))
    names = ["/".join(name.split("/")[shared:]) for name in names]
    return [x if len(x) <= width else f"{x[: width // 2 - 1]}…{x[-width // 2 :]}" for x in names]
