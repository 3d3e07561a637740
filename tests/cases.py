"""The one table of public transformations: a row here puts a method under the whole contract (``test_contract_*.py``).

To add a method, add one row to `CASES`, sorted by name:

    Case("clip_by_x", {"factor": 2.0, "warmup": 3}, limit="factor", loose={"factor": 1e6}, measure=leaf_norm, ...)

``kwargs`` are arguments with which the method, fed `GRADS` one after the other, changes at least one of them: keep
warm-ups shorter than `SPIKE`, the step whose gradient is 30 times the others. Statistics are to be recorded. A second
row for the same method bears a note in brackets, ``"clip_by_x[per leaf]"``. The other fields say what the method
promises; leave those at their defaults that hold. ``test_contract_front.py`` fails while a method lacks a row, a README
row, a docstring section or a test file named after its module.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import optclip
from optclip import measures, responses


class Case(NamedTuple):
    """What one public transformation promises.

    Attributes:
      name: a name of ``optclip.__all__``, with a note in brackets for a second row.
      kwargs: arguments under which `GRADS` are clipped (the first of a wrapper is ``inner``).
      limit: the limit-like argument: a float, a traced scalar or a schedule.
      loose: arguments to change so that nothing is clipped: the updates are then bit-equal to the input.
      scope: how far one size reaches: "tree", "group" (the top level of the tree), "leaf", "unit" or "element".
      measure: for which measure(result) <= limit holds, with the limits that ``stats`` records, else ``limit`` itself.
      needs_params: whether ``update`` needs the parameters.
      keeps_direction: whether each scope of the updates is only scaled (at element scope: keeps its sign).
      takes_complex: whether complex leaves work; if not they raise TypeError.
      history: whether it remembers earlier steps.
      wrapper: whether it wraps an optimizer (``inner``).
      nonfinite: "loud" (NaN in its scope), "clamps" (infinities to the bound, NaN kept) or "survives" (finite).
    """

    name: str
    kwargs: dict[str, Any]
    limit: str | None = None
    loose: dict[str, Any] | None = None
    scope: str = "tree"
    measure: Callable[..., Any] | None = None
    needs_params: bool = False
    keeps_direction: bool = True
    takes_complex: bool = True
    history: bool = False
    wrapper: bool = False
    nonfinite: str = "loud"

    @property
    def public(self) -> str:
        """The name of the method in ``optclip.__all__``."""
        return self.name.split("[")[0]

    def make(self, **changed: Any) -> optax.GradientTransformationExtraArgs:
        """The transformation, with some arguments changed."""
        return getattr(optclip, self.public)(**{**self.kwargs, **changed})


SHAPES = {"dense": {"bias": (4,), "kernel": (3, 4)}, "head": {"kernel": (4, 2), "scale": ()}}
STEPS, SPIKE = 8, 6


def draw(seed: int, scale: float = 0.3) -> Any:
    """A float32 tree of normal numbers in the standard shapes."""
    rng = np.random.default_rng(seed)
    leaf = lambda shape: np.asarray(rng.normal(scale=scale, size=shape), np.float32)
    return jax.tree.map(leaf, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


PARAMS = draw(100)
GRADS = [draw(step, 9.0 if step == SPIKE else 0.3) for step in range(STEPS)]


def top_level(tree: Any) -> Any:
    """Labels for groups: each entry of the outermost dict, else the whole tree."""
    return {key: key for key in tree} if isinstance(tree, dict) and tree else "all"


CASES = [
    Case("acclip", {}, scope="leaf", history=True, keeps_direction=False),
    Case("adaclip", {"decay": 0.9}, scope="leaf", measure=partial(measures.leaf_norm, ord=np.inf), history=True,
         keeps_direction=False),
    Case("adagc", {"warmup": 3, "max_norm": np.inf}, limit="ratio", loose={"ratio": 1e6}, scope="leaf",
         measure=measures.leaf_norm, history=True),
    Case("adagn", {}, scope="leaf", measure=measures.leaf_norm, history=True),
    Case("adaptive_grad_clip", {"clipping": 0.1, "record": True}, limit="clipping", loose={"clipping": 1e6},
         scope="unit", measure=measures.unit_norm, needs_params=True),
    Case("aggc", {"groups": top_level}, limit="high", loose={"high": 1e6}, scope="group",
         measure=lambda tree: measures.group_norm(tree, top_level), history=True),
    Case("autoclip", {"percent": 50.0, "window": 5}, limit="percent", loose={"percent": 100.0},
         measure=measures.global_norm, history=True),
    Case("clip", {"max_delta": 0.2}, limit="max_delta", loose={"max_delta": 1e6}, scope="element",
         measure=measures.magnitude, takes_complex=False, nonfinite="clamps"),
    Case("clip21", {"inner": optclip.clip_by_global_norm(0.5)}, loose={"inner": optclip.clip_by_global_norm(1e6)},
         keeps_direction=False, history=True, wrapper=True),
    Case("clip_by", {"measure": measures.leaf_norm, "threshold": 0.4}, limit="threshold", loose={"threshold": 1e6},
         scope="leaf", measure=measures.leaf_norm),
    Case("clip_by[normalize]", {"measure": measures.global_norm, "threshold": 0.4, "response": responses.normalize},
         limit="threshold", loose={"threshold": np.inf}, measure=measures.global_norm),
    Case("clip_by[smooth]", {"measure": measures.global_norm, "threshold": 0.4, "response": responses.smooth},
         limit="threshold", loose={"threshold": np.inf}, measure=measures.global_norm),
    Case("clip_by[zero]", {"measure": measures.global_norm, "threshold": 1.0, "response": responses.zero},
         limit="threshold", loose={"threshold": 1e6}, measure=measures.global_norm),
    Case("clip_by_block_rms", {"threshold": 0.2}, limit="threshold", loose={"threshold": 1e6}, scope="leaf",
         measure=measures.leaf_rms),
    Case("clip_by_ema", {"ratio": 1.5, "warmup": 3}, limit="ratio", loose={"ratio": 1e6}, measure=measures.global_norm,
         history=True),
    Case("clip_by_ema[per unit]", {"ratio": 1.5, "warmup": 3, "measure": measures.unit_norm}, limit="ratio",
         loose={"ratio": 1e6}, scope="unit", measure=measures.unit_norm, history=True),
    Case("clip_by_ema_sigma", {"first_limit": 1.5}, limit="sigmas", loose={"sigmas": 1e6, "first_limit": np.inf},
         measure=measures.global_norm, history=True),
    Case("clip_by_global_norm", {"max_norm": 0.5}, limit="max_norm", loose={"max_norm": 1e6},
         measure=measures.global_norm),
    Case("clip_by_global_norm[ord=1]", {"max_norm": 0.5, "ord": 1}, limit="max_norm", loose={"max_norm": 1e6},
         measure=partial(measures.global_norm, ord=1)),
    Case("clip_by_global_norm[ord=inf]", {"max_norm": 0.2, "ord": np.inf}, limit="max_norm", loose={"max_norm": 1e6},
         measure=partial(measures.global_norm, ord=np.inf)),
    Case("clip_by_group_norm", {"max_norm": 0.4, "groups": top_level}, limit="max_norm", loose={"max_norm": 1e6},
         scope="group", measure=lambda tree: measures.group_norm(tree, top_level)),
    Case("clip_by_historical_norm", {"warmup": 3}, limit="z", loose={"z": 1e6}, measure=measures.global_norm,
         history=True),
    Case("clip_by_leaf_norm", {"max_norm": 0.4}, limit="max_norm", loose={"max_norm": 1e6}, scope="leaf",
         measure=measures.leaf_norm),
    Case("clip_by_median", {"window": 4}, limit="ratio", loose={"ratio": 1e6}, measure=measures.global_norm,
         history=True),
    Case("clip_by_percentile", {"percent": 50.0, "window": 3, "max_norm": 2.0}, limit="max_norm",
         loose={"max_norm": np.inf, "warmup": 100}, measure=measures.global_norm, history=True),
    Case("clip_by_quantile", {}, limit="ratio", loose={"ratio": 1e6}, measure=measures.global_norm, history=True),
    Case("clip_by_unit_norm", {"max_norm": 0.3, "record": True}, limit="max_norm", loose={"max_norm": 1e6},
         scope="unit", measure=measures.unit_norm),
    Case("clippy", {}, limit="relative", loose={"relative": 1e6}, scope="leaf", needs_params=True),
    Case("delta_gclip", {"max_norm": 0.5}, limit="max_norm", loose={"max_norm": 1e6}, measure=measures.global_norm),
    Case("gradient_stabilizer", {}, scope="leaf", measure=measures.leaf_norm, history=True),
    Case("lamb_clip", {"ratio": 0.5}, limit="ratio", loose={"ratio": 1e6}, scope="leaf", measure=measures.leaf_norm,
         needs_params=True),
    Case("larc_clip", {"learning_rate": 0.1}, limit="trust_coefficient", loose={"trust_coefficient": 1e6}, scope="leaf",
         measure=measures.leaf_norm, needs_params=True),
    Case("mars_clip", {"max_norm": 0.4}, limit="max_norm", loose={"max_norm": np.inf, "gamma": 0.0}, scope="leaf",
         measure=measures.leaf_norm, history=True, keeps_direction=False),
    Case("norm_growth_limiter", {}, limit="ratio", loose={"ratio": 1e6}, scope="leaf", measure=measures.leaf_norm,
         history=True),
    Case("normalize_by_update_norm", {}, limit="scale_factor", loose={"scale_factor": np.inf},
         measure=measures.global_norm),
    Case("observe", {"inner": optclip.clip_by_global_norm(0.5), "history": 4},
         loose={"inner": optclip.clip_by_global_norm(1e6)}, measure=measures.global_norm, history=True, wrapper=True),
    Case("percentile_clipping", {"percentile": 2, "window": 4}, limit="percentile", loose={"percentile": 3},
         scope="leaf", measure=measures.leaf_norm, history=True),
    Case("skip_nonfinite", {"inner": optclip.clip_by_global_norm(0.5)},
         loose={"inner": optclip.clip_by_global_norm(1e6)}, wrapper=True, nonfinite="survives"),
    Case("skip_spikes", {"inner": optax.identity(), "rule": 10.0}, limit="rule", loose={"rule": 1e6}, history=True,
         wrapper=True, nonfinite="survives"),
    Case("spam_clip", {"theta": 4.0, "warmup": 3}, limit="theta", loose={"theta": 1e6}, scope="leaf", history=True,
         keeps_direction=False),
    Case("spamp", {"decay": 0.9}, scope="leaf", measure=measures.leaf_norm, history=True, keeps_direction=False),
    Case("stable_adamw_clip", {"inner": optax.identity()}, limit="max_rms", loose={"max_rms": 1e6}, scope="leaf",
         history=True, wrapper=True),
    Case("track_median", {"limit": 0.5, "decay": 0.5}, limit="limit", loose={"limit": 1e6, "decay": 0.0},
         keeps_direction=False, history=True),
    Case("u_clip", {"inner": optclip.clip_by_global_norm(0.5)}, loose={"inner": optclip.clip_by_global_norm(1e6)},
         keeps_direction=False, history=True, wrapper=True),
    Case("zclip", {"warmup": 3}, limit="z", loose={"z": 1e6}, measure=measures.global_norm, history=True),
    Case("zclip[per leaf]", {"warmup": 3, "measure": measures.leaf_norm}, limit="z", loose={"z": 1e6}, scope="leaf",
         measure=measures.leaf_norm, history=True),
    Case("zero_nonfinite", {}, loose={}, scope="element", history=True, nonfinite="survives"),
]  # fmt: skip
