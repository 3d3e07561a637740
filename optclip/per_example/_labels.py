"""What can be done to a term by moving, cutting or splitting labels; None where a term does not allow it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from optclip.per_example._terms import Axis, Dense, OneHot, Term, new_label

__all__ = ["along", "cut", "regroup", "scale", "split_label"]


def scale(term: Term, by: Any) -> Term:
    """Multiplies the smallest factor."""
    arrays = [i for i, f in enumerate(term.factors) if isinstance(f, Dense)]
    i = min(arrays, key=lambda i: term.factors[i].array.size)
    factor = term.factors[i]
    factor = dataclasses.replace(factor, array=(factor.array * by).astype(factor.array.dtype))
    return dataclasses.replace(term, factors=(*term.factors[:i], factor, *term.factors[i + 1 :]))


def cut(term: Term, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]) -> Term | None:
    """A slice of the gradient is a slice of the one factor that holds the label of the axis."""
    for i, (start, limit, stride, size) in enumerate(zip(starts, limits, strides, term.shape, strict=True)):
        if (start, limit, stride) == (0, size, 1):
            continue
        axis = term.axes[i]
        if axis.placed or len(axis.labels) != 1:
            return None
        cut_to = slice(start, limit, stride)
        term_or_none = along(term, axis.labels[0], lambda x, axis, cut_to=cut_to: x[(slice(None),) * axis + (cut_to,)])
        if term_or_none is None:
            return None
        term = term_or_none
    return term


def along(term: Term, label: int, function: Callable[[Any, int], Any]) -> Term | None:
    """Applies ``function(array, axis)`` to every factor that holds ``label``, and renews it: its size may change."""
    fresh, factors = new_label(), []
    for f in term.factors:
        if isinstance(f, OneHot) and f.row == label:
            return None
        if label in f.labels:
            where = f.labels.index(label)
            labels = tuple(fresh if x == label else x for x in f.labels)
            f = dataclasses.replace(f, array=function(f.array, where), labels=labels)
        factors.append(f)
    axes = tuple(dataclasses.replace(a, labels=tuple(fresh if x == label else x for x in a.labels)) for a in term.axes)
    return dataclasses.replace(term, factors=tuple(factors), axes=axes)


def regroup(term: Term, shape: Sequence[int]) -> Term | None:
    """The labels of a term distributed over the axes of another shape of the same size; splits labels where needed."""
    if 0 in shape:
        return None
    queue = [a for axis in term.axes for a in ([axis] if axis.placed else [Axis((x,)) for x in axis.labels])]
    axes: list[Axis] = []
    for size in shape:
        group, have = [], 1
        while have < size:
            if not queue:
                return None
            head = queue.pop(0)
            sizes = term.sizes
            if head.placed:
                whole = math.prod(sizes[x] for x in head.labels) + head.before + head.after
                if group or whole != size:
                    return None
                axes.append(head)
                break
            (label,) = head.labels
            if sizes[label] == 1:
                continue
            if size % (have * sizes[label]):
                outer = size // have
                if size % have or sizes[label] % outer:
                    return None
                parts = split_label(term, label, (outer, sizes[label] // outer))
                if parts is None:
                    return None
                term, (label, rest) = parts
                queue.insert(0, Axis((rest,)))
            group.append(label)
            have *= term.sizes[label]
        else:
            axes.append(Axis(tuple(group)))
    # Labels of size one need no axis: an index that takes one value and a sum over one value are the same.
    sizes = term.sizes
    if any(axis.placed or sizes[axis.labels[0]] != 1 for axis in queue):
        return None
    return dataclasses.replace(term, axes=tuple(axes))


def split_label(term: Term, label: int, parts: tuple[int, ...]) -> tuple[Term, tuple[int, ...]] | None:
    """Splits a label into several by reshaping the factors that hold it."""
    fresh, factors = tuple(new_label() for _ in parts), []
    for f in term.factors:
        if isinstance(f, OneHot) and f.row == label:
            return None
        if label in f.labels:
            i = f.labels.index(label)
            array = f.array.reshape(*f.array.shape[:i], *parts, *f.array.shape[i + 1 :])
            f = dataclasses.replace(f, array=array, labels=(*f.labels[:i], *fresh, *f.labels[i + 1 :]))
        factors.append(f)
    axes = []
    for a in term.axes:
        labels = [y for x in a.labels for y in (fresh if x == label else (x,))]
        axes.append(dataclasses.replace(a, labels=tuple(labels)))
    return dataclasses.replace(term, factors=tuple(factors), axes=tuple(axes)), fresh
