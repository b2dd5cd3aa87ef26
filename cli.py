"""What the scripts share on the command line: device and precision, and mistakes that end in one line."""

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from formats.files import one_line

PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def resolve_device(name: str) -> torch.device:
    """The device of this name. Raises ValueError if torch cannot use it here."""
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {one_line(error)}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is not supported; cpu and cuda are")
    return device


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --device and --precision, which every script that runs a model has."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="default: cuda if there is a GPU, else cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="bfloat16", help="dtype of weights and activations")


def add_sparsity_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the checkpoint, its cuts and --json, which every script that runs a sparse model has."""
    parser.add_argument("--checkpoint_path", type=Path, help="folder, or a file in it (default: the default model)")
    parser.add_argument("--sparsity", type=float, default=0.0, help="share of the weights to cut, 0 <= F < 1")
    parser.add_argument("--thresholds", default="best", help="best, uniform, greedy, refined or a cut table's file")
    statistics_help = "default: calibration.safetensors beside the checkpoint"
    parser.add_argument("--statistics", type=Path, metavar="FILE", help=statistics_help)
    parser.add_argument("--json", action="store_true", help="a last line of JSON")
    refuse_old_flags(parser, {"--allocation": "--thresholds {best,uniform,greedy,refined,FILE}"})


def add_text_arguments(parser: argparse.ArgumentParser, num_tokens: int) -> None:
    """Adds the checkpoint and the calibration text, which every script that calibrates on a text has."""
    parser.add_argument("--checkpoint_path", type=Path, help="folder, or a file in it (default: the default model)")
    parser.add_argument("--data", nargs="+", help=".txt or .jsonl files, or c4 (default: the model's own text)")
    parser.add_argument("--num_tokens", type=int, default=num_tokens, help="length of the text (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the model's own text (default: %(default)s)")


def refuse_old_flags(parser: argparse.ArgumentParser, renamed: dict[str, str]) -> None:
    """Makes each flag of an earlier version an error of one line that says what it is now."""

    class Refuse(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            raise SystemExit(f"{parser.prog}: {option_string} is now {renamed[option_string]}")

    for flag in renamed:
        parser.add_argument(flag, action=Refuse, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def command_line(main: Callable, arguments: argparse.Namespace | None = None) -> None:
    """Runs a script's main; a user's mistake ends it with one line on stderr and status 1, Ctrl-C with status 130."""
    warnings.formatwarning = lambda message, *_: f"{message}\n"  # no file and line of ours
    try:
        main(**vars(arguments)) if arguments else main()
    except (ValueError, OSError, MemoryError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None

    # memory that ran out: torch has a class for a GPU's alone
    except RuntimeError as error:
        _, on_cpu, message = str(error).rpartition("DefaultCPUAllocator: ")
        if not on_cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        reason = ". ".join(" ".join(message.split()).split(". ")[:3])
        advice = "take a smaller model or fewer tokens at once" + ("" if on_cpu else ", or --device cpu")
        raise SystemExit(f"{Path(sys.argv[0]).name}: {reason}: {advice}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
