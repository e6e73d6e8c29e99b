"""Writes the files beside it: what other tools' checkpoints hold, and the values that a reader must recover.

    pip install numpy safetensors gguf sentencepiece torch
    python generate.py

ggml_blocks   random blocks of every GGML type, dequantized by the gguf package
tiny.gguf     a Llama of two layers written by the gguf package as llama.cpp's converter writes it, with tiny_gguf (values)
spm.gguf      no tensors: a SentencePiece vocabulary, with the ids that sentencepiece gives to texts (in its metadata)
<arch>.gguf   small models of other architectures: names by the gguf package's own map, weights by the rule of `weights`
packed        GPTQ, AWQ, compressed-tensors and fp8 weights packed with numpy as those libraries' sources do, with values
"""

import io
import json
import os

import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from gguf import GGUFWriter, MODEL_ARCH_NAMES, RopeScalingType, TokenType, get_tensor_name_map, quants
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

HERE = os.path.dirname(os.path.abspath(__file__))
rng = np.random.default_rng(7)


def path(name):
    return os.path.join(HERE, name)


def finite_f16(shape):
    """Random float16 bits without infinities, of moderate exponents."""
    bits = rng.integers(0, 1 << 16, shape, dtype=np.uint16)
    exponent = rng.integers(5, 20, shape, dtype=np.uint16)
    return ((bits & 0x83FF) | (exponent << 10)).astype("<u2").view(np.uint8).reshape(*shape[:-1], -1)


# Type: bytes of a block, elements, and where its float16 numbers lie.
BLOCKS = {
    "Q4_0": (18, 32, [0]),
    "Q4_1": (20, 32, [0, 2]),
    "Q5_0": (22, 32, [0]),
    "Q5_1": (24, 32, [0, 2]),
    "Q8_0": (34, 32, [0]),
    "Q2_K": (84, 256, [80, 82]),
    "Q3_K": (110, 256, [108]),
    "Q4_K": (144, 256, [0, 2]),
    "Q5_K": (176, 256, [0, 2]),
    "Q6_K": (210, 256, [208]),
    "IQ4_NL": (18, 32, [0]),
    "IQ4_XS": (136, 256, [0]),
    "MXFP4": (17, 32, []),
}


def ggml_blocks():
    out = {}
    for name, (size, elements, halves) in BLOCKS.items():
        blocks = rng.integers(0, 256, (3, 512 // elements, size), dtype=np.uint8)
        for at in halves:
            blocks[:, :, at : at + 2] = finite_f16((3, 512 // elements, 1))
        if name == "MXFP4":
            blocks[:, :, 0] = rng.integers(0, 250, blocks.shape[:2])
        rows = blocks.reshape(3, -1)
        with np.errstate(all="ignore"):
            values = quants.dequantize(rows, T[name])
        out[f"{name}.blocks"] = rows
        out[f"{name}.values"] = np.ascontiguousarray(values, dtype=np.float32)
    save_file(out, path("ggml_blocks.safetensors"))


def permute(weights, heads):
    """The order that llama.cpp's converter gives to the rows of q and k."""
    shape = weights.shape
    return weights.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def tiny_gguf():
    hidden, inner, heads, kv, dim, vocab = 64, 64, 4, 2, 16, 260
    kinds = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16", "F32"]
    writer = GGUFWriter(path("tiny.gguf"), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(dim)
    writer.add_vocab_size(vocab)
    characters = [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174 else None for b in range(256)]
    extra = iter(range(256, 512))
    characters = [c if c is not None else chr(next(extra)) for c in characters]
    tokens = ["<bos>", "<eos>", *characters, "th", "the"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * 258)
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    values = {}

    def matrix(gguf, hf, shape, kind, heads_of=None):
        weights = (rng.standard_normal(shape) / 8).astype(np.float32)
        stored = permute(weights, heads_of) if heads_of else weights
        if kind == "F32":
            data = stored
            back = weights
        elif kind == "F16":
            data = stored.astype(np.float16)
            back = weights.astype(np.float16).astype(np.float32)
        else:
            data = quants.quantize(stored, T[kind])
            back = quants.dequantize(quants.quantize(weights, T[kind]), T[kind])
        writer.add_tensor(gguf, data, raw_dtype=None if kind in ("F32", "F16") else T[kind])
        values[hf] = np.ascontiguousarray(back, dtype=np.float32)

    def vector(gguf, hf, size):
        weights = (1 + rng.standard_normal(size) / 10).astype(np.float32)
        writer.add_tensor(gguf, weights)
        values[hf] = weights

    matrix("token_embd.weight", "model.embed_tokens.weight", (vocab, hidden), kinds[0])
    vector("output_norm.weight", "model.norm.weight", hidden)
    layer, hf = "blk.0.", "model.layers.0."
    vector(layer + "attn_norm.weight", hf + "input_layernorm.weight", hidden)
    vector(layer + "ffn_norm.weight", hf + "post_attention_layernorm.weight", hidden)
    matrix(layer + "attn_q.weight", hf + "self_attn.q_proj.weight", (heads * dim, hidden), kinds[1], heads)
    matrix(layer + "attn_k.weight", hf + "self_attn.k_proj.weight", (kv * dim, hidden), kinds[5], kv)
    matrix(layer + "attn_v.weight", hf + "self_attn.v_proj.weight", (kv * dim, hidden), kinds[6])
    matrix(layer + "attn_output.weight", hf + "self_attn.o_proj.weight", (hidden, heads * dim), kinds[3])
    matrix(layer + "ffn_gate.weight", hf + "mlp.gate_proj.weight", (inner, hidden), kinds[4])
    matrix(layer + "ffn_up.weight", hf + "mlp.up_proj.weight", (inner, hidden), kinds[2])
    matrix(layer + "ffn_down.weight", hf + "mlp.down_proj.weight", (hidden, inner), kinds[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    # Only q, k and one other say something that the blocks above do not.
    kept = ["q_proj", "k_proj", "v_proj", "norm", "down_proj"]
    save_file({k: v for k, v in values.items() if any(part in k for part in kept)}, path("tiny_gguf.safetensors"))


TEXTS = ["the cat sat on the mat", "Hello, world!", " two  spaces", "naïve 日本 😀", "", "a\nb\tc", "x = 3.14159;"]


def spm_gguf():
    import sentencepiece as spm

    corpus = ["the cat sat on the mat and the dog sat on the log", "hello world, this is a small text about cats"] * 50
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        minloglevel=2,
        sentence_iterator=iter(corpus), model_writer=model, vocab_size=330, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, bos_id=1, eos_id=2, unk_id=0, normalization_rule_name="identity",
        remove_extra_whitespaces=False, hard_vocab_limit=False,
    )
    sp = spm.SentencePieceProcessor(model_proto=model.getvalue())
    size = sp.get_piece_size()
    writer = GGUFWriter(path("spm.gguf"), "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([sp.id_to_piece(i) for i in range(size)])
    writer.add_token_scores([sp.get_score(i) for i in range(size)])
    kind = lambda i: (
        TokenType.BYTE if sp.is_byte(i) else TokenType.CONTROL if sp.is_control(i) else TokenType.UNKNOWN if sp.is_unknown(i) else TokenType.NORMAL
    )
    writer.add_token_types([kind(i) for i in range(size)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_string("test.texts", json.dumps(TEXTS))
    writer.add_string("test.ids", json.dumps([sp.encode(text) for text in TEXTS]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def weights(name, shape):
    """Integers of -127 to 127, the same for one name everywhere: FNV-1a of the name, then a hash of each place."""
    seed = 2166136261
    for byte in name.encode():
        seed = (seed ^ byte) * 16777619 % 2**32
    x = np.arange(int(np.prod(shape)), dtype=np.uint32) * np.uint32(2654435761) + np.uint32(seed)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(2246822519)
    x ^= x >> np.uint32(13)
    values = (x >> np.uint32(8)).astype(np.int64) % 255 - 127
    values[::32] = 127  # So that a block of Q8_0 holds them exactly.
    return (values / 512).astype(np.float32).reshape(shape)


# Architecture, its converter's shift of norms, keys beside those of every file, layers, experts, and matrices by layer.
HIDDEN, INNER, HEADS, KV, DIM, VOCAB = 32, 64, 4, 2, 16, 40
ARCHITECTURES = {
    "gemma2": (2, 1, 0, dict(attn_logit_softcapping=5.0, final_logit_softcapping=4.0, sliding_window=9)),
    "gemma3": (2, 1, 0, dict(sliding_window=9, sliding_window_pattern=2, rope_freq_base=1e6, linear=8.0)),
    "llama": (1, 0, 4, dict(expert_used_count=2)),
    "qwen2moe": (1, 0, 4, dict(expert_used_count=2, expert_feed_forward_length=32, shared=32)),
    "qwen3moe": (1, 0, 4, dict(expert_used_count=2, expert_feed_forward_length=32)),
}


def architectures():
    for name, (layers, shift, experts, keys) in ARCHITECTURES.items():
        writer = GGUFWriter(path(f"arch_{name}.gguf"), name)
        arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == name)
        names = get_tensor_name_map(arch, layers)
        writer.add_context_length(64)
        writer.add_embedding_length(HIDDEN)
        writer.add_block_count(layers)
        writer.add_feed_forward_length(INNER)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV)
        writer.add_key_length(DIM)
        writer.add_value_length(DIM)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(keys.get("rope_freq_base", 10000.0))
        if experts:
            writer.add_expert_count(experts)
            writer.add_expert_used_count(keys["expert_used_count"])
        if "expert_feed_forward_length" in keys:
            writer.add_expert_feed_forward_length(keys["expert_feed_forward_length"])
        if "shared" in keys:
            writer.add_expert_shared_feed_forward_length(keys["shared"])
        if "sliding_window" in keys:
            writer.add_sliding_window(keys["sliding_window"])
        if "sliding_window_pattern" in keys:
            writer.add_sliding_window_pattern(keys["sliding_window_pattern"])
        if "linear" in keys:
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(keys["linear"])
        if "attn_logit_softcapping" in keys:
            writer.add_attn_logit_softcapping(keys["attn_logit_softcapping"])
            writer.add_final_logit_softcapping(keys["final_logit_softcapping"])
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(["<s>", "</s>", "ab", *(chr(97 + i % 26) * (1 + i // 26) for i in range(VOCAB - 3))])
        writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (VOCAB - 2))
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)

        def put(hf, values, quantize):
            """A tensor by its name without `.weight`, as the converter would write it."""
            stem, suffix = hf.rsplit(".", 1)
            gguf = f"{names.get_name(stem)}.{suffix}"
            if quantize:
                writer.add_tensor(gguf, quants.quantize(values, T.Q8_0), raw_dtype=T.Q8_0)
            else:
                writer.add_tensor(gguf, values)

        def matrix(hf, shape, quantize=True):
            values = weights(hf, shape)
            for part, heads in (("q_proj", HEADS), ("k_proj", KV)):
                if name == "llama" and part in hf:
                    values = np.ascontiguousarray(permute(values, heads))
            put(hf, values, quantize and values.ndim > 1)

        def norm(hf, size=HIDDEN):
            values = weights(hf, (size,))
            put(hf, values + np.float32(1), False)

        matrix("model.embed_tokens.weight", (VOCAB, HIDDEN))
        norm("model.norm.weight")
        if not shift:
            matrix("lm_head.weight", (VOCAB, HIDDEN))
        for layer in range(layers):
            base = f"model.layers.{layer}."
            norm(base + "input_layernorm.weight")
            norm(base + "post_attention_layernorm.weight")
            if shift:
                norm(base + "pre_feedforward_layernorm.weight")
                norm(base + "post_feedforward_layernorm.weight")
            for part, width in (("q", HEADS * DIM), ("k", KV * DIM), ("v", KV * DIM)):
                matrix(f"{base}self_attn.{part}_proj.weight", (width, HIDDEN))
                if name == "qwen2moe":
                    matrix(f"{base}self_attn.{part}_proj.bias", (width,))
            matrix(base + "self_attn.o_proj.weight", (HIDDEN, HEADS * DIM))
            if name in ("gemma3", "qwen3moe"):
                norm(base + "self_attn.q_norm.weight", DIM)
                norm(base + "self_attn.k_norm.weight", DIM)
            if not experts:
                for part in ("gate", "up"):
                    matrix(f"{base}mlp.{part}_proj.weight", (INNER, HIDDEN))
                matrix(base + "mlp.down_proj.weight", (HIDDEN, INNER))
                continue
            mixtral = name == "llama"
            inner = INNER if mixtral else keys["expert_feed_forward_length"]
            block = base + ("block_sparse_moe." if mixtral else "mlp.")
            matrix(block + "gate.weight", (experts, HIDDEN), False)
            for part, other in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
                kind = other if mixtral else part
                shape = (HIDDEN, inner) if part == "down_proj" else (inner, HIDDEN)
                stack = np.stack([weights(f"{block}experts.{e}.{kind}.weight", shape) for e in range(experts)])
                put(f"{block}experts.{kind}.weight", stack, True)
            if "shared" in keys:
                matrix(block + "shared_expert_gate.weight", (1, HIDDEN), False)
                for part in ("gate", "up"):
                    matrix(f"{block}shared_expert.{part}_proj.weight", (keys["shared"], HIDDEN))
                matrix(block + "shared_expert.down_proj.weight", (HIDDEN, keys["shared"]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def pack_rows(codes, bits):
    """Codes [rows, columns] to int32 words along the columns, least significant first."""
    rows, columns = codes.shape
    bit = ((codes[:, :, None] >> np.arange(bits)) & 1).reshape(rows, columns * bits)
    words = np.packbits(bit.astype(np.uint8), axis=1, bitorder="little")
    return np.ascontiguousarray(words).view("<i4")


def packed():
    out = {}
    n, k, g = 64, 64, 32
    f16 = lambda shape: (rng.random(shape) / 50 + 0.001).astype(np.float16)
    for bits in (2, 3, 4, 8):
        for sym in (True, False):
            name = f"gptq{bits}{'sym' if sym else ''}"
            codes = rng.integers(0, 2**bits, (k, n))
            scales = f16((k // g, n))
            zeros = np.full((k // g, n), 2 ** (bits - 1)) if sym else rng.integers(1, 2**bits, (k // g, n))
            out[f"{name}.qweight"] = np.ascontiguousarray(pack_rows(np.ascontiguousarray(codes.T), bits).T)
            out[f"{name}.qzeros"] = pack_rows(zeros - 1, bits)
            out[f"{name}.scales"] = scales
            out[f"{name}.g_idx"] = (np.arange(k) // g).astype(np.int32)
            of = np.arange(k) // g
            out[f"{name}.values"] = ((codes - zeros[of]).astype(np.float32) * scales[of].astype(np.float32)).T.copy()
    codes = rng.integers(0, 16, (k, n))
    zeros = rng.integers(0, 16, (k // g, n))
    scales = f16((k // g, n))
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    awq = lambda a: pack_rows(a.reshape(len(a), -1, 8)[:, :, order].reshape(len(a), -1), 4)
    of = np.arange(k) // g
    out |= {"awq.qweight": awq(codes), "awq.qzeros": awq(zeros), "awq.scales": scales}
    out["awq.values"] = ((codes - zeros[of]).astype(np.float32) * scales[of].astype(np.float32)).T.copy()
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in out.items()}
    # compressed-tensors: [N, K], codes and zero points offset by the middle one; zero points packed along N.
    for bits, sym in ((4, True), (4, False), (8, True)):
        name = f"ct{bits}{'sym' if sym else ''}"
        middle = 2 ** (bits - 1)
        codes = rng.integers(-middle, middle, (n, k))
        scale = f16((n, k // g))
        zero = np.zeros((n, k // g), int) if sym else rng.integers(-middle, middle, (n, k // g))
        tensors[f"{name}.weight_packed"] = torch.from_numpy(pack_rows(codes + middle, bits))
        tensors[f"{name}.weight_scale"] = torch.from_numpy(scale)
        tensors[f"{name}.weight_shape"] = torch.tensor([n, k])
        if not sym:
            columns = pack_rows(np.ascontiguousarray(zero.T) + middle, bits)
            tensors[f"{name}.weight_zero_point"] = torch.from_numpy(np.ascontiguousarray(columns.T))
        values = (codes - zero[:, of]).astype(np.float32) * scale[:, of].astype(np.float32)
        tensors[f"{name}.values"] = torch.from_numpy(values)
    # NVFP4: the divisor of the block scales is stored; a power of two keeps its reciprocal exact.
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    codes = rng.integers(0, 16, (n, k))
    scale = (torch.rand(n, k // 16) * 400 + 1).to(torch.float8_e4m3fn)
    tensors["ctnv.weight_packed"] = torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8))
    tensors["ctnv.weight_scale"] = scale
    tensors["ctnv.weight_global_scale"] = torch.tensor([512.0])
    spread = (scale.float() / 512.0).repeat_interleave(16, 1)
    tensors["ctnv.values"] = torch.from_numpy(e2m1[codes]) * spread
    # fp8: per tensor, per row, and blocks with a short last one.
    weight = torch.randn(n, k).to(torch.float8_e4m3fn)
    for name, shape in (("fp8tensor", (1,)), ("fp8row", (n, 1))):
        scale = torch.rand(shape) / 10
        tensors |= {f"{name}.weight": weight.clone(), f"{name}.weight_scale": scale}
        tensors[f"{name}.values"] = weight.float() * scale
    tall = torch.randn(136, 256).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2) / 10
    tensors |= {"fp8block.weight": tall, "fp8block.weight_scale_inv": scale}
    tensors["fp8block.values"] = tall.float() * scale.repeat_interleave(128, 0)[:136].repeat_interleave(128, 1)
    save_torch({name: value.contiguous() for name, value in tensors.items()}, path("packed.safetensors"))


if __name__ == "__main__":
    torch.manual_seed(7)
    ggml_blocks()
    tiny_gguf()
    spm_gguf()
    architectures()
    packed()
