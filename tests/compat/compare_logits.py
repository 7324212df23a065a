#!/usr/bin/env python3
"""Compares logits written by `tenp-run logits` with the transformers library's.

Loads a checkpoint with AutoModelForCausalLM in f32, runs the ids and prints the
relative error (norm of the difference over norm) of `logits` in --ours. Used to
show that the padded, uniform and fewer-experts forms load in the public library and
compute the same function there. Family `deepseek`, which the library does not
have, is loaded by deepseek_v1.py.

    compare_logits.py MODEL_DIR --ids golden.safetensors --ours out.safetensors

Exit code 0: within --tolerance. 1: not, or the checkpoint did not load completely
(missing, unexpected or misshapen tensors).
"""

import argparse
import json
import os
import sys

import torch
from safetensors.torch import load_file

from deepseek_v1 import DeepseekV1, relative_error


def reference_logits(folder, input_ids):
    """Logits, and what was wrong while loading (empty: nothing)."""
    with open(os.path.join(folder, "config.json")) as f:
        family = json.load(f)["model_type"]
    if family == "deepseek":
        return DeepseekV1.load(folder).logits(input_ids), []
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = [f"{kind} {key}" for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
    with torch.no_grad():
        return model.eval()(input_ids=input_ids, use_cache=False).logits, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--ids", required=True, help="safetensors file with `input_ids` [n, len]")
    parser.add_argument("--ours", required=True, help="safetensors file with `logits` [n, len, vocab]")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--quiet", action="store_true", help="print the error alone")
    args = parser.parse_args()
    torch.set_num_threads(2)
    ours = load_file(args.ours)["logits"]
    try:
        reference, wrong = reference_logits(args.model, load_file(args.ids)["input_ids"])
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        print(f"{args.model}: does not load: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    for line in wrong:
        print(f"{args.model}: {line}", file=sys.stderr)
    if ours.shape != reference.shape:
        print(f"logits {list(ours.shape)}, the reference has {list(reference.shape)}", file=sys.stderr)
        return 1
    error = relative_error(ours, reference)
    print(f"{error:.2e}" if args.quiet else f"{args.model}: relative error {error:.3e} (tolerance {args.tolerance:g})")
    return 0 if error <= args.tolerance and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
