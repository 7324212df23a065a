#!/usr/bin/env python3
"""Every calibration statistic of the golden checkpoints, re-computed in float64.

The transformers library runs each golden checkpoint on its golden ids in f64. What
goes into the routed experts is taken from there: the residual stream before the
layer's norm, the expert's input after it, the experts chosen and the weights that
multiply their outputs. From these and the experts' weights every statistic of
docs/methods.md is computed by its definition, one token and one expert at a time.
Family `deepseek`, which the library does not have, runs as its Qwen2-MoE with the
same function (deepseek_v1.py).

The rotary table alone is the library's f32 one. Three things are checked on the way:
no operation of the forward pass has a result narrower than f64; the logits agree with
the stored f32 ones; and the sum of weight times expert output is what the library's
experts put out.

    oracle_statistics.py [GOLDEN_DIR]    writes oracle.safetensors into every folder; spellings
                                         of the same weights are compared with their source instead
    oracle_statistics.py --check         compares with the stored files, writes nothing
"""

import argparse
import contextlib
import json
import os
import sys

import numpy as np
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from deepseek_v1 import DeepseekV1, as_qwen2_moe, relative_error

HERE = os.path.dirname(os.path.abspath(__file__))
NARROW = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)
# Variants with exactly the weights of another folder.
SAME_WEIGHTS = {
    "qwen3_moe_fused": "qwen3_moe",
    "deepseek_v2_lite_rope_scaling": "deepseek_v2_lite",
    "olmoe_f32": "olmoe",
}


@contextlib.contextmanager
def float32_means_float64():
    """Where the library asks for f32 (norms, router, softmax) it gets f64."""
    kept = torch.float32, torch.float, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = kept


class OnlyFloat64(TorchDispatchMode):
    """Refuses any operation whose result is narrower than f64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype in NARROW:
                raise TypeError(f"{func} gave {leaf.dtype}")
        return result


def load_model(folder):
    with open(os.path.join(folder, "config.json")) as f:
        family = json.load(f)["model_type"]
    if family == "deepseek":
        model = as_qwen2_moe(DeepseekV1.load(folder))
        model.set_attn_implementation("eager")
        model.set_experts_implementation("eager")
    else:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        )
    return model.eval().double()


class RotaryTable(torch.nn.Module):
    """The library's table of rotations, made in f32 and widened.

    Angles in f32 are part of these models: at long positions their rounding shows, and they were trained with it.
    """

    def __init__(self, rotary, length):
        super().__init__()
        table = rotary(torch.zeros(1), torch.arange(length)[None])
        if isinstance(table, torch.Tensor):
            self.table = table.to(torch.complex128)
        else:
            self.table = tuple(part.double() for part in table)

    def forward(self, x, position_ids):
        return self.table


def record(model, input_ids):
    """What every MoE layer's experts are given and put out, by layer, and the logits."""
    model.model.rotary_emb = RotaryTable(model.model.rotary_emb, input_ids.shape[1])
    layers = {}

    def before_norm(at):
        return lambda module, args: at.update(residual=args[0])

    def at_experts(at):
        def hook(module, args, output):
            at.update(x=args[0], chosen=args[1], weight=args[2], combined=output, experts=module)

        return hook

    handles = []
    for index, layer in enumerate(model.model.layers):
        experts = getattr(layer.mlp, "experts", None)
        if experts is not None:
            at = layers[index] = {}
            handles.append(layer.post_attention_layernorm.register_forward_pre_hook(before_norm(at)))
            handles.append(experts.register_forward_hook(at_experts(at)))
    with torch.no_grad(), float32_means_float64(), OnlyFloat64():
        logits = model(input_ids=input_ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return layers, logits


def silu(a):
    return a / (1 + np.exp(-a))


def norm(v):
    return np.sqrt(np.sum(v * v))


def cosine(a, b):
    return np.sum(a * b) / (norm(a) * norm(b))


def statistics(residual, x, chosen, weight, gate, up, down):
    """All statistics of one layer, by their definitions.

    residual, x: [tokens, H]; chosen, weight: [tokens, top-k]; gate, up: [N, K, H]; down: [N, H, K]. Also returns the
    sum over the chosen experts of weight times output, [tokens, H].
    """
    experts, width, _ = gate.shape
    s = {"tokens": np.zeros(experts, np.int64), "total_tokens": np.array([len(x)], np.int64)}
    for name in (
        "gate_sum normalised_gate_sum norm_sum norm_sq_sum gated_norm_sum direction residual_direction output_peak"
    ).split():
        s[name] = np.zeros(experts)
    for name in "contribution contribution_abs activation_norm energy peak mean second_moment".split():
        s[name] = np.zeros((experts, width))
    s["down_norm_sq"] = np.sum(down**2, axis=1)
    s["neuron_weight_norm_sq"] = np.sum(gate**2, axis=2) + np.sum(up**2, axis=2) + s["down_norm_sq"]

    combined = np.zeros_like(x)
    for t in range(len(x)):
        h = [silu(gate[e] @ x[t]) * (up[e] @ x[t]) for e in chosen[t]]
        y = [down[e] @ h_e for e, h_e in zip(chosen[t], h)]
        combined[t] = sum(g * y_e for g, y_e in zip(weight[t], y))
        turn = max(0.0, 1 - cosine(residual[t], residual[t] + combined[t]))
        for e, g, h_e, y_e in zip(chosen[t], weight[t], h, y):
            s["tokens"][e] += 1
            s["gate_sum"][e] += g
            s["normalised_gate_sum"][e] += g / np.sum(weight[t])
            s["norm_sum"][e] += norm(y_e)
            s["norm_sq_sum"][e] += norm(y_e) ** 2
            s["gated_norm_sum"][e] += g * norm(y_e)
            s["direction"][e] += g * norm(y_e) * (1 - cosine(x[t], y_e))
            s["residual_direction"][e] += g * norm(y_e) * turn
            s["output_peak"][e] = max(s["output_peak"][e], np.max(np.abs(y_e)))
            term = h_e * (down[e].T @ y_e) / (norm(y_e) + 1e-8)
            s["contribution"][e] += term
            s["contribution_abs"][e] += np.abs(term)
            s["activation_norm"][e] += np.abs(h_e) * np.sqrt(s["down_norm_sq"][e])
            energy = (g * h_e) ** 2 * s["down_norm_sq"][e]
            s["energy"][e] += energy
            s["peak"][e] = np.maximum(s["peak"][e], energy)
            s["mean"][e] += h_e
            s["second_moment"][e] += h_e**2
    return s, combined


def oracle(folder):
    """Tensors `layers.{L}/{statistic}` of a golden folder."""
    golden = load_file(os.path.join(folder, "golden.safetensors"))
    layers, logits = record(load_model(folder), golden["input_ids"])
    error = relative_error(logits, golden["logits"])
    assert error < 2e-6, f"{folder}: logits {error:.1e} from the stored ones"
    tensors = {}
    for index, at in layers.items():
        weights = at.pop("experts")
        gate, up = weights.gate_up_proj.detach().chunk(2, dim=1)
        at = {name: tensor.flatten(0, -2).numpy() for name, tensor in at.items()}
        s, combined = statistics(
            at["residual"], at["x"], at["chosen"], at["weight"],
            gate.numpy(), up.numpy(), weights.down_proj.detach().numpy(),
        )
        error = norm(combined - at["combined"]) / norm(combined)
        assert error < 1e-13, f"{folder}, layer {index}: experts' output {error:.1e} from the library's"
        tensors.update({f"layers.{index}/{name}": table for name, table in s.items()})
    return tensors, relative_error(logits, golden["logits"])


def difference(a, b):
    """The largest entry of |a - b| against the largest entry of its table."""
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())[:6]
    return max(float(np.max(np.abs(a[k] - b[k])) / max(np.max(np.abs(b[k])), 1e-300)) for k in a)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden", nargs="?", default=os.path.normpath(os.path.join(HERE, "..", "golden")))
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(2)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    worst = 0.0
    for parent in (args.golden, os.path.join(args.golden, "variants")):
        for name in sorted(os.listdir(parent)):
            if not os.path.exists(os.path.join(parent, name, "golden.safetensors")):
                continue
            tensors, error = oracle(os.path.join(parent, name))
            source = SAME_WEIGHTS.get(name)
            stored = os.path.join(args.golden, source) if source else os.path.join(parent, name)
            stored = os.path.join(stored, "oracle.safetensors")
            least = min(t.min() for k, t in tensors.items() if k.endswith("/tokens"))
            note = f"logits {error:.1e} from the stored f32 ones, least tokens of an expert {least}"
            if args.check or source:
                off = difference(tensors, load_arrays(stored))
                worst = max(worst, off)
                note += f", {off:.1e} from {os.path.relpath(stored, args.golden)}"
            else:
                save_arrays(tensors, stored)
                note += f", {os.path.getsize(stored)} bytes"
            print(f"{name:30} {note}", flush=True)
    return 0 if worst <= 1e-12 else 1


if __name__ == "__main__":
    sys.exit(main())
