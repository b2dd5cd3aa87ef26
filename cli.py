"""What the scripts share on the command line: how flags are read, and mistakes that end in one line.

Neither this nor options.py imports torch before a model needs it: `--help` and a wrong flag are answered at once.
"""

import argparse
import ast
import gc
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch

PRECISIONS = ("bfloat16", "float16", "float32")
MESSAGE = 600  # characters of a message at most


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        says = "default" in action.help or action.default in (None, argparse.SUPPRESS)
        return (
            action.help if says else f"{action.help} (default: {'off' if action.default is False else '%(default)s'})"
        )


class Parser(argparse.ArgumentParser):
    """A parser of the flags of `script` ("generate", "benchmarks.decode"), whose docstring opens the help.

    Every flag's help ends with its default. A mistake is a ValueError. `given` names the flags of the last parse.
    """

    def __init__(self, script: str, **options):
        source = Path(__file__).parent / f"{script.replace('.', '/')}.py"
        about = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))
        super().__init__(description=about, formatter_class=_Help, **options)
        self.given: set[str] = set()

    def error(self, message: str) -> NoReturn:
        words = re.sub(r"(\S{200})\S+", r"\1...", message)  # a value of the user's, at length
        raise ValueError(f"{words} (--help lists the flags)")

    def parse_known_args(self, args=None, namespace=None):
        defaults = {a.dest: a.default for a in self._actions if a.default is not argparse.SUPPRESS}
        unset = object()
        o, rest = super().parse_known_args(args, argparse.Namespace(**dict.fromkeys(defaults, unset)))
        self.given = {name for name in defaults if getattr(o, name) is not unset}
        vars(o).update({name: default for name, default in defaults.items() if name not in self.given})
        return o, rest

    def refuse(self, useless: bool, flags: str, where: str) -> None:
        """Raises ValueError if one of `flags` was given though it is `useless` there: "has no effect WHERE"."""
        advice = "leave it out" if where.startswith("without") else "leave one of them out"
        for flag in flags.split() if useless else ():
            if flag in self.given:
                raise ValueError(f"--{flag} has no effect {where}; {advice}")


def number(kind: type, allowed: Callable[..., bool], words: str) -> type[argparse.Action]:
    """The action of a flag whose values must be `allowed`; `words` say behind flag and value why one is not."""

    class Number(argparse.Action):
        def __init__(self, **options):
            super().__init__(type=kind, **options)

        def __call__(self, parser, namespace, values, option_string=None):
            for value in values if isinstance(values, list) else [values]:
                if not allowed(value):
                    raise ValueError(f"--{self.dest} {str(value)[:40]} {words}")
            setattr(namespace, self.dest, values)

    return Number


def at_least(least: int) -> type[argparse.Action]:
    return number(int, lambda n: least <= n < 2**63, f"must be at least {least}, and below 2^63")


SPARSITY = number(float, lambda share: 0 <= share < 1, "is outside [0, 1); 0.5 cuts half of the weights")


class UnwritableError(argparse.ArgumentTypeError, ValueError): ...


def output_path(text: str | Path, folder: bool = False) -> Path:
    """The path of a file to write, made sure of before any work. Raises ValueError if it cannot be written."""
    import tempfile

    try:
        path = Path(text).absolute()
        str(path).encode()
        if path.is_dir() and not folder:
            raise ValueError("a folder")
        with tempfile.TemporaryFile(dir=next(parent for parent in path.parents if parent.exists())):
            return Path(text)
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error))[:200]
        raise UnwritableError(f"cannot write {str(text)[:200]!r} ({reason})") from None


output_folder = partial(output_path, folder=True)


def resolve_device(name: str | None) -> "torch.device":
    """The device of this name; None: a GPU if there is one, else the CPU. Raises ValueError if torch cannot use it."""
    import torch

    from formats.files import one_line

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name[:40]} cannot be used here: {one_line(error)}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is not supported; cpu and cuda are")
    return device


def placement(o: argparse.Namespace) -> tuple["torch.device", "torch.dtype"]:
    import torch

    return resolve_device(o.device), getattr(torch, o.precision)


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is a GPU, else cpu)")
    parser.add_argument("--precision", choices=PRECISIONS, default="bfloat16", help="dtype of weights and activations")


# Flags that several scripts have mean one thing in all of them: they are declared below.


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint_path", type=Path, help="its folder, or a file in it (default: the default model)")


def add_sparsity_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_argument(parser)
    parser.add_argument("--sparsity", action=SPARSITY, default=0.0, help="share of the weights to cut, 0 to below 1")
    parser.add_argument("--thresholds", default="best", help="best, uniform, greedy, refined or a cut table's file")
    add_statistics_argument(parser)
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    refuse_old_flag(parser, "--allocation", "--thresholds {best,uniform,greedy,refined,FILE}")


def add_statistics_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--statistics", type=Path, metavar="FILE", help="calibrate.py's file (default: the one beside the checkpoint)"
    )


def add_output_argument(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--output", type=output_path, metavar="FILE", help=f"(default: {name} beside the checkpoint)")


def add_text_arguments(parser: argparse.ArgumentParser, num_tokens: int, least: int = 2) -> None:
    add_checkpoint_argument(parser)
    add = parser.add_argument
    add("--data", nargs="+", metavar="FILE", help="text or JSON, gzip or not; c4 (default: the model writes it)")
    add("--num_tokens", action=at_least(least), default=num_tokens, help="tokens of the text")
    add("--seed", action=at_least(0), default=0, help="seed of the text that the model writes")
    add_device_arguments(parser)


def parse_text_arguments(parser: Parser, argv: list[str] | None) -> argparse.Namespace:
    o = parser.parse_args(argv)
    parser.refuse(o.data is not None, "seed", "with --data")
    return o


def refuse_old_flag(parser: argparse.ArgumentParser, flag: str, now: str) -> None:
    class Refuse(argparse.Action):
        def __call__(self, *_):
            raise ValueError(f"{flag} is now {now}")

    parser.add_argument(flag, action=Refuse, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _line(message: object) -> str:
    return " ".join(str(message).split())[:MESSAGE]


def rank_count() -> int:
    """How many ranks torchrun has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def one_voice() -> Iterator[None]:
    """Of several ranks the first alone prints. An error is told by the rank that meets it first, and ends all."""
    if rank_count() == 1:
        yield
        return
    rank, stderr, silence = int(os.environ["RANK"]), sys.stderr, open(os.devnull, "w")
    if rank:
        sys.stdout = sys.stderr = silence

    def ranks():  # once they have joined
        torch = sys.modules.get("torch")
        return torch.distributed if torch and torch.distributed.is_initialized() else None

    try:
        yield
        signal.alarm(20)  # the end of this process, which may wait for a GPU that waits for another rank
        if joined := ranks():
            gc.collect()  # graphs first
            joined.barrier()
            joined.destroy_process_group()
        signal.alarm(0)
    except BaseException as error:
        signal.alarm(5)
        first = rank == 0
        if joined := ranks():
            with suppress(RuntimeError):
                first = joined.distributed_c10d._get_default_store().add("failed", 1) == 1
        sys.stderr = stderr if first else silence
        if isinstance(error, RuntimeError) and re.search("gloo|NCCL|store", str(error)):
            raise ValueError(f"another rank has ended: {_line(error)[:200]}") from None
        raise


def command_line(main: Callable[[], object]) -> None:
    """Runs a script's main; a user's mistake ends it with one line on stderr and status 1, Ctrl-C with status 130."""
    warnings.formatwarning = lambda message, *_: f"{_line(message)}\n"  # no file and line of ours
    # a byte of stdin that is no UTF-8, and a character that stdout cannot show, are replaced
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # None where it is closed
            stream.reconfigure(errors="replace")

    script = Path(sys.argv[0]).name
    try:
        with one_voice():
            main()
            print(end="", flush=True)  # a full disk behind stdout shows here
    except BrokenPipeError:  # who read stdout is gone; Python would try once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (ValueError, OSError, MemoryError) as error:
        raise SystemExit(_line(f"{script}: {str(error) or type(error).__name__}")) from None

    # memory that ran out: torch has a class for a GPU's alone
    except RuntimeError as error:
        import torch

        _, on_cpu, message = str(error).rpartition("DefaultCPUAllocator: ")
        if not on_cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        reason, other = ". ".join(_line(message).split(". ")[:3]), "" if on_cpu else ", or --device cpu"
        raise SystemExit(f"{script}: {reason}: take a smaller model or fewer tokens at once{other}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
