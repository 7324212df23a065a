#!/usr/bin/env python3
"""Writes tests/golden/fp8.safetensors: what the transformers library makes of golden `deepseek_v3` after fp8.

Every projection is quantised as DeepSeek-V3 stores it (e4m3, one f32 scale for
each block of 128 x 128, scale = largest magnitude / 448, nearest even) and
dequantised again; the logits are those of the dequantised weights in f32. The
hash is over the codes and scales, by which the tests know that they quantise
the same way.

    make_fp8.py [GOLDEN_DIR]             default: the tests/golden beside this folder
"""

import hashlib
import os
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from deepseek_v1 import read_checkpoint, relative_error

HERE = os.path.dirname(os.path.abspath(__file__))
BLOCK = 128


def quantise(weight):
    """Codes, scales, and the weight that they stand for."""
    weight = weight.float()
    rows, cols = weight.shape
    scales = torch.empty((-(-rows // BLOCK), -(-cols // BLOCK)))
    codes = torch.empty((rows, cols), dtype=torch.float8_e4m3fn)
    wide = torch.empty((rows, cols))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scale = weight[at].abs().max() / 448.0
            scales[i, j] = scale if scale > 0 else 1.0
            codes[at] = (weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
            wide[at] = codes[at].float() * scales[i, j]
    return codes, scales, wide


def main():
    golden = sys.argv[1] if len(sys.argv) > 1 else os.path.normpath(os.path.join(HERE, "..", "golden"))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(2)
    folder = os.path.join(golden, "deepseek_v3")
    tensors = read_checkpoint(folder)
    digest, changed = hashlib.sha256(), {}
    for name in sorted(tensors):
        if name.endswith("_proj.weight") or name.endswith("kv_a_proj_with_mqa.weight"):
            codes, scales, changed[name] = quantise(tensors[name])
            digest.update(codes.view(torch.uint8).numpy().tobytes())
            digest.update(scales.numpy().tobytes())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stored = load_file(os.path.join(folder, "golden.safetensors"))
    with torch.no_grad():
        before = model(input_ids=stored["input_ids"], use_cache=False).logits
        # The library holds a layer's experts as one tensor.
        parameters = dict(model.named_parameters())
        for name, weight in changed.items():
            place, expert = name, None
            if ".experts." in name:
                prefix, rest = name.split(".experts.")
                expert, part = rest.split(".")[:2]
                fused = "down_proj" if part == "down_proj" else "gate_up_proj"
                place = f"{prefix}.experts.{fused}"
                target = parameters[place][int(expert)]
                width = target.shape[0] // 2
                if part == "gate_proj":
                    target = target[:width]
                elif part == "up_proj":
                    target = target[width:]
            else:
                target = parameters[place]
            target.copy_(weight)
        logits = model(input_ids=stored["input_ids"], use_cache=False).logits
    print(f"{len(changed)} matrices; logits of bf16 {relative_error(before, stored['logits']):.1e} from the stored ones, "
          f"of fp8 {relative_error(logits, stored['logits']):.1e}")
    save_file({"input_ids": stored["input_ids"], "logits": logits.contiguous()},
              os.path.join(golden, "fp8.safetensors"), {"sha256": digest.hexdigest()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
