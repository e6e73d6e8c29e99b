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

import llama

if not torch.cuda.is_available():
    sys.exit("torch finds no GPU")
BENCH, RUNS = sys.argv[1], int(sys.argv[2])
CASES = json.load(sys.stdin)
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
# What torch.compile is asked for in the roofline bench.
COMPILED = ("none", "float8dq-row")
NO_KERNEL = "PyTorch alone has no such kernel"
torch.set_grad_enabled(False)


def sample(work, pieces=1):
    """Seconds a piece, and whether the work was replayed as a CUDA graph: where it can be captured."""
    work()
    torch.cuda.synchronize()
    replay, captured = work, False
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        replay, captured = graph.replay, True
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
    return samples, captured


def report(name, make, **about):
    row = {"name": f"torch {name}", **about}
    try:
        work, pieces, more = make()
        samples, captured = sample(work, pieces)
        row.update(samples=samples, graph=captured, **more)
        row["name"] += ", CUDA graph" if captured else ", launched one by one"
    except Exception as error:  # Whatever PyTorch refuses is named, and the other cases go on.
        row["refused"] = str(error).split("\n")[0]
    print(json.dumps(row), flush=True)
    torch.cuda.empty_cache()
    return "refused" not in row


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
    raise ValueError(NO_KERNEL)


def copies(size):
    """Pieces of the roofline that a run holds, as `copiesOf` in roofline.mjs."""
    return min(16, math.ceil(160 * 2**20 / (4 * size**2)))


def linear(recipe, m, n, k, count=None):
    work, make, size = product(recipe, m, n, k)
    count = count or min(16, max(2, math.ceil(160 * 2**20 / size)))
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


def compiled(recipe, size):
    """ReLU -> Linear as torch.compile makes it, with what is quantized on the fly: end to end, from bf16."""
    count = copies(size)
    weight = lambda: (normal(size, size) / math.sqrt(size),) if recipe == "none" else llama.weight(recipe, size, size)
    pieces = [(normal(size, size), *weight()) for _ in range(count)]
    work = torch.compile(lambda x, *w: llama.linear(recipe, F.relu(x), *w), dynamic=False)

    def run():
        for piece in pieces:
            work(*piece)

    return run, count, {"flops": 2 * size**3}


def model(cases):
    prefill, step = cases["prefill"], cases["decode"]
    # One token in the middle of the answer stands for all of them.
    passes = {"decode": (1, step["prompt"] + step["tokens"] // 2), "prefill": (prefill, 0)}
    for recipe in cases["recipes"]:
        wanted = [each for each, known in (("decode", llama.DECODES), ("prefill", llama.PROMPTS)) if recipe in known]
        if not wanted:
            continue
        torch._dynamo.reset()
        decoder = llama.Llama(cases["shape"], recipe, max(prefill, sum(passes["decode"])))
        for each in wanted:
            count, past = passes[each]
            # Layer by layer: torch.compile takes as long for one as for the model's 32.
            for how in (True, False):
                name = f"{recipe} {each}, {'compiled layers' if how else 'eager'}"
                about = {"recipe": recipe, "pass": each, "tokens": count}
                if report(name, lambda: (decoder.step(count, past, how), 1, {}), **about):
                    break
        del decoder
        torch.cuda.empty_cache()


def multiplied(recipes):
    """The recipes that torch multiplies with; the others are refused once, not for every size."""
    for recipe in recipes:
        if recipe in ("none", "int8dq", "float8dq-row", "float8dq-tensor") or recipe.startswith("int4wo-"):
            yield recipe
        else:
            print(json.dumps({"name": f"torch {recipe}", "recipe": recipe, "refused": NO_KERNEL}), flush=True)


if BENCH == "linear":
    for recipe in multiplied(CASES["recipes"]):
        for n, k in CASES["shapes"]:
            for m in CASES["rows"]:
                about = {"recipe": recipe, "n": n, "k": k, "rows": m}
                report(f"{recipe} {n}x{k} M={m}", lambda: linear(recipe, m, n, k), **about)
elif BENCH == "roofline":
    for recipe in multiplied(CASES["recipes"]):
        for size in CASES["sizes"]:
            about = {"recipe": recipe, "peer_size": size}
            # Operands as they lie, of any scales: what quantizing costs is not in it.
            report(f"{recipe} {size}, product alone", lambda: linear(recipe, size, size, size, copies(size)), work=f"{recipe}, product alone", **about)
            if recipe in COMPILED:
                report(f"{recipe} {size}, compiled", lambda: compiled(recipe, size), work=f"{recipe}, relu and all, compiled", **about)
elif BENCH == "sdpa":
    shape = (CASES["heads"], CASES["kvHeads"], CASES["size"])
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        for context in CASES["contexts"]:
            about = {"kv": "bf16", "context": context}
            report(f"{name} decode {context}", lambda: decode(context, backend, *shape), **about, **{"pass": "decode"})
            report(f"{name} prompt {context}", lambda: prompt(context, backend, *shape), **about, **{"pass": "prompt"})
elif BENCH == "model":
    model(CASES)
