#!/usr/bin/env python3
"""The peers' cases are those of our own bench: the generator against published vectors, the rest against the Rust source.

Needs nothing but Python.
"""

import re
import struct
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "benches/baselines/peers"))

import cases


def check_generator():
    # ChaCha20 of the zero key, draft-nir-cfrg-chacha20-poly1305-04, vectors 1 and 2.
    assert cases.chacha_block([0] * 8, 0, 10)[:4] == [0xADE0B876, 0x903DF1A0, 0xE56A5D40, 0x28BD8653]
    assert cases.chacha_block([0] * 8, 1, 10)[:3] == [0xBEE7079F, 0x7A385155, 0x7C97BA98]
    # ChaCha8 of the zero key, draft-strombergson-chacha-test-vectors-01, TC1.
    stream = struct.pack("<16I", *cases.chacha_block([0] * 8, 0, 4)).hex()
    assert stream.startswith("3e00ef2f895f40d67f5bb8e81f09a5a12c840ec3ce9a7f3b181be188ef711a1e"), stream
    numbers = cases.uniforms(7)
    drawn = [next(numbers) for _ in range(2000)]
    assert all(0.0 <= n < 1.0 for n in drawn) and abs(sum(drawn) / len(drawn) - 0.5) < 0.03
    assert len(set(drawn)) == len(drawn) and drawn[:3] != [next(cases.uniforms(11)) for _ in range(3)]


def check_rust_source():
    """Shapes, numbers of tokens, names and seeds as the Rust bench has them."""
    source = (REPO / "benches/gpu/cases.rs").read_text()
    pattern = r'name: "(.*?)",\s*hidden: (\d+),\s*width: (\d+),\s*experts: (\d+),\s*top_k: (\d+)'
    shapes = [cases.Shape(m[0], *map(int, m[1:])) for m in re.findall(pattern, source)]
    assert shapes == cases.SHAPES, shapes
    tokens = {m.replace("_", "") for m in re.findall(r"for tokens in \[(.*?)\]", source)}
    assert tokens == {", ".join(map(str, cases.TOKENS))}, tokens
    assert re.findall(r'Self::\w+ => "(.*?)"', source) == cases.WIDTHS + cases.ROUTINGS
    assert re.findall(r"seed_from_u64\((\d+)\)", source) == ["7", "11"]
    fields = set(re.findall(r'"(.*?)": case\.', (REPO / "benches/gpu_moe.rs").read_text()))
    assert fields == set(cases.cases(shapes[0], "short")[0].names()), fields


def check_cases():
    for shape in cases.SHAPES:
        assert len(cases.cases(shape, "full")) == 7 * 6 * 3 and len(cases.cases(shape, "short")) == 17
        for name, share in [("full", 1.0), ("uniform 75 %", 0.75), ("ragged 75 %", 0.75), ("ragged 50 %", 0.5)]:
            widths = cases.widths_of(name, shape)
            assert abs(sum(widths) / (shape.width * shape.experts) - share) < 0.02 and max(widths) <= shape.width
        assert cases.widths_of("some zero", shape).count(0) == shape.experts // 4
        counts = {}
        for routing in cases.ROUTINGS:
            ids = cases.routed(routing, shape, 500)
            groups = [ids[t : t + shape.top_k] for t in range(0, len(ids), shape.top_k)]
            assert all(len(set(g)) == shape.top_k for g in groups), "an expert twice"
            assert cases.routed(routing, shape, 3) == ids[: 3 * shape.top_k]
            counts[routing] = [ids.count(e) for e in range(shape.experts)]
        # As crates/simt/tests/benches.rs finds them.
        assert 0 not in counts["uniform"] and 2 * counts["many empty"].count(0) > shape.experts
        assert max(counts["zipf"]) > 2 * max(counts["uniform"])
    names = {case.shape.name for case in cases.selected("DeepSeek")}
    assert names == {"DeepSeek-V2-Lite", "DeepSeek-V3, 64 experts"} and not cases.selected("nothing")
    assert cases.selected("short")[0].names() == {"shape": "Qwen3-30B-A3B", "tokens": 1, "widths": "full",
                                                  "routing": "uniform"}


def check_costs():
    """The examples of kernels/cost.rs."""
    h200 = {"flops": 788e12, "bytes": 4.3e12}
    shape = cases.SHAPES[0]
    flops, bytes_ = cases.cost(shape, 1, [768] * 128, range(8))
    seconds, bound = cases.floor(flops, bytes_, h200)
    assert bound == "bytes" and abs(seconds * 1e6 - 17.6) < 0.1, seconds
    flops, bytes_ = cases.cost(shape, 65_536, [768] * 128, list(range(128)) * 4096)
    seconds, bound = cases.floor(flops, bytes_, h200)
    assert bound == "flops" and abs(seconds * 1e6 - 6279) < 1, seconds
    # Without rows or without neurons an expert costs nothing.
    assert cases.cost(shape, 1, [768, 0, 50] + [768] * 125, [0, 1]) == cases.cost(shape, 1, [768] * 128, [0])


def check_draws():
    """The checksums that crates/simt/tests/benches.rs finds in Rust."""
    source = (REPO / "crates/simt/tests/benches.rs").read_text()

    def pinned(name):
        numbers = re.search(rf"const {name}: .*? = \[(.*?)\];", source, re.DOTALL)[1]
        return [int(number.replace("_", "")) for number in re.findall(r"\d[\d_]*", numbers)]

    def checksum(values):
        return sum(place * value for place, value in enumerate(values, 1))

    widths = [checksum(cases.widths_of(name, shape)) for name in cases.WIDTHS[2:4] for shape in cases.SHAPES]
    assert widths == pinned("DRAWN_WIDTHS"), widths
    ids = [checksum(cases.routed(routing, shape, 500)) for routing in cases.ROUTINGS for shape in cases.SHAPES]
    assert ids == pinned("DRAWN_IDS"), ids


if __name__ == "__main__":
    for check in [check_generator, check_rust_source, check_cases, check_costs, check_draws]:
        check()
    print("passed: the peers' cases are those of our own bench")
