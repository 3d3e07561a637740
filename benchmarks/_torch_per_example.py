"""Opacus's ghost clipping over torch's own backward: the question of `per_example`, asked of torch. Needs both.

The networks of `per_example` in torch's layers, with the same shapes, batch sizes and loss. The number is the time of a
forward, ghost clipping's two backwards and its norms, over that of a forward and a backward of the same module without
Opacus, interleaved. It stands beside a JAX method over JAX's plain gradient; times of torch over times of JAX would
compare the frameworks. Memory is not measured: torch has no compiled program to ask.

Left out: a tied head, which Opacus refuses, and scanned or checkpointed layers, which are layouts of JAX. Opacus has
ghost norms for dense layers and embeddings; for all others it writes one layer's per-example gradients at a time. The
LSTM is Opacus's, a loop in Python, in both; "ratio to nn.LSTM" in the result file is to torch's fused one.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.layers import DPLSTM
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn
from torch.nn import functional

from benchmarks._harness import interleave

NAME = "opacus ghost / torch backward"


def dense(width: int, features: int) -> nn.Module:
    layers = [m for i in range(3) for m in (nn.Linear(width if i else features, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(4, channels, eps=1e-6)


def convolutional(width: int, channels: int) -> nn.Module:
    layers = []
    for scale, stride in ((1, 1), (1, 2), (2, 1), (2, 2), (2, 1)):
        layers += [nn.Conv2d(channels, scale * width, 3, stride, padding=1), group_norm(scale * width), nn.ReLU()]
        channels = scale * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Stage(nn.Module):
    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.first = nn.Sequential(group_norm(channels), nn.ReLU(), nn.Conv2d(channels, width, 3, stride, padding=1))
        self.second = nn.Sequential(group_norm(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
        self.skip = nn.Conv2d(channels, width, 1, stride)

    def forward(self, x):
        return self.skip(x) + self.second(self.first(x))


def residual(width: int, channels: int) -> nn.Module:
    stages = [Stage(max(scale // 2, 1) * width, scale * width, scale) for scale in (1, 2, 4)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), *stages, *head)


class Recurrent(nn.Module):
    def __init__(self, width: int, features: int, layer: Callable[..., nn.Module] = DPLSTM):
        super().__init__()
        self.lstm, self.head = layer(features, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.dense = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, x):
        y = self.norms[0](x)
        heads = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.dense(self.norms[1](x))


def language(width: int, layers: int, vocabulary: int) -> nn.Module:
    blocks = (Block(width) for _ in range(layers))
    head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, vocabulary, bias=False)
    return nn.Sequential(nn.Embedding(vocabulary, width), *blocks, *head)


def network(title: str, model: Any, features: int) -> nn.Module | None:
    """The torch module of the same shapes, or None where none is natural."""
    makers = {"MLP": dense, "CNN": convolutional, "ResNet": residual, "LSTM": Recurrent}
    if title in makers:
        return makers[title](model.width, features)
    return language(model.width, model.layers, model.vocabulary) if title == "transformer" else None


def aim(logits: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Logits and targets, one a row, and the shape before: the labels, or the next token."""
    if logits.ndim == 2:
        return logits, y, None
    logits = logits[:, :-1]
    return logits.flatten(0, 1), x[:, 1:].flatten(), logits.shape


def backward(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """A forward and torch's backward; the gradient is in ``p.grad``."""
    module.zero_grad()
    logits, target, _ = aim(module(x), x, y)
    functional.cross_entropy(logits, target).backward()
    if x.is_cuda:
        torch.cuda.synchronize()


def ghost(module: nn.Module, x: torch.Tensor, limit: float = 1.0) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """The same with Opacus, whose ``p.grad`` is the *sum* of clipped gradients; no noise is drawn."""
    private = GradSampleModuleFastGradientClipping(module, max_grad_norm=limit)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(private.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=limit,
        expected_batch_size=len(x),
    )
    criterion = DPLossFastGradientClipping(private, optimizer, nn.CrossEntropyLoss())

    def call(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        logits, target, shape = aim(private(x), x, y)
        criterion(logits, target, shape=shape).backward()
        if x.is_cuda:
            torch.cuda.synchronize()

    return call


def measure(title: str, model: Any, inputs: jax.Array, rounds: int) -> dict[str, dict[str, float]]:
    """One row, ratios to torch's backward, or none where there is no such network or torch cannot use the device."""
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    plain = network(title, model, inputs.shape[-1])
    if plain is None:
        return {}
    if device == "cuda" and not torch.cuda.is_available():
        print(f"left out, this torch runs on the CPU only: {NAME}")
        return {}
    x = torch.from_numpy(np.array(inputs)).to(device)
    x = x.movedim(-1, 1).contiguous() if x.ndim == 4 else x if x.is_floating_point() else x.long()
    y = torch.arange(len(x), device=device) % 10
    plain = plain.to(device)
    calls = {"torch": partial(backward, plain, x, y), NAME: partial(ghost(copy.deepcopy(plain), x), x, y)}
    if title == "LSTM":  # Opacus has an LSTM of its own, for which torch's fused one must be given up
        calls["fused"] = partial(backward, Recurrent(model.width, x.shape[-1], nn.LSTM).to(device), x, y)
    rows = interleave(calls, "torch", rounds, steps=1)
    row = rows[NAME] | {"torch ms": rows["torch"]["ms"]}
    if "fused" in rows:
        row["ratio to nn.LSTM"] = row["ms"] / rows["fused"]["ms"]
    return {NAME: row}
