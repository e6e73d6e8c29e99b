"""Writes libraries.safetensors: weights packed by the libraries' own code, and the values that their own code gives back.

    pip install numpy torch safetensors transformers accelerate pydantic loguru
    python generate_libraries.py FOLDER

FOLDER holds checkouts of AutoGPTQ (9f7d370), AutoAWQ (88e4c76), compressed-tensors (52792be) and bitsandbytes (95f9af3) under these
names. Only their packing modules are imported: none of them needs a GPU.
"""

import importlib
import os
import sys
import types

os.environ["TORCHDYNAMO_DISABLE"] = "1"
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

FOLDER = os.path.abspath(sys.argv[1])
N, K, G = 32, 96, 32
generator = torch.Generator().manual_seed(11)


def package(name, *path):
    """A package without its __init__, which would import kernels."""
    module = types.ModuleType(name)
    module.__path__ = [os.path.join(FOLDER, *path)]
    sys.modules[name] = module


for parts in (("auto_gptq",), ("auto_gptq", "nn_modules"), ("auto_gptq", "nn_modules", "qlinear")):
    package(".".join(parts), "AutoGPTQ", *parts)
for parts in (("awq",), ("awq", "modules"), ("awq", "modules", "linear")):
    package(".".join(parts), "AutoAWQ", *parts)
# Written by its build.
version = types.ModuleType("compressed_tensors.version")
version.__version__ = version.version = "0"
sys.modules["compressed_tensors.version"] = version
sys.path += [os.path.join(FOLDER, "compressed-tensors", "src"), os.path.join(FOLDER, "bitsandbytes")]


def integers(low, high, shape):
    return torch.randint(low, high, shape, generator=generator)


def scales_of(shape):
    """Numbers that float16 holds."""
    return (torch.rand(shape, generator=generator) / 50 + 0.001).half().float()


def linear_of(codes, zeros, scales, group):
    """A linear [N, K] whose weight has these codes exactly."""
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = (codes - zeros[:, group]).float() * scales[:, group]
    return linear


def gptq(out):
    qlinear = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda")
    for bits in (2, 3, 4, 8):
        for order in (False, True):
            name = f"gptq{bits}{'act' if order else ''}"
            group = torch.arange(K) // G
            if order:
                group = group[torch.randperm(K, generator=generator)]
            codes, scales = integers(0, 2**bits, (N, K)), scales_of((N, K // G))
            zeros = integers(1, 2**bits, (N, K // G))
            layer = qlinear.QuantLinear(bits, G, K, N, False, weight_dtype=torch.float32)
            layer.pack(linear_of(codes, zeros, scales, group), scales, zeros.float(), group.int())
            out |= {f"{name}.qweight": layer.qweight, f"{name}.qzeros": layer.qzeros}
            out |= {f"{name}.scales": layer.scales.half(), f"{name}.g_idx": layer.g_idx}
            out[f"{name}.values"] = layer(torch.eye(K)).T


def awq(out):
    gemm = importlib.import_module("awq.modules.linear.gemm")
    packing = importlib.import_module("awq.utils.packing_utils")
    codes, zeros, scales = integers(0, 16, (N, K)), integers(0, 16, (N, K // G)), scales_of((N, K // G))
    linear = linear_of(codes, zeros, scales, torch.arange(K) // G)
    layer = gemm.WQLinear_GEMM.from_linear(linear, 4, G, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
    out |= {"awq.qweight": layer.qweight, "awq.qzeros": layer.qzeros, "awq.scales": layer.scales}
    out["awq.values"] = packing.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, G).T


def compressed(out):
    from compressed_tensors.compressors.quantized_compressors import fp4_quantized, pack_quantized
    from compressed_tensors.quantization import QuantizationArgs

    for bits, symmetric, order in ((4, True, False), (4, False, False), (8, True, False), (4, False, True)):
        name, middle = f"ct{bits}{'sym' if symmetric else ''}{'act' if order else ''}", 2 ** (bits - 1)
        group = (torch.arange(K) // G)[torch.randperm(K, generator=generator) if order else torch.arange(K)]
        index = group.int() if order else None
        args = QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=G, symmetric=symmetric)
        scales = scales_of((N, K // G))
        zeros = torch.zeros(N, K // G, dtype=torch.int8) if symmetric else integers(-middle, middle, (N, K // G)).to(torch.int8)
        weight = linear_of(integers(-middle, middle, (N, K)), zeros, scales, group).weight.data
        compressor = pack_quantized.PackedQuantizationCompressor()
        parts = compressor.compress_weight(weight, scales, args, zero_point=None if symmetric else zeros, g_idx=index)
        parts["weight_scale"] = scales
        if order:
            parts["weight_g_idx"] = index
        out[f"{name}.values"] = compressor.decompress_weight(parts, args)
        parts["weight_scale"] = scales.half()
        out |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    weight = torch.randn(N, K, generator=generator)
    whole = 448 * 6 / weight.abs().max()
    scales = (weight.view(N, K // 16, 16).abs().amax(2) / 6 * whole).to(torch.float8_e4m3fn)
    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True)
    compressor = fp4_quantized.NVFP4PackedCompressor()
    parts = compressor.compress_weight(weight, scales, whole, args)
    codes = fp4_quantized.unpack_fp4_from_uint8(parts["weight_packed"], N, K, dtype=torch.float32)
    # What its dequantize does, in float32.
    out["ctnv.values"] = codes * (scales.float() / whole).repeat_interleave(16, 1)
    out |= {"ctnv.weight_packed": parts["weight_packed"], "ctnv.weight_scale": scales, "ctnv.weight_global_scale": whole.view(1)}


def bitsandbytes(out):
    from bitsandbytes import functional

    for name, nested, block in (("nf4", False, 64), ("nf4nested", True, 64), ("nf4wide", True, 128), ("fp4", True, 64)):
        # More than 256 blocks of the nested one, so that it has several nested scales.
        weight = torch.randn(264, 64, generator=generator) if name == "nf4nested" else torch.randn(N, 128, generator=generator)
        packed, state = functional.quantize_4bit(weight, blocksize=block, compress_statistics=nested, quant_type=name[:3])
        out[f"{name}.weight"] = packed
        out |= {f"{name}.weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
        out[f"{name}.values"] = functional.dequantize_4bit(packed, state)


if __name__ == "__main__":
    tensors = {}
    with torch.no_grad():
        for library in (gptq, awq, compressed, bitsandbytes):
            library(tensors)
    here = os.path.dirname(os.path.abspath(__file__))
    save_file({name: value.contiguous() for name, value in tensors.items()}, os.path.join(here, "libraries.safetensors"))
