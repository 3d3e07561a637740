"""From a sketch to words: what a limit would have done, and which limit to take."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from optclip import sketch
from optclip._observe import ObserveState, find, part_names

LIGHT, HEAVY = 3.0, 10.0  # p99 / p50: below, one limit near p99 is a safety net; above, spikes are a way of life
MOVED = 3.0  # the highest quarter of a run over its lowest: beyond, no fixed limit suits all of it
DOMINANT, SOLE = 0.5, 0.9  # of the squared norm, on average and at the largest step: the whole norm is this leaf's
FEW, TOO_FEW = 100, 20  # steps


class LimitRow(NamedTuple):
    """A limit, the fraction of finite steps beyond it, and what the largest would have been multiplied by."""

    limit: float
    clipped: float
    strongest: float


class PartRow(NamedTuple):
    """A leaf (or group, ...): its mean share of the squared norm and that at the largest step, quantiles, failures."""

    name: str
    share: float
    peak: float
    p50: float
    p99: float
    nonfinite: int


@dataclasses.dataclass(frozen=True)
class Advice:
    """What `advise` found; print it for a table.

    Attributes:
      steps: finite steps seen.
      nonfinite: steps with a NaN or infinite norm.
      quantiles: the norm at 0 (smallest), 0.5, 0.9, 0.99 and 1 (largest).
      tail: p99 / p50.
      levels: the typical norm (geometric mean) in each quarter of the run.
      limits: what limits would have done, smallest limit first.
      parts: the leaves by their share of the norm, largest first.
      threshold: the suggested limit for a fixed clipper, or None.
      suggestion: the suggested method, as code, or None.
      reasons: why, in sentences.
    """

    steps: int
    nonfinite: int
    quantiles: dict[float, float]
    tail: float
    levels: tuple[float, ...]
    limits: tuple[LimitRow, ...]
    parts: tuple[PartRow, ...]
    threshold: float | None
    suggestion: str | None
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        lost = f", {self.nonfinite} more not finite" if self.nonfinite else ""
        heads = ["smallest", "p50", "p90", "p99", "largest", "p99 / p50"]
        blocks = [
            f"Gradient norm over {self.steps} step{'s' if self.steps != 1 else ''}{lost}",
            _table(heads, [[_number(x) for x in (*self.quantiles.values(), self.tail)]]),
            _table(
                ["a limit of", "would have clipped", "the largest step to"],
                [[_number(r.limit), _percent(r.clipped), f"{_number(r.strongest)} x"] for r in self.limits],
            ),
        ]
        if len(self.parts) > 1:
            heads = ["part of the norm²", "mean", "largest step", "p50", "p99", "not finite"]
            rows = [
                [p.name, _percent(p.share), _percent(p.peak), _number(p.p50), _number(p.p99), str(p.nonfinite)]
                for p in self.parts[:8]
            ]
            rest = self.parts[8:]
            if rest:
                shares = [_percent(sum(p.share for p in rest)), _percent(sum(p.peak for p in rest))]
                rows.append([f"{len(rest)} more", *shares, "", "", str(sum(p.nonfinite for p in rest))])
            blocks.append(_table(heads, rows))
        blocks.append("\n".join([f"Suggestion: {self.suggestion or 'none'}", *(f"- {r}" for r in self.reasons)]))
        return "\n\n".join(blocks)


def advise(opt_state: Any) -> Advice:
    """Reads the sketch in an optimizer state: what a limit would have done, which leaves matter, what to try.

    The suggestion is a rule of thumb, spelled out: of four leaves or more, one with half of the squared norm (or 90 %
    of it in the largest step) asks for a limit per leaf; a level that moved threefold between quarters of the run for a
    limit that follows; else one fixed limit does, at p99 if the tail is light (p99 < 3 p50), p95, or p90 if it is heavy
    (p99 > 10 p50). NaN or infinity asks for `skip_nonfinite` around the optimizer.

    When to use: after some hundred steps with `observe` in the chain, unclipped if the run allows it. All fractions
    speak of the run that was seen: a clipped run takes another course, often with smaller norms.

    Args:
      opt_state: any optimizer state with an `ObserveState` in it, concrete (not under jit).

    Returns:
      An `Advice`; ``print`` it.

    Example:
      >>> tx = optclip.observe()
      >>> g = {"w": jnp.array([3.0, 4.0])}
      >>> print(str(optclip.advise(tx.update(g, tx.init(g))[1])).splitlines()[0])
      Gradient norm over 1 step
    """
    state = find(opt_state)
    steps, nonfinite = int(np.sum(state.norm.counts)), int(state.norm.nonfinite)
    quantiles = {q: float(sketch.quantile(state.norm, q)) for q in (0.0, 0.5, 0.9, 0.99, 1.0)}
    tail = quantiles[0.99] / quantiles[0.5] if quantiles[0.5] > 0 else float("nan")
    levels, parts = _levels(state), _parts(state)
    suggested = _suggest(state, steps, nonfinite, tail, levels, parts)
    return Advice(steps, nonfinite, quantiles, tail, levels, _limits(state, steps), parts, *suggested)


def _limits(state: ObserveState, steps: int) -> tuple[LimitRow, ...]:
    if not steps or not float(state.norm.high) > 0:
        return ()
    at = [float(sketch.quantile(state.norm, q)) for q in (0.5, 0.75, 0.9, 0.95, 0.99, 0.999)]
    limits = sorted({_round(x) for x in at if x > 0} | {1.0})
    strongest = lambda x: min(1.0, x / float(state.norm.high))
    return tuple(LimitRow(x, float(sketch.fraction_above(state.norm, x)), strongest(x)) for x in limits)


def _parts(state: ObserveState) -> tuple[PartRow, ...]:
    p50, p99 = sketch.quantile(state.parts, 0.5), sketch.quantile(state.parts, 0.99)
    columns = (np.asarray(x).tolist() for x in (state.share, state.peak, p50, p99, state.parts.nonfinite))
    rows = [PartRow(*row) for row in zip(part_names(state), *columns, strict=True)]
    return tuple(sorted(rows, key=lambda row: -row.share))


def _levels(state: ObserveState) -> tuple[float, ...]:
    """The geometric mean of the norm in each quarter of the run; shorter if quarters are empty."""
    stretches = -(-int(state.course.step) // int(state.course.stride))
    level, count = (np.asarray(x, np.float64)[:stretches] for x in (state.course.level, state.course.entered))
    quarters = zip(np.array_split(level, 4), np.array_split(count, 4), strict=True)
    return tuple(float(2 ** (np.sum(x * n) / np.sum(n))) for x, n in quarters if np.sum(n))


def _suggest(
    state: ObserveState, steps: int, nonfinite: int, tail: float, levels: tuple[float, ...], parts: tuple[PartRow, ...]
) -> tuple[float | None, str | None, tuple[str, ...]]:
    reasons = []
    if nonfinite:
        share, worst = _percent(nonfinite / (steps + nonfinite)), max(parts, key=lambda p: p.nonfinite)
        reasons.append(
            f"{nonfinite} steps ({share}) had a NaN or infinite norm, most often in {worst.name}: no clipper mends "
            "those, skip_nonfinite leaves them out."
        )
    if steps < TOO_FEW or not tail > 0:
        reasons.append(f"{steps} finite steps are too few, or too many of them zero, to suggest a limit.")
        return None, None, tuple(reasons)
    if steps < FEW:
        reasons.append(f"Only {steps} steps were seen: p99 is little more than a guess.")
    q, word = (0.99, "light") if tail < LIGHT else (0.95, "medium") if tail < HEAVY else (0.9, "heavy")
    reasons.append(f"The tail is {word}: p99 is {_number(tail)} times the median.")
    threshold = _round(float(sketch.quantile(state.norm, q)))
    clipped = _percent(float(sketch.fraction_above(state.norm, threshold)))
    fixed = (
        f"optclip.clip_by_global_norm({threshold:g})",
        f"One fixed limit near p{100 * q:g} suits the whole run; it would have clipped {clipped} of the steps.",
    )
    method, why = _per_part(parts, threshold) or _following(levels, tail) or fixed
    if nonfinite:
        method = f"optclip.skip_nonfinite(optax.chain({method}, optimizer))"
    return threshold, method, (*reasons, why)


def _per_part(parts: tuple[PartRow, ...], threshold: float) -> tuple[str, str] | None:
    top, spike = parts[0], max(parts, key=lambda p: p.peak)
    if len(parts) < 4:
        return None
    if top.share >= DOMINANT:
        what = f"{top.name} makes {_percent(top.share)} of the squared norm on average"
    elif spike.peak >= SOLE:
        what = f"{spike.name} made {_percent(spike.peak)} of the squared norm in the largest step"
    else:
        return None
    why = f"{what}: one norm for all shrinks every other part for its sake, a limit for each does not."
    return f"optclip.adagc(max_norm={threshold:g})", why


def _following(levels: tuple[float, ...], tail: float) -> tuple[str, str] | None:
    if max(levels) < MOVED * min(levels):
        return None
    course = " -> ".join(_number(x) for x in levels)
    why = f"The typical norm moved over the run ({course} by quarters): a limit should follow it."
    if tail < HEAVY:
        return "optclip.zclip()", why
    return "optclip.autoclip(90)", f"{why} The percentile of a window is not thrown by a heavy tail."


def _round(x: float) -> float:
    return float(f"{x:.2g}")


def _number(x: float) -> str:
    return f"{x:.3g}"


def _percent(x: float) -> str:
    return "< 0.1 %" if 0 < x < 0.0005 else f"{100 * x:.1f} %"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    words = not rows or not rows[0][0][:1].isdigit()  # a first column of words is set flush left
    line = lambda cells: "  ".join(
        c.ljust(w) if words and i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
    ).rstrip()
    return "\n".join(line(cells) for cells in [heads, *rows])
