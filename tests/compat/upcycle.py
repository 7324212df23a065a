#!/usr/bin/env python3
"""Makes a model with alike experts: the experts of each layer become noisy copies of a few of them, and a short training
tells them apart (upcycling, arXiv 2212.05055). For the curves of DERN in docs/results.md.

    python tests/compat/upcycle.py MODEL OUT [--copies 2] [--steps 300] [--noise 0.02] [--seed 0]

MODEL is the demo folder: its calibration/ and text/ files are what is trained on, with the model's own logits as targets.
Needs torch and transformers.
"""

import argparse
import json
import random
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def samples(folder, tokenizer):
    """Token ids of every calibration and text line, behind the beginning-of-sequence token."""
    begin = [tokenizer.bos_token_id]
    for path in sorted(folder.glob("calibration/*.jsonl")) + sorted(folder.glob("text/*.jsonl")):
        for line in path.read_text().splitlines():
            line = json.loads(line)
            text = line.get("text") or line["prompt"] + line["answer"]
            yield begin + tokenizer.encode(text, add_special_tokens=False)


def batch_of(chosen):
    length = max(map(len, chosen))
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids in chosen])
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in chosen])
    return {"input_ids": ids, "attention_mask": mask}


def copy_experts(model, copies, noise):
    """Of `copies` experts in a row all become the first, each weight moved by `noise` of its tensor's deviation."""
    for layer in model.model.layers:
        if not hasattr(layer.mlp, "experts"):
            continue
        experts = layer.mlp.experts
        for tensor in (experts.gate_up_proj, experts.down_proj, layer.mlp.gate.weight):
            originals = tensor.data[0::copies].clone()
            for copy in range(1, copies):
                tensor.data[copy::copies] = originals + noise * tensor.data.std() * torch.randn_like(originals)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--copies", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--noise", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    lots = random.Random(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = list(samples(args.model, tokenizer))
    teacher = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    student = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    copy_experts(student, args.copies, args.noise)
    optimiser = torch.optim.AdamW(student.parameters(), lr=3e-4, weight_decay=0.01)
    for step in range(args.steps):
        for group in optimiser.param_groups:
            group["lr"] = 3e-4 * (1 - step / args.steps)
        batch = batch_of(lots.sample(data, 96))
        with torch.no_grad():
            target = teacher(**batch).logits.log_softmax(-1)
        found = student(**batch).logits.log_softmax(-1)
        kl = (target.exp() * (target - found)).sum(-1)
        mask = batch["attention_mask"]
        loss = (kl * mask).sum() / mask.sum()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        if step % 25 == 0 or step + 1 == args.steps:
            print(f"step {step}: KL to the original {loss.item():.4f}", flush=True)
    student.to(torch.bfloat16).save_pretrained(args.out)
    for path in args.model.iterdir():
        if path.is_file() and path.name.startswith("tokenizer"):
            shutil.copy(path, args.out)


if __name__ == "__main__":
    main()
