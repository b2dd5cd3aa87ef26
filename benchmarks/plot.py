"""Draws benchmarks/results/decode.csv: milliseconds a token against sparsity, with the floor that the bytes set.

python -m benchmarks.plot            # writes benchmarks/results/decode.png
"""

from collections import defaultdict

from benchmarks.results import RESULTS, read_rows
from convert_hf_checkpoint import atomic_write

# Datasheet bandwidths, GB/s: no decode step is faster than the bytes it reads over this.
PEAK_BANDWIDTH = {"NVIDIA H100 80GB HBM3": 3350, "NVIDIA H200": 4800}


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = defaultdict(list)
    for row in read_rows("decode.csv"):
        lines[row["device"], row["model"], row["dtype"], row["quant"], row["prompt_tokens"]].append(row)
    if not lines:
        raise SystemExit("benchmarks/results/decode.csv has no rows; run benchmarks/run.sh first")
    devices = sorted({key[0] for key in lines})
    figure, axes = plt.subplots(1, len(devices), figsize=(6 * len(devices), 4.2), squeeze=False)
    for axis, device in zip(axes[0], devices, strict=True):
        peak = PEAK_BANDWIDTH.get(device)
        for i, (key, rows) in enumerate(sorted((k, r) for k, r in lines.items() if k[0] == device)):
            rows.sort(key=lambda row: float(row["sparsity"]))
            x = [100 * float(row["achieved_sparsity"]) for row in rows]
            label = f"{key[1]}, {key[2] if key[3] == 'none' else key[3]}, {key[4]} prompt tokens"
            axis.plot(x, [float(row["ms_per_token"]) for row in rows], "o-", color=f"C{i}", label=label)
            if peak:
                floor = [float(row["bytes_per_token"]) / peak / 1e6 for row in rows]
                axis.plot(x, floor, ":", color=f"C{i}", label=f"{key[1]}: bytes / {peak:,} GB/s")
        axis.set_title(device)
        axis.set_xlabel("achieved sparsity, %")
        axis.set_ylabel("ms a token")
        axis.set_ylim(0, 1.2 * axis.get_ylim()[1])  # room for the legend
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    with atomic_write(RESULTS / "decode.png") as temporary:
        figure.savefig(temporary, dpi=150)
    print(RESULTS / "decode.png")


if __name__ == "__main__":
    main()
