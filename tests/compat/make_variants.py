#!/usr/bin/env python3
"""Writes tests/golden/variants: golden checkpoints in other spellings.

Same model, same logits, another way of writing it down: fused expert tensors in
one file, the `rope_theta` + `rope_scaling` dialect of the config, f32 and f16
weights. golden.safetensors is copied from the source folder unchanged.

    make_variants.py [GOLDEN_DIR]        default: the tests/golden beside this folder
    make_variants.py --check             compare each variant's f32 logits in the
                                         transformers library with its golden.safetensors
"""

import argparse
import json
import os
import re
import shutil
import sys

import torch
from safetensors.torch import load_file, save_file

from deepseek_v1 import read_checkpoint, relative_error, write_checkpoint

HERE = os.path.dirname(os.path.abspath(__file__))
EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight$")


def fuse(tensors):
    """gate_up_proj [E, 2I, H] (gate rows first) and down_proj [E, H, I] instead of one tensor per expert."""
    fused, experts = {}, {}
    for name, tensor in tensors.items():
        found = EXPERT.match(name)
        if found:
            prefix, expert, part = found.groups()
            experts.setdefault(prefix, {}).setdefault(int(expert), {})[part] = tensor
        else:
            fused[name] = tensor
    for prefix, by_id in experts.items():
        ordered = [by_id[e] for e in range(len(by_id))]
        fused[prefix + "gate_up_proj"] = torch.stack([torch.cat((e["gate"], e["up"])) for e in ordered])
        fused[prefix + "down_proj"] = torch.stack([e["down"] for e in ordered])
    return fused


def older_dialect(config):
    """rope_theta and rope_scaling instead of rope_parameters, torch_dtype instead of dtype."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = int(rope.pop("rope_theta"))
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
    config["torch_dtype"] = config.pop("dtype")
    # Older files hold only what the model needs; these are derived by newer libraries.
    for name in ("head_dim", "qk_head_dim", "mlp_bias", "output_router_logits"):
        config.pop(name, None)
    config["transformers_version"] = "4.39.3"
    config.update({"moe_layer_freq": 1, "scoring_func": "softmax", "seq_aux": True, "aux_loss_alpha": 0.001})
    return config


def convert(tensors, dtype):
    """Every tensor in another dtype; how many weights that rounded, and the largest change."""
    converted, rounded, largest = {}, 0, 0.0
    for name, tensor in tensors.items():
        converted[name] = tensor.to(dtype)
        change = (converted[name].double() - tensor.double()).abs()
        rounded += int((change > 0).sum())
        largest = max(largest, change.max().item())
    return converted, rounded, largest


def source(golden, family):
    folder = os.path.join(golden, family)
    with open(os.path.join(folder, "config.json")) as f:
        return json.load(f), read_checkpoint(folder)


def start(golden, family, variant):
    folder = os.path.join(golden, "variants", variant)
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    shutil.copyfile(os.path.join(golden, family, "golden.safetensors"), os.path.join(folder, "golden.safetensors"))
    return folder


def finish(folder, note):
    size = 0
    for file in os.listdir(folder):
        os.chmod(os.path.join(folder, file), 0o644)
        size += os.path.getsize(os.path.join(folder, file))
    print(f"{folder}: {size / 1e6:.2f} MB, {note}")


def make(golden):
    config, tensors = source(golden, "qwen3_moe")
    folder = start(golden, "qwen3_moe", "qwen3_moe_fused")
    fused = fuse(tensors)
    save_file({k: v.contiguous() for k, v in fused.items()}, os.path.join(folder, "model.safetensors"), {"format": "pt"})
    with open(os.path.join(folder, "config.json"), "w") as f:
        f.write(json.dumps(config, indent=2) + "\n")
    finish(folder, f"{len(tensors)} tensors became {len(fused)}")

    config, tensors = source(golden, "deepseek_v2_lite")
    _, in_f16, largest = convert(tensors, torch.float16)
    print(f"deepseek_v2_lite in f16 would round {in_f16} weights, by at most {largest:.1e}: written in f32")
    wide, rounded, _ = convert(tensors, torch.float32)
    assert rounded == 0
    config = older_dialect(config)
    config["torch_dtype"] = "float32"
    folder = start(golden, "deepseek_v2_lite", "deepseek_v2_lite_rope_scaling")
    write_checkpoint(folder, config, wide, shard_bytes=400_000)
    finish(folder, "rope_theta + rope_scaling, f32, exact")

    config, tensors = source(golden, "olmoe")
    wide, rounded, _ = convert(tensors, torch.float32)
    assert rounded == 0
    config["dtype"] = "float32"
    folder = start(golden, "olmoe", "olmoe_f32")
    write_checkpoint(folder, config, wide, shard_bytes=400_000)
    finish(folder, "f32, exact")

    config, tensors = source(golden, "mixtral")
    half, rounded, largest = convert(tensors, torch.float16)
    config["dtype"] = "float16"
    folder = start(golden, "mixtral", "mixtral_f16")
    write_checkpoint(folder, config, half)
    finish(folder, f"f16, {rounded} of {sum(t.numel() for t in half.values())} weights rounded, by at most {largest:.1e}")


def check(golden):
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    worst = 0.0
    for variant in sorted(os.listdir(os.path.join(golden, "variants"))):
        folder = os.path.join(golden, "variants", variant)
        stored = load_file(os.path.join(folder, "golden.safetensors"))
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        with torch.no_grad():
            logits = model.eval()(input_ids=stored["input_ids"], use_cache=False).logits
        error = relative_error(logits, stored["logits"])
        left = len(info["missing_keys"]) + len(info["unexpected_keys"])
        print(f"{variant:32} relative error {error:.2e}, {left} keys missing or unexpected")
        worst = max(worst, error, float(left))
    return 0 if worst <= 1e-5 else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden", nargs="?", default=os.path.normpath(os.path.join(HERE, "..", "golden")))
    parser.add_argument("--check", action="store_true", help="load the variants instead of writing them")
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.check:
        return check(args.golden)
    make(args.golden)
    return 0


if __name__ == "__main__":
    sys.exit(main())
