#!/usr/bin/env python3
"""A small independent model of family `deepseek` (DeepSeek-MoE-16B) in PyTorch.

The public transformers library has no such model, so this file is the
reference for it: llama attention (half-split rotary, as many or fewer key/value
heads), RMSNorm, a dense first layer, routed experts plus shared experts, a
softmax router in f32 whose top-k weights are used as they are unless
`norm_topk_prob` says otherwise.

Run by hand:

    deepseek_v1.py make OUT_DIR          write the tiny checkpoint and its golden logits
    deepseek_v1.py check DIR             recompute the logits of DIR and compare
    deepseek_v1.py cross-check DIR       the same weights as a qwen2_moe model of the
                                         transformers library (see `as_qwen2_moe`)
"""

import argparse
import json
import math
import os
import sys

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

TINY = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 160,
    "max_position_embeddings": 256,
    "model_type": "deepseek",
    "moe_intermediate_size": 48,
    "moe_layer_freq": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 320,
}


def is_moe_layer(config, layer):
    """Whether a layer has experts: not among the first dense ones, and on the grid."""
    return layer >= config.get("first_k_dense_replace", 0) and layer % (config.get("moe_layer_freq") or 1) == 0


def tensor_shapes(config):
    """Name and shape of every tensor of a checkpoint of this family."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or hidden // heads
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)

    def swiglu(prefix, width):
        shapes[prefix + "gate_proj.weight"] = (width, hidden)
        shapes[prefix + "up_proj.weight"] = (width, hidden)
        shapes[prefix + "down_proj.weight"] = (hidden, width)

    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes[at + "input_layernorm.weight"] = (hidden,)
        shapes[at + "post_attention_layernorm.weight"] = (hidden,)
        shapes[at + "self_attn.q_proj.weight"] = (heads * head, hidden)
        shapes[at + "self_attn.k_proj.weight"] = (kv_heads * head, hidden)
        shapes[at + "self_attn.v_proj.weight"] = (kv_heads * head, hidden)
        shapes[at + "self_attn.o_proj.weight"] = (hidden, heads * head)
        if is_moe_layer(config, layer):
            shapes[at + "mlp.gate.weight"] = (config["n_routed_experts"], hidden)
            for expert in range(config["n_routed_experts"]):
                swiglu(f"{at}mlp.experts.{expert}.", config["moe_intermediate_size"])
            if config.get("n_shared_experts"):
                swiglu(at + "mlp.shared_experts.", config["moe_intermediate_size"] * config["n_shared_experts"])
        else:
            swiglu(at + "mlp.", config["intermediate_size"])
    return shapes


class DeepseekV1:
    """The forward pass, over a plain dictionary of tensors.

    `dtype` is that of weights and activations. Norm statistics, attention
    probabilities and the whole router are f32 whatever it is.
    """

    def __init__(self, config, tensors, dtype=torch.float32):
        if config.get("rope_scaling") is not None:
            raise ValueError("rope_scaling is not part of this reference")
        expected = tensor_shapes(config)
        if set(expected) != set(tensors):
            raise ValueError(f"tensor names differ: {sorted(set(expected) ^ set(tensors))[:6]}")
        for name, shape in expected.items():
            if tuple(tensors[name].shape) != shape:
                raise ValueError(f"{name}: shape {tuple(tensors[name].shape)}, expected {shape}")
        self.config = config
        self.dtype = dtype
        self.w = {name: tensor.to(dtype) for name, tensor in tensors.items()}

    @classmethod
    def load(cls, folder, dtype=torch.float32):
        with open(os.path.join(folder, "config.json")) as f:
            config = json.load(f)
        return cls(config, read_checkpoint(folder), dtype)

    def norm(self, x, name):
        wide = x.float()
        wide = wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return wide.to(self.dtype) * self.w[name]

    def swiglu(self, x, prefix):
        gate = F.linear(x, self.w[prefix + "gate_proj.weight"])
        up = F.linear(x, self.w[prefix + "up_proj.weight"])
        return F.linear(F.silu(gate) * up, self.w[prefix + "down_proj.weight"])

    def rotary(self, length, head):
        """cos and sin [length, head/2]: pair i turns by position · theta^(-2i/head)."""
        exponent = torch.arange(0, head, 2, dtype=torch.float32) / head
        frequency = 1.0 / (float(self.config["rope_theta"]) ** exponent)
        angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)

    @staticmethod
    def rotate(x, cos, sin):
        """Half-split rotary: dimension i pairs with i + head/2. x is [batch, heads, length, head]."""
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def attention(self, x, at, cos, sin):
        batch, length, _ = x.shape
        heads = self.config["num_attention_heads"]
        kv_heads = self.config.get("num_key_value_heads") or heads

        def project(name, count):
            y = F.linear(x, self.w[f"{at}self_attn.{name}_proj.weight"])
            return y.reshape(batch, length, count, -1).transpose(1, 2)

        q = self.rotate(project("q", heads), cos, sin)
        k = self.rotate(project("k", kv_heads), cos, sin).repeat_interleave(heads // kv_heads, dim=1)
        v = project("v", kv_heads).repeat_interleave(heads // kv_heads, dim=1)
        score = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        probability = score.masked_fill(future, float("-inf")).softmax(-1).to(self.dtype)
        mixed = (probability @ v).transpose(1, 2).reshape(batch, length, -1)
        return F.linear(mixed, self.w[at + "self_attn.o_proj.weight"])

    def route(self, x, at):
        """Ids and weights [tokens, top-k] of the chosen experts."""
        score = F.linear(x.float(), self.w[at + "mlp.gate.weight"].float()).softmax(-1)
        weight, chosen = score.topk(self.config["num_experts_per_tok"], dim=-1)
        if self.config.get("norm_topk_prob", False):
            weight = weight / weight.sum(-1, keepdim=True)
        return chosen, weight

    def experts(self, x, at):
        chosen, weight = self.route(x, at)
        total = torch.zeros(x.shape, dtype=torch.float32)
        for expert in range(self.config["n_routed_experts"]):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            if token.numel():
                y = self.swiglu(x[token], f"{at}mlp.experts.{expert}.")
                total.index_add_(0, token, y.float() * weight[token, slot, None])
        out = total.to(self.dtype)
        if self.config.get("n_shared_experts"):
            out = out + self.swiglu(x, at + "mlp.shared_experts.")
        return out

    @torch.no_grad()
    def logits(self, input_ids):
        """[batch, length] ids to [batch, length, vocabulary] logits, as f32."""
        config = self.config
        x = self.w["model.embed_tokens.weight"][input_ids]
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        cos, sin = self.rotary(input_ids.shape[1], head)
        for layer in range(config["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            x = x + self.attention(self.norm(x, at + "input_layernorm.weight"), at, cos, sin)
            y = self.norm(x, at + "post_attention_layernorm.weight")
            if is_moe_layer(config, layer):
                x = x + self.experts(y.flatten(0, 1), at).view_as(x)
            else:
                x = x + self.swiglu(y, at + "mlp.")
        output = "model.embed_tokens.weight" if config.get("tie_word_embeddings", False) else "lm_head.weight"
        return F.linear(self.norm(x, "model.norm.weight"), self.w[output]).float()


def read_checkpoint(folder):
    """Every tensor of a checkpoint, sharded or not."""
    index = os.path.join(folder, "model.safetensors.index.json")
    if not os.path.exists(index):
        return load_file(os.path.join(folder, "model.safetensors"))
    with open(index) as f:
        weight_map = json.load(f)["weight_map"]
    tensors = {}
    for shard in sorted(set(weight_map.values())):
        with safe_open(os.path.join(folder, shard), "pt") as f:
            for name in f.keys():
                if weight_map.get(name) == shard:
                    tensors[name] = f.get_tensor(name)
    return tensors


def write_checkpoint(folder, config, tensors, shard_bytes=200_000):
    """config.json, shards in the order of the names, and the index."""
    os.makedirs(folder, exist_ok=True)
    shards, size = [[]], 0
    for name in sorted(tensors):
        nbytes = tensors[name].numel() * tensors[name].element_size()
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensors[name].contiguous() for name in names}, os.path.join(folder, file), {"format": "pt"})
        weight_map.update({name: file for name in names})
    index = {
        "metadata": {
            "total_parameters": sum(t.numel() for t in tensors.values()),
            "total_size": sum(t.numel() * t.element_size() for t in tensors.values()),
        },
        "weight_map": dict(sorted(weight_map.items())),
    }
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as f:
        f.write(json.dumps(index, indent=2, sort_keys=True) + "\n")
    with open(os.path.join(folder, "config.json"), "w") as f:
        f.write(json.dumps(config, indent=2, sort_keys=True) + "\n")


def relative_error(ours, reference):
    ours, reference = ours.double(), reference.double()
    return (torch.linalg.vector_norm(ours - reference) / torch.linalg.vector_norm(reference)).item()


def make(folder, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in sorted(tensor_shapes(TINY).items()):
        random = torch.randn(shape, generator=generator)
        value = 1 + 0.1 * random if name.endswith("norm.weight") else 0.08 * random
        tensors[name] = value.to(torch.bfloat16)
    input_ids = torch.randint(0, TINY["vocab_size"], (2, 96), generator=generator)
    write_checkpoint(folder, TINY, tensors)
    logits = DeepseekV1.load(folder).logits(input_ids)
    save_file({"input_ids": input_ids, "logits": logits.contiguous()}, os.path.join(folder, "golden.safetensors"))
    print(f"{folder}: {len(tensors)} tensors, logits std {logits.std().item():.3f}")


def as_qwen2_moe(model):
    """The same function as a qwen2_moe model of the transformers library.

    That family multiplies its shared expert by sigmoid(gate · x). With a zero
    gate this is one half, so the shared down projection is doubled; both are
    exact. The dense first layers become `mlp_only_layers`, q/k/v have no bias.
    """
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    c = model.config
    config = Qwen2MoeConfig(
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_hidden_layers=c["num_hidden_layers"],
        num_attention_heads=c["num_attention_heads"],
        num_key_value_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
        rms_norm_eps=c["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": float(c["rope_theta"])},
        moe_intermediate_size=c["moe_intermediate_size"],
        shared_expert_intermediate_size=c["moe_intermediate_size"] * c["n_shared_experts"],
        num_experts=c["n_routed_experts"],
        num_experts_per_tok=c["num_experts_per_tok"],
        norm_topk_prob=c["norm_topk_prob"],
        mlp_only_layers=[l for l in range(c["num_hidden_layers"]) if not is_moe_layer(c, l)],
        qkv_bias=False,
        tie_word_embeddings=False,
    )
    other = Qwen2MoeForCausalLM(config).eval()
    state = other.state_dict()
    unset = set(state)
    for name, target in state.items():
        if name.endswith("shared_expert_gate.weight"):
            value = torch.zeros_like(target)
        elif name.endswith("experts.gate_up_proj"):
            at = name[: -len("gate_up_proj")]
            value = torch.stack([
                torch.cat((model.w[f"{at}{e}.gate_proj.weight"], model.w[f"{at}{e}.up_proj.weight"]))
                for e in range(c["n_routed_experts"])
            ])
        elif name.endswith("experts.down_proj"):
            at = name[: -len("down_proj")]
            value = torch.stack([model.w[f"{at}{e}.down_proj.weight"] for e in range(c["n_routed_experts"])])
        else:
            value = model.w[name.replace("shared_expert.", "shared_experts.")]
            if name.endswith("shared_expert.down_proj.weight"):
                value = 2 * value
        target.copy_(value)
        unset.discard(name)
    assert not unset, unset
    return other


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["make", "check", "cross-check"])
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=20260609)
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.command == "make":
        make(args.folder, args.seed)
        return 0
    golden = load_file(os.path.join(args.folder, "golden.safetensors"))
    model = DeepseekV1.load(args.folder)
    if args.command == "check":
        logits = model.logits(golden["input_ids"])
    else:
        with torch.no_grad():
            logits = as_qwen2_moe(model)(input_ids=golden["input_ids"], use_cache=False).logits
    error = relative_error(logits, golden["logits"])
    print(f"{args.command} {args.folder}: relative error {error:.3e}")
    return 0 if error <= 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
