"""Gradient clipping for JAX: norm, value and adaptive clipping as composable Optax transformations."""

from optclip import measures, per_example, responses, thresholds
from optclip._clip import ClipState, ClipStats, clip_by
from optclip._methods.agc import adaptive_grad_clip
from optclip._methods.block_rms import clip_by_block_rms
from optclip._methods.norm import clip_by_global_norm, clip_by_group_norm, clip_by_leaf_norm, clip_by_unit_norm
from optclip._methods.value import clip
from optclip._rules import Threshold
from optclip.functional import clip_tree
from optclip.measures import global_norm
from optclip.stats import summary, worst_leaf

__version__ = "0.1.0"

__all__ = [
    "ClipState",
    "ClipStats",
    "Threshold",
    "adaptive_grad_clip",
    "clip",
    "clip_by",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_group_norm",
    "clip_by_leaf_norm",
    "clip_by_unit_norm",
    "clip_tree",
    "global_norm",
    "measures",
    "per_example",
    "responses",
    "summary",
    "thresholds",
    "worst_leaf",
]
