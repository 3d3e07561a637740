"""How much is allowed? The shelf of rules: each is a `Threshold` for `clip_by`, at any scope.

============== ==================================================== ===========================
rule           limit                                                memory
============== ==================================================== ===========================
`fixed`        a number, a schedule, or a prefix tree of them       a step count, if scheduled
`param_ratio`  ratio * max(size of the parameters, eps)             a step count, if scheduled
============== ==================================================== ===========================

What feeds the history of a rule is a choice in the same words for every rule: ``feeding=`` `raw` (the size before the
clip), `clipped` (after it), ``winsorized(factor)`` (in between), or `accepted` (nothing on a spike).

To write a rule of your own, write it for one array of sizes and lift it with `per_size`, or with `history` if it
remembers.
"""

from optclip._history import Feed, History, accepted, clipped, history, raw, winsorized
from optclip._methods.agc import param_ratio
from optclip._methods.ema import ema_ratio
from optclip._methods.historical_norm import window_zscore
from optclip._rules import Threshold, fixed, per_size

__all__ = [
    "Feed",
    "History",
    "Threshold",
    "accepted",
    "clipped",
    "ema_ratio",
    "fixed",
    "history",
    "param_ratio",
    "per_size",
    "raw",
    "window_zscore",
    "winsorized",
]
