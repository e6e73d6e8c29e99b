"""Times PyTorch's counterparts of the cases on standard input; prints a JSON line for each: `torch_peer.py BENCH RUNS`."""

import json
import math
import sys
import time

try:
    import torch
except ImportError:
    sys.exit("python3 has no torch")
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

if not torch.cuda.is_available():
    sys.exit("torch finds no GPU")
BENCH, RUNS = sys.argv[1], int(sys.argv[2])
CASES = json.load(sys.stdin)
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
torch.set_grad_enabled(False)


def sample(work, pieces=1):
    """Seconds a piece, replayed as a CUDA graph where the work can be captured."""
    work()
    torch.cuda.synchronize()
    replay = work
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        replay = graph.replay
    except RuntimeError:
        torch.cuda.synchronize()
    start = time.perf_counter()
    runs = 0
    while time.perf_counter() - start < 0.3:
        replay()
        torch.cuda.synchronize()
        runs += 1
    runs = max(1, min(50, runs // 15))
    samples = []
    for _ in range(RUNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(runs):
            replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3 / runs / pieces)
    return samples


def report(name, make, **about):
    row = {"name": f"torch {name}", **about}
    try:
        work, pieces, more = make()
        row.update(samples=sample(work, pieces), **more)
    except Exception as error:  # Whatever PyTorch refuses is named, and the other cases go on.
        row["refused"] = str(error).split("\n")[0]
    print(json.dumps(row), flush=True)
    torch.cuda.empty_cache()


def normal(*shape, dtype=BF16):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def product(recipe, m, n, k):
    """A function of a weight to the product, the weight, and the bytes of the weight."""
    x = normal(m, k)
    if recipe == "none":
        return lambda w: F.linear(x, w), lambda: normal(n, k), 2 * n * k
    if recipe in ("float8dq-row", "float8dq-tensor"):
        row = recipe == "float8dq-row"
        sx = torch.ones(m, 1, device="cuda") if row else torch.ones((), device="cuda")
        sw = torch.ones(1, n, device="cuda") if row else torch.ones((), device="cuda")
        x8 = x.to(E4M3)
        work = lambda w: torch._scaled_mm(x8, w.t(), sx, sw, out_dtype=BF16, use_fast_accum=True)
        return work, lambda: normal(n, k).to(E4M3), n * k
    if recipe == "int8dq":
        x8 = torch.randint(-127, 127, (m, k), device="cuda", dtype=torch.int8)
        return lambda w: torch._int_mm(x8, w.t()), lambda: torch.randint(-127, 127, (n, k), device="cuda", dtype=torch.int8), n * k
    if recipe.startswith("int4wo-"):
        group = int(recipe.split("-")[1])
        scales = torch.ones(k // group, n, 2, device="cuda", dtype=BF16)
        make = lambda: torch._convert_weight_to_int4pack(torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8), 8)
        return lambda w: torch._weight_int4pack_mm(x, w, group, scales), make, n * k // 2 + n * k // group * 4
    raise ValueError("PyTorch alone has no such kernel")


def linear(recipe, m, n, k, copies=None):
    work, make, size = product(recipe, m, n, k)
    count = copies or min(16, max(2, math.ceil(160 * 2**20 / size)))
    weights = [make() for _ in range(count)]

    def run():
        for w in weights:
            work(w)

    return run, count, {"bytes": size, "flops": 2 * m * n * k}


def decode(context, backend, heads, kvHeads, size):
    q, moved = normal(1, heads, 1, size), 4 * kvHeads * context * size
    count = min(32, max(1, math.ceil(160 * 2**20 / moved)))
    caches = [(normal(1, kvHeads, context, size), normal(1, kvHeads, context, size)) for _ in range(count)]

    def run():
        with sdpa_kernel(backend):
            for k, v in caches:
                F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return run, count, {"bytes": moved, "flops": 4 * heads * size * context}


def prompt(context, backend, heads, kvHeads, size):
    q, k, v = normal(1, heads, context, size), normal(1, kvHeads, context, size), normal(1, kvHeads, context, size)

    def run():
        with sdpa_kernel(backend):
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return run, 1, {"flops": 2 * heads * size * context * (context + 1)}


class Llama:
    """A decoder of the given shape in bf16 with random weights, written with PyTorch's own ops."""

    def __init__(self, shape, capacity):
        h, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
        self.heads, self.kv = shape["num_attention_heads"], shape["num_key_value_heads"]
        self.size = h // self.heads
        kv = self.kv * self.size
        weight = lambda n, k: normal(n, k) / math.sqrt(k)
        self.layers = [
            (weight(h + 2 * kv, h), weight(h, h), weight(2 * inner, h), weight(h, inner)) for _ in range(layers)
        ]
        self.cache = [(normal(1, self.kv, capacity, self.size), normal(1, self.kv, capacity, self.size)) for _ in range(layers)]
        self.head, self.table = weight(shape["vocab_size"], h), normal(shape["vocab_size"], h)
        self.norm = torch.ones(h, device="cuda", dtype=BF16)
        self.angles = normal(capacity, self.size // 2)

    def rope(self, x, past):
        a, b = x.chunk(2, -1)
        angle = self.angles[past : past + x.shape[2]]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def __call__(self, ids, past):
        x = F.embedding(ids, self.table)
        count, size = len(ids), self.size
        for (qkv, o, gate_up, down), (keys, values) in zip(self.layers, self.cache):
            y = F.linear(F.rms_norm(x, self.norm.shape, self.norm), qkv).view(count, -1, size).transpose(0, 1)[None]
            q, k, v = y.split([self.heads, self.kv, self.kv], 1)
            keys[:, :, past : past + count], values[:, :, past : past + count] = self.rope(k, past), v
            end = past + count
            y = F.scaled_dot_product_attention(
                self.rope(q, past), keys[:, :, :end], values[:, :, :end], is_causal=count > 1, enable_gqa=True
            )
            x = x + F.linear(y[0].transpose(0, 1).reshape(count, -1), o)
            gate, up = F.linear(F.rms_norm(x, self.norm.shape, self.norm), gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down)
        return F.linear(F.rms_norm(x[-1:], self.norm.shape, self.norm), self.head).argmax(-1)


def model(cases):
    prefill, step = cases["prefill"], cases["decode"]
    past = step["prompt"] + step["tokens"] // 2
    llama = Llama(cases["shape"], max(prefill, past + 1))
    first, many = torch.zeros(1, dtype=torch.long, device="cuda"), torch.zeros(prefill, dtype=torch.long, device="cuda")
    # One token in the middle of the answer stands for all of them.
    report("none decode", lambda: (lambda: llama(first, past), 1, {}), recipe="none", **{"pass": "decode"})
    report("none prompt", lambda: (lambda: llama(many, 0), 1, {}), recipe="none", tokens=prefill, **{"pass": "prefill"})


if BENCH == "linear":
    for recipe in CASES["recipes"]:
        for n, k in CASES["shapes"]:
            for m in CASES["rows"]:
                about = {"recipe": recipe, "n": n, "k": k, "rows": m}
                report(f"{recipe} {n}x{k} M={m}", lambda: linear(recipe, m, n, k), **about)
elif BENCH == "roofline":
    for recipe in CASES["recipes"]:
        for size in CASES["sizes"]:
            # The product alone: eager PyTorch would add a launch for every step of quantization.
            report(f"{recipe} {size}, product alone", lambda: linear(recipe, size, size, size, 2), recipe=recipe, peer_size=size)
elif BENCH == "sdpa":
    shape = (CASES["heads"], CASES["kvHeads"], CASES["size"])
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        for context in CASES["contexts"]:
            about = {"kv": "bf16", "context": context}
            report(f"{name} decode {context}", lambda: decode(context, backend, *shape), **about, **{"pass": "decode"})
            report(f"{name} prompt {context}", lambda: prompt(context, backend, *shape), **about, **{"pass": "prompt"})
elif BENCH == "model":
    model(CASES)
