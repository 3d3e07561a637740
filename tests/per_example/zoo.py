"""Losses of every architecture the package names, at random small shapes.

A case is a function of ``a(*shape)`` (random floats), ``ids(n, *shape)`` (random integers below n) and ``n(low, high)``
(a random size) that returns ``(loss_fn, params, batch)``; ``loss_fn`` sees a batch and takes its mean.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def build(name, seed, dtype=jnp.float64):
    random = np.random.RandomState(seed)

    def a(*shape):
        return jnp.asarray(random.randn(*shape), dtype)

    def ids(n, *shape):
        return jnp.asarray(random.randint(0, n, shape))

    def n(low, high):
        return int(random.randint(low, high + 1))

    return CASES[name](a, ids, n)


def mean_square(x):
    return jnp.mean(jnp.square(x))


# Dense layers


@case
def mlp(a, ids, n):
    i, h, o = n(1, 6), n(2, 9), n(1, 4)
    params = {"w1": a(i, h), "b1": a(h), "w2": a(h, o)}
    return lambda p, x: mean_square(jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"]), params, a(n(1, 4), i)


@case
def sequence(a, ids, n):
    i, h, o = n(1, 9), n(2, 9), n(1, 20)
    params = {"w1": a(i, h), "b1": a(h), "w2": a(h, o)}
    return lambda p, x: mean_square(jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"]), params, a(n(1, 4), n(1, 20), i)


@case
def used_three_times(a, ids, n):
    i, h = n(2, 9), n(2, 9)
    loss = lambda p, x: mean_square(jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"].T) @ p["w"])
    return loss, {"w": a(i, h)}, a(3, n(1, 3), i)


@case
def attention(a, ids, n):
    d, h, k = n(2, 24), n(1, 3), n(1, 8)
    params = {"q": a(d, h, k), "k": a(h, d, k), "v": a(k, d, h), "o": a(h, k, d), "s": a(d)}

    def loss(p, x):
        q, k = jnp.einsum("btd,dhk->bthk", x, p["q"]), jnp.einsum("btd,hdk->bhtk", x, p["k"])
        weights = jax.nn.softmax(jnp.einsum("bthk,bhsk->bhts", q, k))
        v = jnp.einsum("btd,kdh->bthk", x * p["s"], p["v"])
        return mean_square(jnp.einsum("bhts,bshk,hkd->btd", weights, v, p["o"]))

    return loss, params, a(3, n(1, 6), d)


@case
def fused_attention(a, ids, n):
    d, h = n(1, 4) * 4, n(1, 2)
    params = {"qkv": a(d, 3 * d * h), "bias": a(3 * d * h), "o": a(h * d, d)}

    def loss(p, x):
        qkv = (x @ p["qkv"] + p["bias"]).reshape(*x.shape[:2], 3, h, d)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        y = jax.nn.dot_product_attention(q, k, v)
        return mean_square(y.reshape(*x.shape[:2], -1) @ p["o"])

    return loss, params, a(2, n(1, 5), d)


@case
def mixture_of_experts(a, ids, n):
    d, e, k = n(2, 8), n(2, 4), n(2, 20)
    params = {"route": a(d, e), "up": a(e, d, k), "down": a(e, k, d)}

    def loss(p, x):
        gate = jax.nn.softmax(x @ p["route"])
        top = jnp.where(gate >= jnp.max(gate, -1, keepdims=True), gate, 0)
        sent = jnp.einsum("bte,btd->ebtd", top, x)
        h = jnp.einsum("ebtd,edk->ebtk", sent, p["up"])
        return mean_square(jnp.einsum("ebtk,ekd->btd", jnp.tanh(h), p["down"]))

    return loss, params, a(2, n(1, 4), d)


@case
def split_and_merged_weights(a, ids, n):
    d, k = n(2, 9), n(2, 6)
    params = {"q": a(d, k), "k": a(d, k), "all": a(k, 3 * k)}

    def loss(p, x):
        q, k = jnp.split(x @ jnp.concatenate([p["q"], p["k"]], 1), 2, -1)
        first, second, third = jnp.split(p["all"], 3, axis=1)
        return mean_square(jnp.tanh(q @ first) * (k @ second) + q @ third)

    return loss, params, a(3, n(1, 3), d)


@case
def indexed_stack(a, ids, n):
    d, layers = n(2, 8), n(2, 4)

    def loss(p, x):
        for i in range(layers):
            x = jnp.tanh(x @ p["w"][i])
        return mean_square(x)

    return loss, {"w": a(layers, d, d)}, a(3, n(1, 2), d)


@case
def low_rank(a, ids, n):
    d, k, r = n(4, 9), n(8, 16), n(1, 2)
    base = a(d, k)
    loss = lambda p, x: mean_square(jnp.tanh(x @ base + (x @ p["a"]) @ p["b"] * 0.5))
    return loss, {"a": a(d, r), "b": a(r, k)}, a(3, n(1, 3), d)


@case
def merged_low_rank(a, ids, n):
    d, k = n(4, 9), n(8, 16)
    base = a(d, k)
    return lambda p, x: mean_square(jnp.tanh(x @ (base + p["a"] @ p["b"]))), {"a": a(d, 2), "b": a(2, k)}, a(3, 2, d)


@case
def weight_norm(a, ids, n):
    d, k = n(2, 9), n(2, 16)
    loss = lambda p, x: mean_square(jnp.tanh(x @ (p["g"] * p["v"] / jnp.linalg.norm(p["v"], axis=0))))
    return loss, {"g": a(k), "v": a(d, k)}, a(3, 2, d)


@case
def weight_decay_in_the_loss(a, ids, n):
    d, k = n(2, 9), n(2, 9)

    def loss(p, x):
        return mean_square(jnp.tanh(x @ p["w"]) @ p["v"]) + 0.1 * sum(jnp.sum(w**2) for w in p.values())

    return loss, {"w": a(d, k), "v": a(k, d)}, a(3, d)


@case
def masked_weights(a, ids, n):
    d, k = n(2, 9), n(8, 16)
    mask = a(d, k) > 0
    return (
        lambda p, x: mean_square(x @ jnp.where(mask, p["w"], 0) + x @ (p["v"] * mask)),
        {"w": a(d, k), "v": a(d, k)},
        a(3, d),
    )


@case
def strange_uses(a, ids, n):
    d = n(2, 5)

    def loss(p, x):
        w = jnp.sort(p["w"], axis=0)[::-1] + jnp.cumsum(p["w"], axis=1)
        return mean_square(x @ w) + jnp.sum(jnp.abs(jnp.fft.fft(p["f"]))) * jnp.mean(x) + p["s"] * jnp.max(x)

    return loss, {"w": a(d, d), "f": a(d), "s": a(), "unused": a(3, 2), "empty": a(0, 3)}, a(3, d)


@case
def low_precision(a, ids, n):
    d = n(2, 9)

    def loss(p, x):
        half = jnp.bfloat16
        return mean_square((x.astype(half) @ p["w"].astype(half)).astype(jnp.float32))

    return loss, {"w": a(d, 3 * d)}, a(3, 2, d)


@case
def low_precision_square(a, ids, n):
    d = n(2, 9)

    def loss(p, x):
        w, x = p["w"].astype(jnp.bfloat16), x.astype(jnp.bfloat16)
        return mean_square((x @ (w @ w)).astype(jnp.float32))

    return loss, {"w": a(d, d)}, a(3, 2, d)


# Tables


@case
def embedding(a, ids, n):
    v, d = n(5, 60), n(1, 8)
    return lambda p, x: mean_square(jnp.tanh(p["e"][x]) @ p["w"]), {"e": a(v, d), "w": a(d, 9)}, ids(v, 3, n(1, 9))


@case
def long_embedding(a, ids, n):
    return lambda p, x: jnp.mean(jnp.sin(p["e"][x])), {"e": a(400, 3)}, ids(10, 2, n(20, 40))


@case
def out_of_range_ids(a, ids, n):
    v = n(5, 60)

    def loss(p, x):
        picked = [jnp.take(p["e"], x, axis=0, mode=mode, fill_value=0) for mode in ("clip", "fill", "wrap")]
        return sum(jnp.mean(jnp.sin(rows)) for rows in picked)

    return loss, {"e": a(v, 3)}, ids(v + 10, 3, 4) - 5


@case
def embedding_columns(a, ids, n):
    v = n(5, 60)
    loss = lambda p, x: jnp.mean(jnp.sin(jnp.take(p["e"], x, axis=1))) + jnp.mean(p["e"][1, x] ** 2)
    return loss, {"e": a(4, v)}, ids(v, 3, 4)


@case
def tied_embedding(a, ids, n):
    v, d = n(5, 60), n(2, 8)

    def loss(p, x):
        h = jnp.tanh(p["e"][x] @ p["w"])
        logits = h @ p["e"].T
        return jnp.mean(jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, x[..., None], -1)[..., 0])

    return loss, {"e": a(v, d), "w": a(d, d)}, ids(v, 3, n(1, 5))


@case
def decayed_embedding(a, ids, n):
    return lambda p, x: mean_square(p["e"][x]) + 0.1 * jnp.sum(p["e"] ** 2), {"e": a(30, 4)}, ids(30, 3, n(1, 5))


# Loops and regions


def _layer(h, w):
    return jnp.tanh(h @ w["w"] + w["b"]), None


def _stack(a, n):
    layers, d = n(1, 4), n(2, 9)
    return {"w": a(layers, d, d), "b": a(layers, d)}, a(3, n(1, 12), d)


@case
def scanned_layers(a, ids, n):
    return lambda p, x: mean_square(lax.scan(_layer, x, p)[0]), *_stack(a, n)


@case
def scanned_twice(a, ids, n):
    loss = lambda p, x: mean_square(lax.scan(_layer, lax.scan(_layer, x, p)[0], p, reverse=True)[0])
    return loss, *_stack(a, n)


@case
def scanned_checkpoints(a, ids, n):
    return lambda p, x: mean_square(lax.scan(jax.checkpoint(_layer), x, p, unroll=2)[0]), *_stack(a, n)


@case
def checkpoints(a, ids, n):
    d = n(2, 9)
    layer = jax.checkpoint(lambda h, w, b: jnp.tanh(h @ w + b))
    loss = lambda p, x: mean_square(layer(layer(x, p["w"], p["b"]), p["v"], p["b"]))
    return loss, {"w": a(d, d), "v": a(d, d), "b": a(d)}, a(3, n(1, 3), d)


@case
def checkpoint_policy(a, ids, n):
    d = n(2, 9)
    layer = jax.checkpoint(_layer, policy=jax.checkpoint_policies.dots_saveable)
    loss = lambda p, x: mean_square(layer(layer(x, p["first"])[0], p["second"])[0])
    return loss, {"first": {"w": a(d, d), "b": a(d)}, "second": {"w": a(d, d), "b": a(d)}}, a(3, 2, d)


@case
def nested_loops(a, ids, n):
    d = n(2, 8)

    def loss(p, x):
        inner = lambda h, w: (jnp.tanh(h @ w @ p["shared"]), None)
        return mean_square(lax.scan(lambda h, ws: lax.scan(inner, h, ws), x, p["w"])[0])

    return loss, {"w": a(2, 3, d, d), "shared": a(d, d)}, a(2, n(1, 3), d)


@case
def nested_checkpoints(a, ids, n):
    d = n(2, 8)

    def loss(p, x):
        inner = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w @ p["shared"]), None))
        return mean_square(lax.scan(jax.checkpoint(lambda h, ws: lax.scan(inner, h, ws)), x, p["w"])[0])

    return loss, {"w": a(2, 3, d, d), "shared": a(d, d)}, a(2, n(1, 3), d)


def _recurrent(cell):
    def loss(p, x):
        start = jnp.zeros((x.shape[0], p["u"].shape[0]), x.dtype)
        return mean_square(lax.scan(lambda h, x: (cell(p, h, x),) * 2, start, jnp.swapaxes(x, 0, 1))[1])

    return loss


def _cell(p, h, x):
    return jnp.tanh(h @ p["u"] + x @ p["w"] + p["b"])


@case
def recurrent(a, ids, n):
    i, h = n(1, 20), n(2, 8)
    return _recurrent(_cell), {"u": a(h, h), "w": a(i, h), "b": a(h)}, a(3, n(1, 6), i)


@case
def recurrent_checkpoints(a, ids, n):
    i, h = n(1, 20), n(2, 8)
    return _recurrent(jax.checkpoint(_cell)), {"u": a(h, h), "w": a(i, h), "b": a(h)}, a(3, n(1, 6), i)


@case
def recurrent_embedding(a, ids, n):
    h = n(2, 6)
    cell = lambda p, h, x: jnp.tanh(h @ p["u"] + p["e"][x])

    def loss(p, x):
        start = jnp.zeros((x.shape[0], p["u"].shape[0]), p["u"].dtype)
        return mean_square(lax.scan(lambda h, x: (cell(p, h, x),) * 2, start, x.T)[1])

    return loss, {"u": a(h, h), "e": a(40, h)}, ids(40, 3, n(1, 6))


@case
def used_before_the_loop_too(a, ids, n):
    i, h = n(1, 9), n(2, 8)
    loss = _recurrent(_cell)
    return lambda p, x: loss(p, x) + mean_square(x @ p["w"]), {"u": a(h, h), "w": a(i, h), "b": a(h)}, a(2, 3, i)


@case
def sum_that_does_not_start_at_zero(a, ids, n):
    @jax.custom_vjp
    def linear(x, w):
        return x @ w

    def backward(saved, g):
        x, w = saved
        add = lambda total, xg: (total + jnp.einsum("bd,bk->dk", *xg), None)
        start = jnp.einsum("bd,bk->dk", x[:, 0], g[:, 0])
        rest = jnp.swapaxes(x[:, 1:], 0, 1), jnp.swapaxes(g[:, 1:], 0, 1)
        return g @ w.T, lax.scan(add, start, rest)[0]

    linear.defvjp(lambda x, w: (x @ w, (x, w)), backward)
    d, k = n(2, 6), n(4, 20)
    return (
        lambda p, x: mean_square(linear(jnp.tanh(linear(x, p["w"])), p["v"])),
        {"w": a(d, k), "v": a(k, d)},
        a(3, 4, d),
    )


@case
def conditional(a, ids, n):
    d, k = n(2, 6), n(2, 20)

    def loss(p, x):
        branches = [
            lambda x: jnp.log(jnp.abs(x[..., :1])) + jnp.tanh(x @ p["w"]),
            lambda x: x @ p["w"] @ p["u"],
            lambda x: x @ p["v"],
        ]
        return mean_square(lax.switch(jnp.int32(x.ravel()[0] + 1), branches, x))

    return loss, {"w": a(d, k), "u": a(k, k), "v": a(d, k)}, a(4, 2, d)


@case
def loop_in_a_condition(a, ids, n):
    d = n(2, 6)

    def loss(p, x):
        loop = lambda x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]
        return mean_square(lax.cond(jnp.sum(x) > 0, lambda: loop(x), lambda: x @ p["w"][0]))

    return loss, {"w": a(3, d, d)}, a(3, 2, d)


@case
def checkpointed_loop_beside_a_product(a, ids, n):
    d = n(2, 6)

    def loss(p, x):
        loop = jax.checkpoint(lambda w, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0])
        return mean_square(loop(p["w"], x) + loop(p["w"], 2 * x) + x @ p["w"][0])

    return loss, {"w": a(3, d, d)}, a(3, 2, d)


@case
def shared_condition(a, ids, n):
    d, k = n(2, 6), n(2, 20)
    loss = lambda p, x: mean_square(lax.cond(p["s"] > 0, lambda: jnp.tanh(x @ p["w"]), lambda: x @ p["v"]))
    return loss, {"w": a(d, k), "v": a(d, k), "s": a()}, a(3, 2, d)


@case
def conditional_in_a_loop(a, ids, n):
    d = n(2, 8)

    def loss(p, x):
        def step(h, w):
            return lax.cond(h.ravel()[0] > 0, lambda: jnp.tanh(h @ w), lambda: h @ p["v"]), None

        return mean_square(lax.scan(step, x, p["w"])[0])

    return loss, {"w": a(3, d, d), "v": a(d, d)}, a(3, 2, d)


@case
def while_loop(a, ids, n):
    d = n(2, 8)

    def loss(p, x):
        steps = lax.while_loop(lambda s: s[1] < 3, lambda s: (s[0] * 0.9, s[1] + s[0]), (1.0, 0.0))[1]
        h = lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["w"]), x)
        return mean_square(h * lax.stop_gradient(steps))

    return loss, {"w": a(d, d)}, a(3, 2, d)


@case
def custom_rules(a, ids, n):
    @jax.custom_vjp
    def linear(x, w):
        return x @ w

    def backward(saved, g):  # not linear in g
        x, w = saved
        return jnp.clip(g @ w.T, -0.01, 0.01), jnp.einsum("btd,btk->dk", x, g)

    linear.defvjp(lambda x, w: (x @ w, (x, w)), backward)

    @jax.custom_jvp
    def act(x):
        return jnp.tanh(x)

    act.defjvp(lambda primals, tangents: (jnp.tanh(primals[0]), 2 * tangents[0]))
    d, k = n(2, 6), n(4, 20)
    return (
        lambda p, x: mean_square(act(linear(act(linear(x, p["w"])), p["v"]))),
        {"w": a(d, k), "v": a(k, k)},
        a(3, 2, d),
    )


# Convolutions

NHWC = ("NHWC", "HWIO", "NHWC")


@case
def convolution(a, ids, n):
    i, g, o = n(1, 3), n(1, 3), n(1, 8)
    size, kernel = (n(3, 9), n(3, 9)), (n(1, 3), n(1, 3))
    settings = {"window_strides": (n(1, 2), n(1, 3)), "rhs_dilation": (n(1, 2), n(1, 2)), "feature_group_count": g}
    padding = [(n(0, 2) + 2, n(0, 3)), (2, n(-1, 3))]

    def loss(p, x):
        y = lax.conv_general_dilated(x, p["w"], padding=padding, dimension_numbers=NHWC, **settings)
        return mean_square(jnp.sin(y + p["b"]))

    return loss, {"w": a(*kernel, i, g * o), "b": a(g * o)}, a(2, *size, g * i)


@case
def wide_convolution(a, ids, n):
    """More kernel than image: measured by products of positions."""
    g, o = n(1, 2), n(40, 60)

    def loss(p, x):
        y = lax.conv_general_dilated(
            x, p["w"], (2, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"), feature_group_count=g
        )
        return mean_square(jnp.sin(y))

    return loss, {"w": a(g * o, 4, 3, 3)}, a(2, g * 4, n(2, 4), n(1, 3))


@case
def convolution_1d_3d(a, ids, n):
    def loss(p, x):
        y = lax.conv_general_dilated(x, p["v"], (1, 2, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))
        z = lax.conv_general_dilated(x[:, 0, 0], p["w"], (1,), [(2, 0)], dimension_numbers=("NWC", "WIO", "NWC"))
        return mean_square(y) + mean_square(z)

    return loss, {"v": a(2, 1, 2, 2, 3), "w": a(3, 2, 4)}, a(2, n(2, 3), n(1, 3), n(2, 6), 2)


@case
def transposed_convolution(a, ids, n):
    def loss(p, x):
        y = lax.conv_transpose(x, p["w"], (2, 2), "SAME", dimension_numbers=NHWC)
        z = lax.conv_transpose(x, p["v"], (2, 2), "SAME", dimension_numbers=NHWC, transpose_kernel=True)
        return mean_square(jnp.sin(y) + z)

    return loss, {"w": a(3, 3, 2, 5), "v": a(3, 3, 5, 2)}, a(2, n(2, 5), n(2, 5), 2)


@case
def depthwise_and_shared_convolution(a, ids, n):
    def loss(p, x):
        for _ in range(2):
            x = jnp.tanh(lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=NHWC))
            x = lax.conv_general_dilated(x, p["d"], (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=4)
        return mean_square(x)

    return loss, {"w": a(3, 3, 4, 4), "d": a(3, 2, 1, 4)}, a(2, n(2, 6), n(2, 6), 4)


@case
def large_window(a, ids, n):
    loss = lambda p, x: mean_square(lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=NHWC))
    return loss, {"w": a(9, 9, 2, 3)}, a(2, n(8, 12), n(8, 12), 2)


@case
def normalisations(a, ids, n):
    c = 2 * n(1, 3)

    def loss(p, x):
        x = jnp.tanh(x @ p["w"])
        mean, var = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
        x = (x - mean) / jnp.sqrt(var + 1e-5) * p["layer"] + p["shift"]
        x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * p["rms"]
        groups = x.reshape(*x.shape[:2], 2, -1)
        groups = groups / jnp.sqrt(jnp.var(groups, axis=(1, 3), keepdims=True) + 1e-5)
        return mean_square(jnp.sin(groups.reshape(x.shape) * p["group"]))

    return loss, {"w": a(5, c), "layer": a(c), "shift": a(c), "rms": a(c), "group": a(c)}, a(3, n(2, 5), 5)
