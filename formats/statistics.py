"""Statistics of the inputs of a model's projections, as calibrate.py makes them and thresholds are read from them."""

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from formats.checkpoint import check_fingerprint
from formats.files import one_line, write_output

STATISTICS_NAME = "calibration.safetensors"  # beside the checkpoint it belongs to
FORMAT = "activation statistics 1"
# projection -> the name of its site, under which what the projections of a site share is stored
SITE_OF = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "gate": "gate_up", "up": "gate_up", "down": "down"}
SITES = tuple(dict.fromkeys(SITE_OF.values()))  # in the order of a block
PROBABILITIES = np.linspace(0, 1, 1001)  # the sparsities whose quantiles are stored


class Statistics:
    """Distributions of the inputs of a model's projections, by layer and projection (q k v o gate up down).

    Attributes:
        tensors: by "<layer>.<site or projection>.<name>"; see `calibrate.Recorder.results` and `teal_statistics`.
        metadata: strings: kind ("own" or "teal"), and of own ones tokens, dtype, text, fingerprint.
    """

    def __init__(self, tensors: dict[str, Tensor], metadata: dict[str, str]):
        self.tensors, self.metadata = tensors, metadata
        self.n_layer = 1 + max(int(name.split(".")[0]) for name in tensors)

    @property
    def fingerprint(self) -> str | None:
        """`formats.checkpoint.fingerprint` of the checkpoint they were taken from, or of its int8 form.

        None if it is unknown, as for TEAL's.
        """
        return self.metadata.get("fingerprint")

    def get(self, layer: int, projection: str, name: str) -> Tensor:
        """One tensor, float32 unless said otherwise, of a projection's input (or of that and the projection's weights).

        Args:
            name: signed, magnitude [1001]: quantiles at PROBABILITIES of x and of |x| (least and greatest at the ends);
                weighted [1001]: those of |x_i| * c_i; column_norms [in]: c, the 2-norm of each input's weights;
                channel_mean, channel_second_moment [in]: of each input channel;
                pooled [3]: mean, standard deviation and kurtosis (3 for a Gaussian) over all channels and tokens.

        Raises:
            ValueError: an unknown projection, a layer that is not there, a name that TEAL's histograms do not have.
        """
        if projection not in SITE_OF:
            raise ValueError(f"unknown projection {projection!r}; known: {', '.join(SITE_OF)}")
        for owner in (projection, SITE_OF[projection]):
            if f"{layer}.{owner}.{name}" in self.tensors:
                return self.tensors[f"{layer}.{owner}.{name}"]
        layers = sorted({int(key.split(".")[0]) for key in self.tensors})
        if layer in layers:
            raise ValueError(f"these statistics hold no {name} ({self.metadata['kind']}); run calibrate.py on a text")
        raise ValueError(f"no statistics of layer {layer}; there are {len(layers)}, {layers[0]} to {layers[-1]}")

    def threshold(self, layer: int, projection: str, sparsity: float) -> float:
        """The t for which a share `sparsity` of the projection's inputs has |x| <= t; 0 for sparsity 0.

        Precise to 0.001 of sparsity (in bfloat16 to the share of one value). TEAL's histograms give TEAL's own
        threshold, the quantile (1 + sparsity) / 2 of x, which supposes symmetry.

        Raises:
            ValueError: sparsity outside [0, 1), an unknown projection, a layer that is not there.
        """
        if self.metadata["kind"] == "own":
            return self._quantile(layer, projection, "magnitude", sparsity)
        cumulative, centers = (self.get(layer, projection, name).numpy() for name in ("cumulative", "centers"))
        _check_sparsity(sparsity)
        return float(np.interp((0.5 + sparsity / 2) * cumulative[-1], cumulative, centers)) if sparsity else 0.0

    def weighted_threshold(self, layer: int, projection: str, sparsity: float) -> float:
        """The t for which a share `sparsity` has |x_i| * c_i <= t, c the `column_norms`. Raises as `threshold` does."""
        return self._quantile(layer, projection, "weighted", sparsity)

    def _quantile(self, layer: int, projection: str, name: str, sparsity: float) -> float:
        values = self.get(layer, projection, name)
        _check_sparsity(sparsity)
        return float(np.interp(sparsity, PROBABILITIES, values.numpy())) if sparsity else 0.0

    def check_fingerprint(self, folder: Path) -> None:
        """Raises ValueError if they were taken from another checkpoint than the one in `folder`."""
        check_fingerprint(self.fingerprint, folder, "the statistics are", "calibrate.py")

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all. Raises ValueError if it cannot be written."""
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        write_output(path, serialize(tensors, {"format": FORMAT, **self.metadata}))


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} is outside [0, 1)")


def load_statistics(path: str | Path) -> Statistics:
    """Reads what `Statistics.save` wrote.

    Raises:
        ValueError: no file there, a truncated one, or one that holds something else.
    """
    again = "make it with calibrate.py"
    if not Path(path).is_file():
        raise ValueError(f"no statistics file at {path}; {again}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.pop("format", None) != FORMAT:
                raise ValueError(f"{path} is not a statistics file of this version; {again}")
            return Statistics({name: file.get_tensor(name) for name in file.keys()}, metadata)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a statistics file ({error}); {again}") from None


def teal_statistics(folder: str | Path) -> Statistics:
    """TEAL's published histograms: layer-{i}/{self_attn,mlp}/histograms.pt. Layers that are missing stay absent.

    Raises:
        ValueError: no such files, or one that does not hold h1, h1_centers, h2, h2_centers.
    """
    tensors = {}
    for part, sites in (("self_attn", ("qkv", "o")), ("mlp", ("gate_up", "down"))):
        for path in Path(folder).glob(f"layer-*/{part}/histograms.pt"):
            try:
                layer = int(path.parts[-3].removeprefix("layer-"))
                histograms = torch.load(path, map_location="cpu", weights_only=True)
                for site, name in zip(sites, ("h1", "h2"), strict=True):
                    tensors[f"{layer}.{site}.cumulative"] = histograms[name].double().cumsum(0)
                    tensors[f"{layer}.{site}.centers"] = histograms[f"{name}_centers"].double()
            except Exception as error:  # unpickling fails in many ways
                reason = f"{type(error).__name__}: {one_line(error)}"
                raise ValueError(f"{path} is not a file of TEAL's histograms ({reason})") from None
    if not tensors:
        raise ValueError(f"{folder} holds no layer-*/self_attn/histograms.pt; give TEAL's folder `histograms`")
    return Statistics(tensors, {"kind": "teal"})
