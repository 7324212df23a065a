"""TFLOP/s and GB/s against tokens per expert, ours and every peer's, for scripts/gpu-report.py. Needs matplotlib."""

import os
import re

RATES = [("useful_tflops", "useful TFLOP/s", "cublas_8192_tflops"), ("gb_per_s", "GB/s", "copy_gb_per_s")]
KINDS = ["experts", "layer"]


def lines_of(ours, peers):
    """Points by shape and widths, then by kind, then by name; ours first. Uniform routing only."""
    figures = {}
    for rows, name_of in [(ours, lambda _: "ours"), (peers, lambda row: row["peer"])]:
        for row in rows:
            if row["routing"] == "uniform" and row["what"] in KINDS:
                kinds = figures.setdefault((row["shape"], row["widths"]), {kind: {} for kind in KINDS})
                kinds[row["what"]].setdefault(name_of(row), []).append(row)
    return figures


def drawn(plt, kinds, shape, ceilings, title):
    figure, axes = plt.subplots(len(KINDS), len(RATES), figsize=(10, 7), sharex=True, squeeze=False)
    names = list(dict.fromkeys(name for kind in KINDS for name in kinds[kind]))
    colours = {name: "black" if name == "ours" else f"C{i}" for i, name in enumerate(names)}
    for row, kind in enumerate(KINDS):
        for column, (rate, label, ceiling) in enumerate(RATES):
            plot = axes[row][column]
            for name, points in kinds[kind].items():
                points = sorted(points, key=lambda p: p["tokens"])
                plot.plot([p["tokens"] * shape["top_k"] / shape["experts"] for p in points], [p[rate] for p in points],
                          color=colours[name], linewidth=2.5 if name == "ours" else 1.2, marker="o", markersize=3,
                          label=name)
            plot.axhline(ceilings[ceiling], color="grey", linestyle="--", linewidth=1)
            plot.set_xscale("log", base=2)
            plot.set_ylim(bottom=0)
            plot.set_title(kind, fontsize=9)
            plot.set_ylabel(label)
            if row == len(KINDS) - 1:
                plot.set_xlabel("tokens per expert")
            if "ours" not in kinds[kind]:
                plot.text(0.5, 0.5, "no figure of ours", transform=plot.transAxes, ha="center", color="grey")
    handles = {}
    for plot in axes.flat:
        handles.update({label: handle for handle, label in zip(*plot.get_legend_handles_labels())})
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=3, fontsize=8)
    figure.suptitle(f"{title} (dashed: ceiling)", fontsize=11)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure


def draw(folder, ours, peers, shapes, ceilings):
    """Writes a picture per shape and widths; its name and file, or why there is none."""
    figures = {key: kinds for key, kinds in lines_of(ours, peers).items() if key[0] in shapes}
    if not figures:
        return [], "no figure with uniform routing"
    try:
        import matplotlib
    except ImportError:
        return [], "matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # Text stays text and ids are the same each time: small files that compare.
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tenp"})
    os.makedirs(folder, exist_ok=True)
    made = []
    for (name, widths), kinds in figures.items():
        title = f"{name}, {widths}"
        file = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") + ".svg"
        figure = drawn(plt, kinds, shapes[name], ceilings, title)
        figure.savefig(os.path.join(folder, file), metadata={"Date": None})
        plt.close(figure)
        made.append((title, file))
    return made, None
