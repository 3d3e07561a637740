"""Gradient clipping for JAX: norm, value and adaptive clipping as composable Optax transformations."""

from optclip import measures, per_example, responses, sketch, thresholds, wrappers
from optclip._advise import Advice, advise
from optclip._clip import ClipState, ClipStats, clip_by
from optclip._methods.agc import adaptive_grad_clip
from optclip._methods.autoclip import autoclip
from optclip._methods.bitsandbytes import percentile_clipping
from optclip._methods.block_rms import clip_by_block_rms
from optclip._methods.ema import clip_by_ema
from optclip._methods.historical_norm import clip_by_historical_norm
from optclip._methods.median import clip_by_median
from optclip._methods.norm import clip_by_global_norm, clip_by_group_norm, clip_by_leaf_norm, clip_by_unit_norm
from optclip._methods.open_sora import clip_by_ema_sigma
from optclip._methods.quantile import clip_by_quantile
from optclip._methods.trellis import clip_by_percentile
from optclip._methods.value import clip
from optclip._methods.zclip import zclip
from optclip._observe import ObserveState, merge, observe
from optclip._plot import plot
from optclip._rules import Threshold
from optclip.functional import clip_tree
from optclip.measures import global_norm
from optclip.stats import summary, worst_leaf
from optclip.wrappers import clip21, skip_nonfinite, skip_spikes, track_median, u_clip, zero_nonfinite

__version__ = "0.1.0"

__all__ = [
    "Advice",
    "ClipState",
    "ClipStats",
    "ObserveState",
    "Threshold",
    "adaptive_grad_clip",
    "advise",
    "autoclip",
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
    "global_norm",
    "measures",
    "merge",
    "observe",
    "per_example",
    "percentile_clipping",
    "plot",
    "responses",
    "sketch",
    "skip_nonfinite",
    "skip_spikes",
    "summary",
    "thresholds",
    "track_median",
    "u_clip",
    "worst_leaf",
    "wrappers",
    "zclip",
    "zero_nonfinite",
]
