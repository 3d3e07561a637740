"""Gradient clipping for JAX: norm, value and adaptive clipping as composable Optax transformations.

============================================= ===========================================================
methods, to chain in front of an optimizer    `clip_by_global_norm`, `clip`, `adaptive_grad_clip`, `zclip`, ...
of your own                                   `clip_by`, from `measures`, `thresholds` and `responses`
without a chain                               `clip_tree`, `global_norm`
around a whole optimizer                      `skip_nonfinite`, `skip_spikes`, ... (`wrappers`)
which leaves                                  `by_path`, `by_leaf`
what happened                                 `summary`, `worst_leaf`
what a limit would do                         `observe`, `advise`, `plot`
each example by itself                        `per_example`
Flax's ``TrainState``                         ``optclip.flax``, to be imported by name
============================================= ===========================================================
"""

from optclip import measures, per_example, responses, sketch, thresholds, wrappers
from optclip._advise import Advice, advise
from optclip._clip import ClipState, clip_by
from optclip._methods.acclip import acclip
from optclip._methods.adagc import adagc
from optclip._methods.agc import adaptive_grad_clip
from optclip._methods.aggc import aggc
from optclip._methods.autoclip import autoclip
from optclip._methods.bitsandbytes import percentile_clipping
from optclip._methods.block_rms import clip_by_block_rms
from optclip._methods.clippy import clippy
from optclip._methods.delta_gclip import delta_gclip
from optclip._methods.ema import clip_by_ema
from optclip._methods.historical_norm import clip_by_historical_norm
from optclip._methods.lamb import lamb_clip
from optclip._methods.larc import larc_clip
from optclip._methods.mars import MarsState, mars_clip
from optclip._methods.median import clip_by_median
from optclip._methods.norm import clip_by_global_norm, clip_by_group_norm, clip_by_leaf_norm, clip_by_unit_norm
from optclip._methods.norm_growth import norm_growth_limiter
from optclip._methods.normalized import normalize_by_update_norm
from optclip._methods.open_sora import clip_by_ema_sigma
from optclip._methods.quantile import clip_by_quantile
from optclip._methods.spam import spam_clip
from optclip._methods.spamp import spamp
from optclip._methods.stable_adamw import StableAdamWState, stable_adamw_clip
from optclip._methods.stable_spam import adaclip, adagn, gradient_stabilizer
from optclip._methods.trellis import clip_by_percentile
from optclip._methods.value import clip
from optclip._methods.zclip import zclip
from optclip._observe import ObserveState, merge, observe
from optclip._plot import plot
from optclip._recorded import ClipStats
from optclip._rules import Threshold
from optclip.functional import clip_tree
from optclip.measures import global_norm
from optclip.selection import by_leaf, by_path
from optclip.stats import summary, worst_leaf
from optclip.wrappers import clip21, skip_nonfinite, skip_spikes, track_median, u_clip, zero_nonfinite

__version__ = "0.1.0"

__all__ = [
    "Advice",
    "ClipState",
    "ClipStats",
    "MarsState",
    "ObserveState",
    "StableAdamWState",
    "Threshold",
    "acclip",
    "adaclip",
    "adagc",
    "adagn",
    "adaptive_grad_clip",
    "advise",
    "aggc",
    "autoclip",
    "by_leaf",
    "by_path",
    "clip",
    "clip21",
    "clip_by",
    "clip_by_block_rms",
    "clip_by_ema",
    "clip_by_ema_sigma",
    "clip_by_global_norm",
    "clip_by_group_norm",
    "clip_by_historical_norm",
    "clip_by_leaf_norm",
    "clip_by_median",
    "clip_by_percentile",
    "clip_by_quantile",
    "clip_by_unit_norm",
    "clip_tree",
    "clippy",
    "delta_gclip",
    "global_norm",
    "gradient_stabilizer",
    "lamb_clip",
    "larc_clip",
    "mars_clip",
    "measures",
    "merge",
    "norm_growth_limiter",
    "normalize_by_update_norm",
    "observe",
    "per_example",
    "percentile_clipping",
    "plot",
    "responses",
    "sketch",
    "skip_nonfinite",
    "skip_spikes",
    "spam_clip",
    "spamp",
    "stable_adamw_clip",
    "summary",
    "thresholds",
    "track_median",
    "u_clip",
    "worst_leaf",
    "wrappers",
    "zclip",
    "zero_nonfinite",
]
