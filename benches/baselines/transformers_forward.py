#!/usr/bin/env python3
"""Tokens per second of the transformers library's forward over calibration text.

The same work `tenp-run calibrate` does, less the statistics: every sample once
through the model, logits included. A sample is BOS, then prompt and answer tokenised
apart and joined (or `text`), cut at --seq-len. Useful tokens are counted: padding is
not. Modes: one sample at a time; samples sorted by length, right-padded, in batches
of 16, 64 and 256; and samples of equal length together, at most 256, so that nothing
is padded. Each mode with the library's `grouped_mm` and `eager` experts (`batched_mm`, which
copies the weights of every token's experts, is several times slower on a CPU).

    transformers_forward.py MODEL_DIR --data FILE.jsonl ... [--samples 128]

Prints the table and the best, or with --json everything.
"""

import argparse
import json
import os
import statistics
import sys
import time

import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from transformers.utils import logging

MODES = ("one by one", "batch 16", "batch 64", "batch 256", "equal length")


def read_samples(model, files, samples, seq_len):
    """One list of ids per sample; `samples` per file, the first ones."""
    tokenizer = Tokenizer.from_file(os.path.join(model, "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    prefix = []
    config = os.path.join(model, "tokenizer_config.json")
    if os.path.exists(config):
        with open(config) as f:
            config = json.load(f)
        if config.get("add_bos_token"):
            bos = config["bos_token"]
            prefix = [tokenizer.token_to_id(bos["content"] if isinstance(bos, dict) else bos)]

    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    out = []
    for file in files:
        with open(file) as f:
            lines = [line for line in f if line.strip()][:samples]
        for line in lines:
            row = json.loads(line)
            body = ids(row["text"]) if "text" in row else ids(row["prompt"]) + ids(row["answer"])
            out.append((prefix + body)[:seq_len])
    return out


def pad(group):
    longest = max(map(len, group))
    ids = torch.zeros(len(group), longest, dtype=torch.long)
    mask = torch.zeros(len(group), longest, dtype=torch.long)
    for row, sample in enumerate(group):
        ids[row, : len(sample)] = torch.tensor(sample)
        mask[row, : len(sample)] = 1
    # Without padding the library needs no mask, and is a little faster without it.
    return ids, None if mask.all() else mask


def batches(samples, mode):
    if mode == "one by one":
        return [pad([sample]) for sample in samples]
    ordered = sorted(samples, key=len)
    if mode == "equal length":
        groups = []
        for sample in ordered:
            if groups and len(groups[-1][0]) == len(sample) and len(groups[-1]) < 256:
                groups[-1].append(sample)
            else:
                groups.append([sample])
    else:
        size = int(mode.split()[-1])
        groups = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return [pad(group) for group in groups]


@torch.no_grad()
def run(model, work):
    start = time.perf_counter()
    for ids, mask in work:
        model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=128, help="per file")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--experts", nargs="+", default=["grouped_mm", "eager"])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    samples = read_samples(args.model, args.data, args.samples, args.seq_len)
    tokens = sum(map(len, samples))
    result = {
        "model": args.model,
        "samples": len(samples),
        "tokens": tokens,
        "threads": args.threads,
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "modes": [],
    }
    print(f"{len(samples)} samples, {tokens} tokens, lengths {min(map(len, samples))} to {max(map(len, samples))}", file=sys.stderr)
    if not args.json:
        print("| experts    | mode         | computed tokens | median s | fastest s | tokens/s |")
        print("|------------|--------------|----------------:|---------:|----------:|---------:|")
    for experts in args.experts:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, experts_implementation=experts).eval()
        for mode in args.modes:
            work = batches(samples, mode)
            computed = sum(ids.numel() for ids, _ in work)
            run(model, work)
            times = [run(model, work) for _ in range(args.repeat)]
            seconds = statistics.median(times)
            rate = tokens / seconds
            result["modes"].append(
                {
                    "experts": experts,
                    "mode": mode,
                    "computed_tokens": computed,
                    "seconds": seconds,
                    "fastest_seconds": min(times),
                    "tokens_per_second": rate,
                }
            )
            if not args.json:
                print(f"| {experts:10} | {mode:12} | {computed:15} | {seconds:8.3f} | {min(times):9.3f} | {rate:8.0f} |", flush=True)
    result["best"] = max(result["modes"], key=lambda mode: mode["tokens_per_second"])
    best = result["best"]
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"best: {best['experts']}, {best['mode']}: {best['tokens_per_second']:.0f} tokens/s of {tokens} tokens")


if __name__ == "__main__":
    main()
