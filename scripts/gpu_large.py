#!/usr/bin/env python3
"""Times calibrate and prune on large made checkpoints, beside what --dry-run says, and the floor of disk and GPU.

    gpu_large.py PREBUILT WORK OUT.json [--device cuda] [--layers 4] [--experts 256] [--text 128x2048] [--small]

PREBUILT is what gpu-build.sh made. WORK gets DeepSeek-V3's shapes in fp8 (one dense layer of the four, a vocabulary of 8,192), with
as many experts as its disk has room for, and then DeepSeek-V2-Lite's; both are removed again. --small takes two layers and sixteen
experts of each, to try the script itself. Needs root to drop the page cache; the rows say whether it was dropped.
"""

import argparse
import array
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time

# Dense bf16 of an H100 or H200 (NVIDIA's data sheets). A pass is held to half of it: it scores every neuron too.
BF16_CEILING = 989e12
WAITED = re.compile(r"of that, ([\d.]+) s until weights were read, ([\d.]+) s until the GPU was done and its sums were here")
HEADER = ["what", "model, GB", "tokens", "s", "said, s", "floor, s", "of the floor", "until weights were read, s",
          "until the GPU was done, s", "host, GB", "said", "GPU, GB", "said ", "disk, GB/s", "page cache"]


def flops(config, tokens):
    """Of a pass without its scores: products of all weights that a token meets, but for the output head."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, v = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    rank, q_rank = config["kv_lora_rank"], config.get("q_lora_rank")
    query = heads * (nope + rope)
    query = hidden * q_rank + q_rank * query if q_rank else hidden * query
    attention = query + hidden * (rank + rope) + rank * heads * (nope + v) + heads * v * hidden
    experts = config["num_experts_per_tok"] + config["n_shared_experts"]
    moe = 3 * experts * hidden * config["moe_intermediate_size"]
    dense = min(config["first_k_dense_replace"], config["num_hidden_layers"])
    layers = config["num_hidden_layers"]
    weights = layers * attention + dense * 3 * hidden * config["intermediate_size"] + (layers - dense) * moe
    return 2 * weights * tokens


def write_ids(path, rows, cols, vocab):
    lots = random.Random(0)
    data = array.array("i", (lots.randrange(vocab) for _ in range(rows * cols))).tobytes()
    header = json.dumps({"input_ids": {"dtype": "I32", "shape": [rows, cols], "data_offsets": [0, len(data)]}}).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header + data)


def drop_cache():
    os.sync()
    try:
        with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
            file.write("3")
        return "dropped"
    except OSError:
        return "as it was"


def read_rate(folder):
    """Bytes a second of up to 8 GiB of the folder's first shard, read by four threads."""
    name = min(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    path = os.path.join(folder, name)
    size = min(os.path.getsize(path), 8 << 30)

    def read(first):
        with open(path, "rb", buffering=0) as file:
            for start in range(first << 24, size, 4 << 24):
                file.seek(start)
                file.read(min(1 << 24, size - start))

    started = time.monotonic()
    threads = [threading.Thread(target=read, args=[first]) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return size / (time.monotonic() - started)


class Watched:
    """A command, the most anonymous memory it had, and the most of the GPU's."""

    def __init__(self, command, device):
        print("$", " ".join(command), flush=True)
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.host, self.gpu = 0, None
        on_gpu = device != "cpu" and shutil.which("nvidia-smi")
        threads = [threading.Thread(target=self.watch_host, args=[process])]
        threads += [threading.Thread(target=self.watch_gpu, args=[process])] if on_gpu else []
        for thread in threads:
            thread.start()
        self.text = process.stderr.read()
        self.code = process.wait()
        self.seconds = time.monotonic() - started
        for thread in threads:
            thread.join()
        print(self.text, flush=True)
        if self.code:
            sys.exit(f"exit code {self.code}")

    def watch_host(self, process):
        while process.poll() is None:
            try:
                with open(f"/proc/{process.pid}/status", encoding="ascii") as status:
                    found = [int(line.split()[1]) for line in status if line.startswith("RssAnon")]
                self.host = max([self.host] + [1024 * kilobytes for kilobytes in found])
            except (FileNotFoundError, ProcessLookupError):
                pass
            time.sleep(0.005)

    def watch_gpu(self, process):
        query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        while process.poll() is None:
            for line in subprocess.run(query, capture_output=True, text=True).stdout.splitlines():
                pid, used = (part.strip() for part in line.split(","))
                if pid == str(process.pid) and used.isdigit():
                    self.gpu = max(self.gpu or 0, int(used) << 20)
            time.sleep(0.1)


def row(what, command, model, config, tokens, device):
    dry = subprocess.run([*command, "--dry-run", "--json"], check=True, capture_output=True, text=True)
    said = json.loads(dry.stdout)
    cache, rate = drop_cache(), read_rate(model)
    drop_cache()
    run = Watched(command, device)
    waited = WAITED.search(run.text)
    computing = 0.0 if device == "cpu" else flops(config, tokens) / (BF16_CEILING / 2)
    moved = said["bytes_before"] + (said["bytes_after"] or 0)
    return {
        "what": what, "bytes": said["bytes_before"], "tokens": tokens, "seconds": run.seconds,
        "said_seconds": said["seconds"], "floor_seconds": max(moved / rate, computing),
        "until_weights": float(waited[1]) if waited else None, "until_gpu": float(waited[2]) if waited else None,
        "host_bytes": run.host, "said_host_bytes": said["memory_bytes"],
        "gpu_bytes": run.gpu, "said_gpu_bytes": said["device_bytes"],
        "read_bytes_per_second": rate, "page_cache": cache,
    }


def cells(row):
    """A row as text, for `HEADER`."""
    giga = lambda value: "" if value is None else f"{value / 1e9:.2f}"
    plain = lambda value: "" if value is None else f"{value:.1f}"
    return [row["what"], giga(row["bytes"]), str(row["tokens"]), plain(row["seconds"]), plain(row["said_seconds"]),
            plain(row["floor_seconds"]), f"{100 * row['floor_seconds'] / row['seconds']:.0f} %", plain(row["until_weights"]),
            plain(row["until_gpu"]), giga(row["host_bytes"]), giga(row["said_host_bytes"]), giga(row["gpu_bytes"]),
            giga(row["said_gpu_bytes"]), giga(row["read_bytes_per_second"]), row["page_cache"]]


def write_rows(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(rows, file, indent=1)
        file.write("\n")


def self_test():
    v2_lite = {"hidden_size": 2048, "num_attention_heads": 16, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
               "kv_lora_rank": 512, "num_experts_per_tok": 6, "n_shared_experts": 2, "moe_intermediate_size": 1408,
               "intermediate_size": 10944, "first_k_dense_replace": 1, "num_hidden_layers": 27}
    # 2.4 G active parameters as published, without the output head's and the router's.
    assert 2.1e9 < flops(v2_lite, 1) / 2 < 2.4e9, flops(v2_lite, 1)
    found = WAITED.search("of that, 1.5 s until weights were read, 20.0 s until the GPU was done and its sums were here\n")
    assert found.groups() == ("1.5", "20.0")
    line = {"what": "calibrate", "bytes": 10**10, "tokens": 8, "seconds": 4.0, "said_seconds": 5.0, "floor_seconds": 3.0,
            "until_weights": 1.5, "until_gpu": None, "host_bytes": 10**9, "said_host_bytes": 10**9, "gpu_bytes": None,
            "said_gpu_bytes": 2 * 10**9, "read_bytes_per_second": 3e9, "page_cache": "dropped"}
    assert len(cells(line)) == len(HEADER)
    assert cells(line)[3:9] == ["4.0", "5.0", "3.0", "75 %", "1.5", ""], cells(line)


def make(prebuilt, config_name, changes, folder, options):
    """A checkpoint of a published config with some fields changed; its config."""
    with open(os.path.join(prebuilt, "configs", config_name), encoding="utf-8") as file:
        config = json.load(file) | changes
    path = folder + ".json"
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file)
    command = [os.path.join(prebuilt, "synthesise"), path, folder, "--shard-size", "5GB", *options]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        return json.load(file)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("prebuilt")
    parser.add_argument("work")
    parser.add_argument("out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--text", default="128x2048")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    os.makedirs(args.work, exist_ok=True)
    tenp, ids = os.path.join(args.prebuilt, "tenp-run"), os.path.join(args.work, "ids.safetensors")
    shape = [int(part) for part in args.text.split("x")]
    write_ids(ids, *shape, 8192)
    if args.small:
        args.layers, args.experts = 2, 16
    # 44 MB an expert in fp8; as much again for the output, and 4 GB for what else there is.
    while args.experts > 16 and args.layers * args.experts * 44e6 + 4e9 > shutil.disk_usage(args.work).free:
        args.experts //= 2
    rows, tokens = [], shape[0] * shape[1]
    data = ["--data", ids, "--device", args.device, *(["--compute", "bf16"] if args.device == "cpu" else [])]

    folder, stats = os.path.join(args.work, "v3"), os.path.join(args.work, "stats.safetensors")
    small = ["--layers", str(args.layers), "--experts", str(args.experts)]
    v3 = make(args.prebuilt, "deepseek-v3.json", {"first_k_dense_replace": 1, "vocab_size": 8192}, folder,
              [*small, "--dtype", "fp8"])
    what = f"calibrate, {args.layers} layers of DeepSeek-V3 in fp8, {args.experts} experts"
    rows.append(row(what, [tenp, "calibrate", folder, *data, "-o", stats], folder, v3, tokens, args.device))
    shutil.rmtree(folder)

    folder, pruned = os.path.join(args.work, "v2-lite"), os.path.join(args.work, "pruned")
    write_rows(args.out, rows)
    # 31 GB, and 20 GB of output.
    fitting = int(27 * (shutil.disk_usage(args.work).free - 3e9) / 55e9)
    options = small if args.small else ["--layers", str(max(2, fitting))] if fitting < 27 else []
    v2 = make(args.prebuilt, "deepseek-v2-lite.json", {}, folder, options)
    command = [tenp, "prune", folder, *data, "--keep", "0.6", "-o", pruned]
    what = f"prune --keep 0.6, {v2['num_hidden_layers']} layers of DeepSeek-V2-Lite"
    rows.append(row(what, command, folder, v2, tokens, args.device))
    shutil.rmtree(args.work)
    write_rows(args.out, rows)


if __name__ == "__main__":
    main()
