"""How much is allowed? The shelf of rules: each is a `Threshold` for `clip_by`, at any scope.

================== ======================================================= ================
rule               limit                                                   memory, per size
================== ======================================================= ================
`fixed`            a number, a schedule, or a prefix tree of them          none
`param_ratio`      ratio * max(size of the parameters, eps)                none
`trust_ratio`      ratio * size of the parameters, none where they are 0   none
`ema_ratio`        ratio * moving average                                  3
`zscore`           mean + z * std, moving averages; outliers to a target   4
`ema_sigma`        mean + sigmas * std, moving averages of unclipped steps 4
`ema_from_min`     ratio * moving average that starts at a warm-up minimum 3
`ema_band`         the size brought into a band around its moving average  3
`running_mean`     moving average, this size included                      3
`moment_ratio`     first moment / root of the second, for `normalize`      4
`growth_ratio`     ratio * last size                                       3
`spike_ratio`      sqrt(theta * moving average of the square)              1
`window_zscore`    mean + z * std over a window                            window + 2
`percentile`       a percentile of a window, this size included            window + 2
`past_percentile`  a percentile of a full window before this size, capped  window + 2
`order_statistic`  the k-th smallest, from 0, of a window with this size   window + 2
`median_ratio`     ratio * median of a window, drawn once per window       window + 3
`quantile_tracker` ratio * quantile, tracked by one number                 3
================== ======================================================= ================

A number per size is a float32 or an int32; a scheduled limit adds a step count.

What feeds the history of a rule is a choice in the same words for every rule: ``feeding=`` `raw` (the size before the
clip), `clipped` (after it), ``winsorized(factor)`` (in between), or `accepted` (nothing on a spike).

To write a rule of your own, write it for one array of sizes and lift it with `per_size`, or with `history` if it
remembers.
"""

from optclip._history import Feed, History, accepted, clipped, history, raw, running_mean, winsorized
from optclip._methods.adagc import ema_from_min
from optclip._methods.agc import param_ratio
from optclip._methods.aggc import ema_band
from optclip._methods.autoclip import percentile
from optclip._methods.bitsandbytes import order_statistic
from optclip._methods.ema import ema_ratio
from optclip._methods.historical_norm import window_zscore
from optclip._methods.lamb import trust_ratio
from optclip._methods.median import median_ratio
from optclip._methods.norm_growth import growth_ratio
from optclip._methods.open_sora import ema_sigma
from optclip._methods.quantile import quantile_tracker
from optclip._methods.spam import spike_ratio
from optclip._methods.stable_spam import moment_ratio
from optclip._methods.trellis import past_percentile
from optclip._methods.zclip import reciprocal, to_max, to_mean, zscore
from optclip._rules import Threshold, fixed, per_size

__all__ = [
    "Feed",
    "History",
    "Threshold",
    "accepted",
    "clipped",
    "ema_band",
    "ema_from_min",
    "ema_ratio",
    "ema_sigma",
    "fixed",
    "growth_ratio",
    "history",
    "median_ratio",
    "moment_ratio",
    "order_statistic",
    "param_ratio",
    "past_percentile",
    "per_size",
    "percentile",
    "quantile_tracker",
    "raw",
    "reciprocal",
    "running_mean",
    "spike_ratio",
    "to_max",
    "to_mean",
    "trust_ratio",
    "window_zscore",
    "winsorized",
    "zscore",
]
