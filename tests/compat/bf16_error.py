#!/usr/bin/env python3
"""The reference implementation's own bf16 error on every golden checkpoint.

For each folder of tests/golden: the relative error (norm of the difference over
norm) of the logits against the stored f32 ones, once in bf16 and, as a check of
the stored logits themselves, once in f32. The reference is the transformers
library with its default settings; for family `deepseek`, which it does not have, it is
deepseek_v1.py with weights and activations in bf16 and the router in f32.

Two columns more, for information: the bf16 error with the library's plain
("eager") attention, and the median over tokens of the default's error by token. A token whose router
scores nearly tie may choose another expert after rounding, and a few such
tokens make most of the total; the median shows the rounding alone.

    bf16_error.py [GOLDEN_DIR]           prints the table, writes GOLDEN_DIR/bf16_error.json
"""

import argparse
import json
import os
import sys

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from deepseek_v1 import DeepseekV1, relative_error

HERE = os.path.dirname(os.path.abspath(__file__))


def logits_of(folder, input_ids, dtype, attention=None):
    with open(os.path.join(folder, "config.json")) as f:
        family = json.load(f)["model_type"]
    if family == "deepseek":
        return DeepseekV1.load(folder, dtype).logits(input_ids)
    choice = {} if attention is None else {"attn_implementation": attention}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **choice).eval()
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden", nargs="?", default=os.path.normpath(os.path.join(HERE, "..", "golden")))
    args = parser.parse_args()
    torch.set_num_threads(2)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    families = sorted(
        name for name in os.listdir(args.golden) if os.path.exists(os.path.join(args.golden, name, "golden.safetensors"))
    )
    result, worst = {}, 0.0
    columns = ("folder", "bf16", "f32", "bf16, eager", "bf16, median token")
    print("| {:18} | {:>9} | {:>9} | {:>11} | {:>18} |".format(*columns))
    print("|--------------------|----------:|----------:|------------:|-------------------:|")
    for family in families:
        folder = os.path.join(args.golden, family)
        stored = load_file(os.path.join(folder, "golden.safetensors"))
        ids, reference = stored["input_ids"], stored["logits"]
        logits = logits_of(folder, ids, torch.bfloat16)
        narrow = relative_error(logits, reference)
        wide = relative_error(logits_of(folder, ids, torch.float32), reference)
        eager = relative_error(logits_of(folder, ids, torch.bfloat16, "eager"), reference)
        token = ((logits.double() - reference).norm(dim=-1) / reference.double().norm(dim=-1)).median().item()
        print(f"| {family:18} | {narrow:9.3e} | {wide:9.2e} | {eager:11.3e} | {token:18.3e} |")
        result[family] = float(f"{narrow:.6g}")
        worst = max(worst, wide)
    result["transformers"] = transformers.__version__
    result["torch"] = torch.__version__.split("+")[0]
    with open(os.path.join(args.golden, "bf16_error.json"), "w") as f:
        f.write(json.dumps(result, indent=2) + "\n")
    return 0 if worst <= 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
