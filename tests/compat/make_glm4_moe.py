#!/usr/bin/env python3
"""Writes tests/golden/glm4_moe: a tiny random GLM-4.5 and what the transformers library makes of it in f32.

Every kind of weight is drawn at a size that shows in the logits (norms away from
1, biases, a correction bias that changes choices); the same bytes on every run.

    make_glm4_moe.py [GOLDEN_DIR]        default: the tests/golden beside this folder
"""

import os
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.utils import logging

from deepseek_v1 import relative_error, write_checkpoint

HERE = os.path.dirname(os.path.abspath(__file__))
# In the dialect of the published GLM-4.5 configs.
CONFIG = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": [1, 2],
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 160,
    "max_position_embeddings": 256,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 48,
    "n_group": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 6,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 320,
}


def shapes(config):
    """Every tensor in its published name."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    found = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}

    def mlp(at, width):
        found[at + "gate_proj.weight"] = found[at + "up_proj.weight"] = (width, hidden)
        found[at + "down_proj.weight"] = (hidden, width)

    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        found[at + "input_layernorm.weight"] = found[at + "post_attention_layernorm.weight"] = (hidden,)
        for name, width in (("q", queries), ("k", keys), ("v", keys)):
            found[at + f"self_attn.{name}_proj.weight"] = (width, hidden)
            found[at + f"self_attn.{name}_proj.bias"] = (width,)
        found[at + "self_attn.o_proj.weight"] = (hidden, queries)
        found[at + "self_attn.q_norm.weight"] = found[at + "self_attn.k_norm.weight"] = (config["head_dim"],)
        if layer < config["first_k_dense_replace"]:
            mlp(at + "mlp.", config["intermediate_size"])
            continue
        found[at + "mlp.gate.weight"] = (config["n_routed_experts"], hidden)
        found[at + "mlp.gate.e_score_correction_bias"] = (config["n_routed_experts"],)
        mlp(at + "mlp.shared_experts.", config["n_shared_experts"] * config["moe_intermediate_size"])
        for expert in range(config["n_routed_experts"]):
            mlp(at + f"mlp.experts.{expert}.", config["moe_intermediate_size"])
    return found


def draw(name, shape, generator):
    values = torch.randn(shape, generator=generator)
    if name.endswith("e_score_correction_bias"):
        return values * 0.1
    if name.endswith("norm.weight"):
        values = 1 + 0.2 * values
    elif name.endswith(".bias"):
        values = 0.3 * values
    elif not name.endswith("embed_tokens.weight"):
        values = values / shape[-1] ** 0.5
    return values.to(torch.bfloat16)


def main():
    golden = sys.argv[1] if len(sys.argv) > 1 else os.path.normpath(os.path.join(HERE, "..", "golden"))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(2)
    folder = os.path.join(golden, "glm4_moe")
    generator = torch.Generator().manual_seed(20260_11_24)
    tensors = {name: draw(name, shape, generator) for name, shape in sorted(shapes(CONFIG).items())}
    write_checkpoint(folder, CONFIG, tensors)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert isinstance(model, Glm4MoeForCausalLM) and isinstance(model.config, Glm4MoeConfig)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    input_ids = load_file(os.path.join(golden, "deepseek_v3", "golden.safetensors"))["input_ids"]
    with torch.no_grad():
        logits = model.eval()(input_ids=input_ids, use_cache=False).logits
        # Would leaving out any of what is special to the family show?
        bias = [layer.mlp.gate.e_score_correction_bias for layer in model.model.layers[1:]]
        kept = [b.clone() for b in bias]
        for b in bias:
            b.zero_()
        without = model(input_ids=input_ids, use_cache=False).logits
        for b, k in zip(bias, kept):
            b.copy_(k)
    print(f"{folder}: {len(tensors)} tensors, logits of size {logits.std():.2f}, "
          f"{relative_error(without, logits):.1e} off without the correction bias")
    save_file({"input_ids": input_ids, "logits": logits.contiguous()}, os.path.join(folder, "golden.safetensors"))
    for file in os.listdir(folder):
        os.chmod(os.path.join(folder, file), 0o644)
    return 0


if __name__ == "__main__":
    sys.exit(main())
