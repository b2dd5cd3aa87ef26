"""Draws benchmarks/results/ against sparsity: a token's and a product's time, with the floor of the bytes; perplexity.

python -m benchmarks.plot            # decode.csv -> decode.png, gemv.csv -> gemv.png, quality.csv -> quality.png
"""

from collections import defaultdict

from benchmarks.results import RESULTS, read_rows
from formats.files import atomic_write

# Datasheet bandwidths, GB/s: no decode step is faster than the bytes it reads over this.
PEAK_BANDWIDTH = {"NVIDIA H100 80GB HBM3": 3350, "NVIDIA H200": 4800}


def plot_decode(plt) -> None:
    """A panel a device and model, a line a form of the weights: sweeps alone, of four sparsities or more."""
    panels = defaultdict(lambda: defaultdict(list))
    for row in read_rows("decode.csv"):
        form = row["dtype"] if row["quant"] == "none" else row["quant"]
        panels[row["device"], row["model"]][form, row["prompt_tokens"], row["new_tokens"]].append(row)
    panels = {key: [line for line in lines.items() if len(line[1]) >= 4] for key, lines in panels.items()}
    panels = {key: lines for key, lines in panels.items() if lines}
    if not panels:
        return
    figure, axes = grid(plt, len(panels))
    for axis, ((device, model), lines) in zip(axes, sorted(panels.items()), strict=True):
        peak = PEAK_BANDWIDTH.get(device)
        for i, ((form, prompt, _), rows) in enumerate(sorted(lines)):
            rows.sort(key=lambda row: float(row["sparsity"]))
            x = [100 * float(row["achieved_sparsity"]) for row in rows]
            y = [float(row["ms_per_token"]) for row in rows]
            axis.plot(x, y, "o-", color=f"C{i}", label=f"{form}, {prompt} prompt tokens", markersize=4)
            if peak:
                floor = [float(row["bytes_per_token"]) / peak / 1e6 for row in rows]
                axis.plot(x, floor, ":", color=f"C{i}", label=f"its bytes / {peak:,} GB/s")
        axis.set_title(f"{model}\n{device}", fontsize=9)
        axis.set_xlabel("achieved sparsity, %")
        axis.set_ylabel("ms a token")
        axis.set_ylim(0, 1.25 * axis.get_ylim()[1])  # room for the legend
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, ncols=2)
    save(figure, "decode.png")


def grid(plt, n: int):
    """A figure and its n axes, three in a row."""
    columns = min(3, n)
    lines = -(-n // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 4 * lines), squeeze=False)
    for axis in axes.flat[n:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:n])


def plot_gemv(plt) -> None:
    """One product, a panel a shape and device, a line a kernel and form of the weights; floors of the kept rows."""
    panels = defaultdict(lambda: defaultdict(list))
    for row in read_rows("gemv.csv"):
        shape = row["device"], int(row["in_features"]), int(row["out_features"])
        point = 100 * float(row["sparsity"]), float(row["us"]), float(row["bytes"])
        panels[shape][row["kernel"], row["dtype"]].append(point)
    figure, axes = grid(plt, len(panels))
    for axis, (shape, lines) in zip(axes, sorted(panels.items()), strict=True):
        peak = PEAK_BANDWIDTH.get(shape[0])
        for i, (line, points) in enumerate(sorted(lines.items())):
            x, us, read = zip(*sorted(points), strict=True)
            axis.plot(x, us, "o-", color=f"C{i}", label=", ".join(line), markersize=4)
            if peak and line[0] == "ours":
                axis.plot(x, [n / peak / 1e3 for n in read], ":", color=f"C{i}", label=f"its bytes / {peak:,} GB/s")
        axis.set_title(f"{shape[1]} -> {shape[2]}\n{shape[0]}", fontsize=9)
        axis.set_xlabel("sparsity, %")
        axis.set_ylabel("us")
        axis.set_ylim(0, 1.5 * axis.get_ylim()[1])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, ncols=2)
    save(figure, "gemv.png")


LABELS = {"none": "16-bit weights", "int8": "int8", "int4": "int4"}


def split_model(row: dict[str, str]) -> tuple[str, str]:
    """The model's name without its weights' form, and that form, of a row of quality.csv."""
    name, _, quant = row["model"].rpartition("-")
    return (name, quant) if quant in LABELS else (row["model"], "none")


def plot_quality(plt) -> None:
    """The rules on WikiText-2, full protocol, a line each; dense is a line across.

    Beside them, for 16, 8 and 4 bits, perplexity against the bytes that a token reads: see `bytes_line`.
    """
    protocol = {"text": "wikitext", "sparse_fraction": "0.99", "context": "2048", "window": "512", "num_windows": "128"}
    rows = [row for row in read_rows("quality.csv") if protocol.items() <= row.items()]
    models = sorted({split_model(row)[0] for row in rows})
    if not models:
        return
    figure, axes = plt.subplots(len(models), 2, figsize=(13, 4.6 * len(models)), squeeze=False)
    for (by_sparsity, by_bytes), model in zip(axes, models, strict=True):
        lines, fronts = defaultdict(list), defaultdict(list)
        for row in (row for row in rows if split_model(row)[0] == model):
            name = row["allocation"] if row["rule"] in ("teal", "greedy", "global") else row["rule"]
            point = 100 * float(row["achieved_sparsity"]), float(row["perplexity"])
            quant = split_model(row)[1]
            if quant == "none":
                lines[name].append(point)
            if name in ("dense", "uniform", "global"):
                for rule in ("uniform", "global") if name == "dense" else (name,):
                    fronts[quant, rule].append(point)
        for name, points in lines.items():
            if name == "dense":
                by_sparsity.axhline(points[0][1], color="grey", linestyle=":", label=name)
            else:
                by_sparsity.plot(*zip(*sorted(points), strict=True), "o-", label=name, markersize=4)
        by_sparsity.set_xlabel("achieved sparsity, %")
        for (quant, rule), points in sorted(fronts.items()):
            if len(points) > 1 and (line := bytes_line(model, quant)):
                x, y = zip(*((line(sparsity) / 1e6, value) for sparsity, value in sorted(points)), strict=True)
                by_bytes.plot(x, y, "o-", label=f"{LABELS[quant]}, {rule}", markersize=4)
        by_bytes.set_xlabel("MB of weights read a token")
        for axis in (by_sparsity, by_bytes):
            axis.set_title(f"{model}, WikiText-2")
            axis.set_ylabel("perplexity")
            axis.set_yscale("log")
            low, high = axis.get_ylim()
            ticks = [tick for tick in (4, 5, 6, 8, 10, 12, 15, 18, 20, 25, 30, 40, 60, 100, 200) if low < tick < high]
            axis.set_yticks(ticks, [str(tick) for tick in ticks])
            axis.set_yticks([], minor=True)
            axis.set_ylim(low, min(high, 300))
            axis.grid(alpha=0.3, which="both")
            axis.legend(fontsize=8)
    save(figure, "quality.png")


def bytes_line(model: str, quant: str):
    """Bytes a token by achieved sparsity in %: the line through the ends of decode.csv's rows; None without two.

    An allocation's own shifts, under 1 % of the bytes, are not in it where those rows have one sparsity everywhere.
    """
    found = {
        100 * float(row["achieved_sparsity"]): float(row["bytes_per_token"])
        for row in read_rows("decode.csv")
        if row["model"] == model and row["quant"] == quant and row["dtype"] != "float32"
    }
    if len(found) < 2:
        return None
    low, high = min(found), max(found)
    return lambda sparsity: found[low] + (found[high] - found[low]) * (sparsity - low) / (high - low)


def save(figure, name: str) -> None:
    figure.tight_layout()
    with atomic_write(RESULTS / name) as temporary:
        figure.savefig(temporary, dpi=150)
    print(RESULTS / name)


def main() -> None:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("the plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = {"decode.csv": plot_decode, "gemv.csv": plot_gemv, "quality.csv": plot_quality}
    found = [draw for name, draw in drawn.items() if read_rows(name)]
    if not found:
        raise SystemExit(f"{RESULTS} has no rows; run benchmarks/run.sh or benchmarks/quality.sh first")
    for draw in found:
        draw(plt)


if __name__ == "__main__":
    main()
