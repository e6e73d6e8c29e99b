"""A Llama-shaped decoder with random weights, written with PyTorch's own ops: what torch alone reaches with a recipe."""

import math

import torch
import torch.nn.functional as F

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
# Short names of recipes that torch has kernels for, or compiles: what a pass over a token, and over a prompt, multiplies with.
DECODES = ("none", "int8wo", "int4wo-64", "float8wo", "float8dq-row")
PROMPTS = ("none", "float8dq-row")


def normal(*shape):
    return torch.randn(*shape, device="cuda", dtype=BF16)


def quantized(x):
    """Rows of e4m3 and their scales."""
    scale = (x.abs().amax(-1, keepdim=True).float() / 448).clamp(min=1e-12)
    return (x.float() / scale).to(E4M3), scale


def weight(recipe, n, k):
    """Random weights [n, k] as the recipe stores them."""
    if recipe == "none":
        return (normal(n, k) / math.sqrt(k),)
    if recipe == "int8wo":
        codes = torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8)
        return codes, torch.full((n,), 1 / 64 / math.sqrt(k), device="cuda", dtype=BF16)
    if recipe == "int4wo-64":
        codes = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
        scales = torch.zeros(k // 64, n, 2, device="cuda", dtype=BF16)
        scales[:, :, 0] = 1 / 4 / math.sqrt(k)
        return torch._convert_weight_to_int4pack(codes, 8), scales
    codes, scale = quantized(normal(n, k) / math.sqrt(k))
    return (codes, scale.flatten().to(BF16)) if recipe == "float8wo" else (codes, scale.t())


def linear(recipe, x, w, scale=None):
    """x [M, K] in bf16 times a weight of `weight`."""
    if recipe == "none":
        return F.linear(x, w)
    if recipe in ("int8wo", "float8wo"):
        return F.linear(x, w.to(BF16)) * scale
    if recipe == "int4wo-64":
        return torch._weight_int4pack_mm(x, w, 64, scale)
    codes, rows = quantized(x)
    return torch._scaled_mm(codes, w.t(), rows, scale, out_dtype=BF16, use_fast_accum=True)


class Llama:
    """A decoder of the given shape in bf16 but for its linears, the head among them."""

    def __init__(self, shape, recipe, capacity):
        h, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
        self.recipe, self.heads, self.kv = recipe, shape["num_attention_heads"], shape["num_key_value_heads"]
        self.size = h // self.heads
        kv = self.kv * self.size
        shapes = ((h + 2 * kv, h), (h, h), (2 * inner, h), (h, inner))
        self.layers = [[weight(recipe, n, k) for n, k in shapes] for _ in range(layers)]
        cache = lambda: normal(1, self.kv, capacity, self.size)
        self.cache = [(cache(), cache()) for _ in range(layers)]
        self.head, self.table = weight(recipe, shape["vocab_size"], h), normal(shape["vocab_size"], h)
        self.norm = torch.ones(h, device="cuda", dtype=BF16)
        self.angles = torch.rand(capacity, self.size // 2, device="cuda") * 6.28

    def layer(self, x, weights, keys, values, past, cos, sin):
        """One layer over x [count, h], whose keys and values go into the cache at `past`."""
        qkv, o, gate_up, down = weights
        count, recipe, norm = x.shape[0], self.recipe, self.norm

        def rope(y):
            a, b = y.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        y = linear(recipe, F.rms_norm(x, norm.shape, norm), *qkv).view(count, -1, self.size).transpose(0, 1)[None]
        q, k, v = y.split([self.heads, self.kv, self.kv], 1)
        end = past + count
        keys[:, :, past:end], values[:, :, past:end] = rope(k), v
        y = F.scaled_dot_product_attention(
            rope(q), keys[:, :, :end], values[:, :, :end], is_causal=count > 1, enable_gqa=True
        )
        x = x + linear(recipe, y[0].transpose(0, 1).reshape(count, -1), *o)
        gate, up = linear(recipe, F.rms_norm(x, norm.shape, norm), *gate_up).chunk(2, -1)
        return x + linear(recipe, F.silu(gate) * up, *down)

    def last(self, x):
        return linear(self.recipe, F.rms_norm(x[-1:], self.norm.shape, self.norm), *self.head).argmax(-1)

    def step(self, count, past, compiled):
        """A function without arguments that runs `count` tokens after `past` and draws the next one."""
        ids = torch.randint(0, self.table.shape[0], (count,), device="cuda")
        angles = self.angles[past : past + count]
        cos, sin = angles.cos().to(BF16), angles.sin().to(BF16)
        layer, last = self.layer, self.last
        if compiled:
            # One row: products become reductions that decode weights on the way, and are tuned; the others are the library's.
            tuned = {"coordinate_descent_tuning": count == 1}
            layer, last = (torch.compile(each, dynamic=False, options=tuned) for each in (layer, last))

        def run():
            x = F.embedding(ids, self.table)
            for weights, (keys, values) in zip(self.layers, self.cache):
                x = layer(x, weights, keys, values, past, cos, sin)
            return last(x)

        return run
