"""Draws benchmarks/results/ against sparsity: times beside the limit of the bytes read, speed-ups, perplexity.

python -m benchmarks.plot            # decode.csv -> decode.png, gemv.csv -> gemv.png, quality.csv -> quality.png
"""

import options

if __name__ == "__main__":
    options.run_script("benchmarks.plot")

from collections import defaultdict

import numpy as np

from benchmarks.results import RESULTS, form, read_rows
from formats.files import atomic_write

# Datasheet bandwidths, GB/s: no decode step is faster than the bytes it reads over this.
PEAK_BANDWIDTH = {"NVIDIA H100 80GB HBM3": 3350, "NVIDIA H200": 4800}

# One colour for one thing in all panels: forms of weights (ours), rival kernels, rules.
FORMS = {"bfloat16": "C0", "float16": "C0", "float32": "C5", "int8": "C1", "int4": "C2", "packed": "C9"}
KERNELS = {"teal": "C3", "dejavu": "C4", "dense": "black", "dense_t": "grey"}
RULES = {"uniform": "C0", "greedy": "C2", "refined": "C3", "norms": "C9", "cats": "C4", "relu": "C5"}
RULES |= {"up-input": "C6", "up-output": "C8"}
MARKERS = {"none": "o", "packed": "P", "int8": "s", "int4": "^"}
PEERS = {"GPT-Fast": "D", "TEAL": "^", "TEAL dense": "v"}
SPEEDUP = "NVIDIA H100 80GB HBM3", "llama-3-8b"  # whose sweep with a short prompt is drawn beside the peers
LORA = "-lora-"  # in the name of a checkpoint that finetune.py made: before it its base, after it the sparsity in %
MOST_PERPLEXITY = 300  # what is above is drawn at this height, with its number


def plot_decode() -> None:
    """A panel per device, model and prompt, a line per form of the weights; a last one: `SPEEDUP` beside the peers."""
    panels = defaultdict(lambda: defaultdict(list))
    for row in sorted(read_rows("decode.csv"), key=lambda row: float(row["sparsity"])):
        if (row["batch"], row["gpus"], row["draft"], row["step"]) == ("1", "1", "none", "fused"):
            sweep = row["device"], row["model"], int(row["prompt_tokens"]), row["new_tokens"]
            panels[sweep][form(row)].append(row)

    # sweeps of four sparsities or more
    panels = {sweep: {name: rows for name, rows in lines.items() if len(rows) >= 4} for sweep, lines in panels.items()}
    panels = {sweep: lines for sweep, lines in panels.items() if lines}
    if not panels:
        return
    with_peers = [sweep for sweep in panels if sweep[:2] == SPEEDUP and "bfloat16" in panels[sweep]]
    figure, axes = grid(len(panels) + bool(with_peers))

    # time per token
    for axis, (sweep, lines) in zip(axes, sorted(panels.items()), strict=False):
        device, model, prompt, _ = sweep
        peak = PEAK_BANDWIDTH.get(device)
        for name, rows in lines.items():
            x = percent(rows)
            axis.plot(x, column(rows, "ms_per_token"), "o-", color=FORMS[name], label=f"ours, {name}", markersize=4)
            if peak:
                axis.plot(x, column(rows, "bytes_per_token") / peak / 1e6, ":", color=FORMS[name])
        axis.set_title(f"{model}, {device}\n{prompt} prompt tokens", fontsize=9)
        axis.set(xlabel="achieved sparsity, %", ylabel="ms per token", ylim=(0, None))

    # speed-up, at the shortest prompt
    if with_peers:
        plot_speedup(axes[-1], panels[min(with_peers)])
    axes[0].plot([], [], "k:", label="limit of the bytes read")
    save(figure, "decode.png", legend=axes)


def plot_speedup(axis, lines: dict[str, list[dict]]) -> None:
    """Tokens/s over our dense bfloat16 model's, for all forms and peers; the limit is its bytes over theirs."""
    first = lines["bfloat16"][0]
    dense, dense_bytes = float(first["tokens_per_sec"]), float(first["bytes_per_token"])
    for name, rows in lines.items():
        x = percent(rows)
        axis.plot(x, column(rows, "tokens_per_sec") / dense, "o-", color=FORMS[name], markersize=4)
        axis.plot(x, dense_bytes / column(rows, "bytes_per_token"), ":", color=FORMS[name])

    # a peer's marker says whose it is, its colour the form of the weights; its sparsity is what was asked for
    for row in read_rows("peers.csv"):
        if (row["device"], row["model"]) == SPEEDUP:
            x, y = 100 * float(row["sparsity"]), float(row["tokens_per_sec"]) / dense
            axis.plot(x, y, PEERS[row["system"]], color=FORMS[form(row)], fillstyle="none", markersize=8)
    for system, marker in PEERS.items():
        axis.plot([], [], marker, color="black", fillstyle="none", label=system)
    device, model = SPEEDUP
    axis.set_title(f"{model}, {device}\nspeed-up over our dense bfloat16 ({dense:.0f} tokens/s)", fontsize=9)
    axis.set(xlabel="achieved sparsity, %", ylabel="times our dense bfloat16", yscale="log")
    ticks(axis, (0.7, 1, 1.5, 2, 3, 4, 6, 8))


def plot_gemv() -> None:
    """One product: a panel per shape and device, a line per kernel and form of the weights, ours with their limits."""
    panels = defaultdict(lambda: defaultdict(list))
    for row in sorted(read_rows("gemv.csv"), key=lambda row: float(row["sparsity"])):
        shape = row["device"], int(row["in_features"]), int(row["out_features"])
        panels[shape][row["kernel"], row["dtype"]].append(row)
    figure, axes = grid(len(panels))
    for axis, ((device, n_in, n_out), lines) in zip(axes, sorted(panels.items()), strict=True):
        peak = PEAK_BANDWIDTH.get(device)
        for (kernel, dtype), rows in sorted(lines.items(), key=lambda line: (line[0][0] != "ours", line[0])):
            x = 100 * column(rows, "sparsity")
            color = FORMS[dtype] if kernel == "ours" else KERNELS[kernel]
            axis.plot(x, column(rows, "us"), "o-", color=color, label=f"{kernel}, {dtype}", markersize=4)
            if peak and kernel == "ours":
                axis.plot(x, column(rows, "bytes") / peak / 1e3, ":", color=color)
        axis.set_title(f"{n_in} -> {n_out}, {device}", fontsize=9)
        axis.set(xlabel="sparsity, %", ylabel="us per product", ylim=(0, None))
    axes[0].plot([], [], "k:", label="limit of the bytes read")
    save(figure, "gemv.png", legend=axes)


def plot_quality() -> None:
    """The rules on WikiText-2, full protocol; beside them, for 16, 8 and 4 bits, perplexity against bytes per token."""
    protocol = {"text": "wikitext", "sparse_fraction": "0.99", "context": "2048", "window": "512", "num_windows": "128"}
    measured = [row for row in read_rows("quality.csv") if protocol.items() <= row.items()]
    models = sorted({row["model"] for row in measured if LORA not in row["model"]})
    if not models:
        return
    figure, axes = grid(2 * len(models), columns=2)
    for model, by_sparsity, by_bytes in zip(models, axes[::2], axes[1::2], strict=True):
        lines = defaultdict(list)
        for row in sorted(measured, key=lambda row: float(row["achieved_sparsity"])):
            if row["model"] == model:
                lines[row["quant"], row["rule"]].append(row)

        # every rule, weights as they are
        for row in lines["none", "dense"]:
            by_sparsity.axhline(float(row["perplexity"]), color="grey", linestyle=":", label="dense")
        for rule in RULES:
            if rows := lines["none", rule]:
                draw_perplexity(by_sparsity, percent(rows), rows, f"o{'--' if rule == 'norms' else '-'}", label=rule)

        # weights tuned for each sparsity
        tuned = [row for row in measured if row["model"] == f"{model}{LORA}{100 * float(row['sparsity']):g}"]
        tuned = [row for row in tuned if (row["quant"], row["rule"]) == ("none", "refined")]
        if tuned := sorted(tuned, key=lambda row: float(row["sparsity"])):
            draw_perplexity(by_sparsity, percent(tuned), tuned, "D:", label="refined, weights tuned (LoRA)")

        # two rules from dense on, in every form of the weights
        for (quant, rule), rows in sorted(lines.items()):
            bytes_at = bytes_line(model, quant)
            if rule in ("uniform", "refined") and bytes_at:
                rows = lines[quant, "dense"] + rows
                draw_perplexity(by_bytes, bytes_at(percent(rows)) / 1e6, rows, f"{MARKERS[quant]}-")
        drawn = {quant for quant, _ in lines}
        for quant in [quant for quant in MARKERS if quant in drawn]:
            by_bytes.plot([], [], MARKERS[quant], color="grey", label="16-bit weights" if quant == "none" else quant)

        # both panels alike
        by_sparsity.set(xlabel="achieved sparsity, %")
        by_bytes.set(xlabel="MB of weights read per token")
        for axis in (by_sparsity, by_bytes):
            axis.set(title=f"{model}, WikiText-2", ylabel="perplexity", yscale="log")
            axis.set_ylim(axis.get_ylim()[0], 1.25 * MOST_PERPLEXITY)
            ticks(axis, (4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 60, 100, 200, 300))
    save(figure, "quality.png", legend=axes)


def draw_perplexity(axis, x, rows: list[dict], style: str, label: str | None = None) -> None:
    """A rule's line in its colour; what is above `MOST_PERPLEXITY` lies at that height, with its number."""
    y = column(rows, "perplexity")
    axis.plot(x, y.clip(max=MOST_PERPLEXITY), style, color=RULES[rows[-1]["rule"]], label=label, markersize=4)
    for place, value in zip(x, y, strict=True):
        if value > MOST_PERPLEXITY:
            axis.text(place, 1.05 * MOST_PERPLEXITY, f"\u2191{value:,.0f}", ha="center", fontsize=7)


def bytes_line(model: str, quant: str):
    """Bytes per token by achieved sparsity in %: the line through the ends of decode.csv's CPU rows; None without two.

    A CPU reads no row that is cut; a GPU reads all rows of small products.
    """
    # the shifts of refined thresholds, under 1 % of the bytes, are not in it where those rows have uniform ones
    rows = [row for row in read_rows("decode.csv") if (row["model"], row["quant"]) == (model, quant)]
    rows = [row for row in rows if row["device"] == "cpu" and row["dtype"] != "float32"]
    rows = sorted(rows, key=lambda row: float(row["achieved_sparsity"]))
    if len(rows) < 2:
        return None
    (low, high), (most, least) = percent(rows)[[0, -1]], column(rows, "bytes_per_token")[[0, -1]]
    return lambda sparsity: most + (least - most) * (sparsity - low) / (high - low)


def column(rows: list[dict], name: str) -> np.ndarray:
    return np.array([float(row[name]) for row in rows])


def percent(rows: list[dict]) -> np.ndarray:
    return 100 * column(rows, "achieved_sparsity")


def grid(n: int, columns: int = 3):
    """A figure and its n axes, at most `columns` in a row."""
    from matplotlib.figure import Figure

    columns = min(columns, n)
    lines = -(-n // columns)
    figure = Figure(figsize=(4.8 * columns, 3.9 * lines + 0.6), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    for axis in axes.flat[n:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:n])


def ticks(axis, values: tuple[float, ...]) -> None:
    """Labels a logarithmic axis with those of the values that lie on it."""
    low, high = axis.get_ylim()
    shown = [value for value in values if low < value < high]
    axis.set_yticks(shown, [f"{value:g}" for value in shown])
    axis.set_yticks([], minor=True)


def save(figure, name: str, legend: list) -> None:
    """Writes results/<name>, one legend below all panels: the axes of `legend` give its entries, each once."""
    entries = {}
    for axis in legend:
        axis.grid(alpha=0.3)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=6, fontsize=9)
    with atomic_write(RESULTS / name) as temporary:
        figure.savefig(temporary, dpi=150)
    print(RESULTS / name)


def main(argv: list[str] | None = None) -> None:
    """Draws what has rows. Raises ValueError without matplotlib, or where nothing was measured."""
    options.plot(argv)
    plots = {"decode.csv": plot_decode, "gemv.csv": plot_gemv, "quality.csv": plot_quality}
    measured = [plot for name, plot in plots.items() if read_rows(name)]
    if not measured:
        raise ValueError(f"{RESULTS} has no rows; run benchmarks/run.sh or benchmarks/quality.sh first")
    for plot in measured:
        plot()
