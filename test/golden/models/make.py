"""Small models of every architecture with random weights, and what transformers computes with them in float64.

    python make.py [NAME...]          (torch 2.13.0, transformers 5.18.0, safetensors 0.8.0, numpy 2.4)

Each folder holds config.json and model.safetensors (bfloat16), as transformers saves them, and expected.safetensors: `ids` i32
[N], `logits` f32 [N, V] after each of them, `greedy` i32 [G], the tokens that follow the first PROMPT of them.

transformers computes norms, rotary angles, softmax and routing in float32 whatever the model's dtype is. Here float32 is made
another name of float64 while a model is built and run, so that the numbers are exact to 1e-13 or so.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
import transformers
from transformers import (
    Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig,
    LlamaForCausalLM, MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM, Olmo2Config, Olmo2ForCausalLM,
    Phi3Config, Phi3ForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen3Config,
    Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, SmolLM3Config, SmolLM3ForCausalLM,
)

HERE = Path(__file__).parent
PROMPT = 20
TOKENS = 40
GREEDY = 12

TINY = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=None,
)
ONE_LAYER = dict(TINY, num_hidden_layers=1, tie_word_embeddings=True)


def rope(kind, theta=10000.0, **fields):
    return dict(rope_type=kind, rope_theta=theta, **fields)


MODELS = {
    # Rope scaling: positions go past the original context of 16.
    "llama-llama3": (LlamaForCausalLM, LlamaConfig(**dict(TINY, rope_parameters=rope(
        "llama3", 500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)))),
    "llama-bias": (LlamaForCausalLM, LlamaConfig(**dict(ONE_LAYER, attention_bias=True, mlp_bias=True))),
    "llama-linear": (LlamaForCausalLM, LlamaConfig(**dict(ONE_LAYER, rope_parameters=rope("linear", factor=4.0)))),
    "llama-dynamic": (LlamaForCausalLM, LlamaConfig(**dict(
        ONE_LAYER, max_position_embeddings=16, rope_parameters=rope("dynamic", factor=4.0)))),
    "llama-yarn": (LlamaForCausalLM, LlamaConfig(**dict(ONE_LAYER, rope_parameters=rope(
        "yarn", 100.0, factor=2.0, original_max_position_embeddings=32, beta_fast=1.0, beta_slow=0.1)))),
    "mistral": (MistralForCausalLM, MistralConfig(**dict(TINY, sliding_window=9, head_dim=16))),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**dict(
        TINY, num_hidden_layers=3, use_sliding_window=True, sliding_window=7, max_window_layers=1))),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**dict(TINY, head_dim=12, rope_parameters=rope("default", 1e6)))),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**dict(
        TINY, head_dim=16, sliding_window=9, query_pre_attn_scalar=24, attn_logit_softcapping=5.0,
        final_logit_softcapping=4.0))),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**dict(
        TINY, num_hidden_layers=3, head_dim=16, sliding_window=9, query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={"sliding_attention": rope("default", 100.0), "full_attention": rope("linear", 1e6, factor=8.0)}))),
    "phi3": (Phi3ForCausalLM, Phi3Config(**dict(TINY, sliding_window=20))),
    "phi3-longrope": (Phi3ForCausalLM, Phi3Config(**dict(
        TINY, num_hidden_layers=1, head_dim=8, original_max_position_embeddings=16, rope_parameters=rope(
            "longrope", short_factor=[1.0, 1.25, 1.5], long_factor=[1.5, 3.0, 6.0], partial_rotary_factor=0.75)))),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config(**dict(
        TINY, num_hidden_layers=3, no_rope_layers=[1, 0, 1], rope_parameters=rope("default", 2e6)))),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config(**TINY)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(
        vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**dict(
        TINY, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=None))),
    "qwen2-moe": (Qwen2MoeForCausalLM, Qwen2MoeConfig(**dict(
        TINY, num_hidden_layers=2, moe_intermediate_size=16, shared_expert_intermediate_size=32, num_experts=6,
        num_experts_per_tok=3, decoder_sparse_step=2))),
    "qwen3-moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**dict(
        TINY, head_dim=8, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
        mlp_only_layers=[0]))),
}


class exact:
    """float32 and its names are float64 inside."""

    def __enter__(self):
        self.kept = torch.float, torch.float32, torch.Tensor.float, torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        torch.float = torch.float32 = torch.float64
        torch.Tensor.float = torch.Tensor.double

    def __exit__(self, *_):
        torch.float, torch.float32, torch.Tensor.float, dtype = self.kept
        torch.set_default_dtype(dtype)


def randomize(model, unit_offset):
    """Weights whose outputs keep about the size of their inputs, rounded to bfloat16."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape)
        if parameter.ndim == 1:
            norm = "norm" in name or ".ln_" in name
            value = 0.25 * noise + (1 if norm and name.endswith("weight") and not unit_offset else 0)
        elif "embed" in name or "wte" in name or "wpe" in name:
            value = 0.7 * noise
        elif name.endswith((".gate.weight", "shared_expert_gate.weight")):
            value = noise
        else:
            conv1d = "c_attn" in name or "c_proj" in name or "c_fc" in name
            value = noise / parameter.shape[0 if conv1d else -1] ** 0.5
        parameter.data = value.to(torch.bfloat16).to(parameter.dtype)


@torch.no_grad()
def logits_of(model, ids, stepwise):
    """[N, V]. `stepwise`: one token after another through the cache, as far as the frequencies depend on the length."""
    if not stepwise:
        return model(torch.tensor([ids]), use_cache=False).logits[0]
    cache, rows = None, []
    for token in ids:
        out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[0, -1])
    return torch.stack(rows)


def continuation(model, prompt, stepwise):
    """The likeliest GREEDY tokens after a prompt; None where a float32 network might take another one."""
    tokens = list(prompt)
    for _ in range(GREEDY):
        last = logits_of(model, tokens, stepwise)[-1]
        best, second = last.topk(2).values
        if best - second < 1e-2 * last.std():
            return None
        tokens.append(int(last.argmax()))
    return tokens[len(prompt):]


def make(name):
    kind, config = MODELS[name]
    torch.manual_seed(sum(map(ord, name)))
    config._attn_implementation = config._experts_implementation = "eager"
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    plain = kind(config)
    randomize(plain, name.startswith("gemma"))
    plain.to(torch.bfloat16).save_pretrained(folder)
    state = {key: value.clone() for key, value in plain.state_dict().items()}
    for extra in ("generation_config.json",):
        (folder / extra).unlink(missing_ok=True)
    with exact():
        config = type(config).from_pretrained(folder)
        config._attn_implementation = config._experts_implementation = "eager"
        model = kind(config).double().eval()
        model.load_state_dict({key: value.double() for key, value in state.items()})
        stepwise = name == "llama-dynamic"
        while True:
            ids = torch.randint(2, config.vocab_size, (TOKENS,)).tolist()
            greedy = continuation(model, ids[:PROMPT], stepwise)
            if greedy is not None:
                break
        logits = logits_of(model, ids, stepwise)
        assert logits.dtype is torch.float64
    save_file(
        {
            "ids": torch.tensor(ids, dtype=torch.int32),
            "logits": logits.to(torch.float32),
            "greedy": torch.tensor(greedy, dtype=torch.int32),
        },
        folder / "expected.safetensors",
    )
    print(name, sum(file.stat().st_size for file in folder.iterdir()), "bytes", "spread", float(logits.std()))


if __name__ == "__main__":
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}))
    for name in sys.argv[1:] or MODELS:
        make(name)
