"""The flags of every script, a function for each: its command line (None: that of the process) -> its options.

Each raises ValueError for a flag that is unknown, out of its range, or made meaningless by another.
"""

import importlib
import os
import signal
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import cli
from cli import PRECISIONS, SPARSITY, Parser, at_least, number, output_folder, output_path

TEMPERATURE, CHAT_TEMPERATURE = 0.8, 0.3
TASKS = ("perplexity", "wikitext", "generation")  # of eval.py itself; all others are lm-eval's
GENERATION = {"context": 64, "window": 128, "num_windows": 200}  # defaults of that task
QUALITY_RULES = ("dense", "uniform", "greedy", "refined", "norms", "cats", "relu", "up-input", "up-output")
GATED = ("cats", "up-output")  # of them, those with thresholds of gates, which are calibrated on a text
MAX_BATCH = 1024  # rows
MAX_DRAFTS = 7  # guesses per round: a step has 8 rows
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")  # that finetune.py tunes
CACHE, PROMPT = 512, 5  # positions of benchmarks.cpu_decode's cache, and its prompt
SWEEP = (0.0, 0.25, 0.4, 0.5, 0.65)
RANKED = ("generate", "eval", "benchmarks.decode")  # scripts that torchrun may start


def run_script(script: str) -> None:
    """Runs a script ("generate", "benchmarks.decode"), as the first statement of its file. Never returns."""
    # Flags are read before modules, which take seconds to import; Ctrl-C meanwhile ends the process without a word.
    # The rest of the file is not run as __main__, but imported under the script's own name.

    def main() -> None:
        if cli.rank_count() > 1 and script not in RANKED:
            raise ValueError("this script runs as one process: start it with python, not with torchrun")
        globals()[script.rpartition(".")[2]]()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        module = importlib.import_module(script)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        module.main()

    # torch's threads sleep 0.1 ms after a product instead of spinning for milliseconds beside other work
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    cli.command_line(main)
    raise SystemExit


def _parser(script: str, **options) -> tuple[Parser, Callable]:
    parser = Parser(script, **options)
    return parser, parser.add_argument


def generate(argv: list[str] | None = None) -> Namespace:
    parser, add = _parser("generate")
    # what is generated
    add("--prompt", help="a text; a number N: N random tokens (' 2024' is a text) (default: a question)")
    add("--prompts", type=Path, metavar="FILE", help="a prompt per line, each a row of the batch (default: --prompt)")
    add("--interactive", action="store_true", help="chat")
    add("--num_samples", action=at_least(1), default=5, help="how often to generate and time, with the same draws")
    add("--max_new_tokens", action=at_least(1), default=200, help="new tokens per sample, in a chat per answer")
    batch = number(int, lambda n: 1 <= n <= MAX_BATCH, f"is outside 1 to {MAX_BATCH}")
    add("--batch_size", action=batch, default=1, help="rows of the batch; up to 8 are fused; each cuts its own inputs")
    add("--top_k", action=at_least(1), default=200, help="draw from that many likeliest tokens")
    temperature = number(float, lambda t: t >= 0, "must be at least 0")
    add("--temperature", action=temperature, help=f"0 is greedy (default: {TEMPERATURE}, in a chat {CHAT_TEMPERATURE})")
    add("--seed", action=at_least(0), default=1234, help="of draws (row r: seed + r), random prompts and weights")

    # by which model, in which form
    add("--random_init", metavar="NAME", help="named config, e.g. llama-3-8b, random weights (default: a checkpoint)")
    cli.add_sparsity_arguments(parser)
    cli.add_device_arguments(parser)
    threads = number(int, lambda n: 1 <= n <= 1024, "is outside 1 to 1024")
    add("--threads", action=threads, metavar="N", help="use this number of CPU threads (default: as many as pay)")
    add("--compile", action="store_true", help="fuse the decode steps: CUDA graphs on a GPU, C++ on a CPU")
    add("--unfused", action="store_true", help="with --compile: use torch.compile instead of fused steps")
    add("--compile_prefill", action="store_true", help="use torch.compile for the prompt's pass, too")
    add("--reduce", choices=("peer", "nccl"), default="peer", help="how GPUs add up: in common memory, or by NCCL")
    cli.refuse_old_flag(parser, "--deterministic", "the only way that it runs; leave it out")

    # guessed ahead
    add("--draft", metavar="{self,prompt,PATH}", help="guess by the cut model, the text so far, or PATH (default: off)")
    add("--draft_sparsity", action=cli.SPARSITY, default=0.5, help="sparsity of the model that guesses")
    drafts = number(int, lambda k: 1 <= k <= MAX_DRAFTS, f"is outside 1 to {MAX_DRAFTS}")
    add("--speculate_k", action=drafts, metavar="K", help="guesses per round (default: as many as pay)")

    # what is measured
    add("--compare_dense", action=BooleanOptionalAction, help="time the dense model, too (default: briefly, if fused)")
    add("--profile", type=output_path, metavar="FILE", help="write a Chrome trace of one generation (default: none)")
    o = parser.parse_args(argv)

    # options that go together
    if o.temperature is None:
        o.temperature = CHAT_TEMPERATURE if o.interactive else TEMPERATURE
    if o.random_init and (o.checkpoint_path or o.interactive):
        raise ValueError("--random_init takes neither --checkpoint_path nor --interactive: its weights are random")
    parser.refuse(o.prompts is not None, "prompt batch_size interactive", "with --prompts")
    parser.refuse(o.interactive, "prompt num_samples batch_size compare_dense profile json", "with --interactive")
    parser.refuse(o.random_init is not None, "statistics", "with --random_init")
    model_drafts = o.draft not in (None, "prompt")
    parser.refuse("sparsity" not in parser.given and not model_drafts, "thresholds statistics", "without --sparsity")
    ranks = cli.rank_count()
    parser.refuse(ranks == 1, "reduce", "without torchrun")
    parser.refuse(ranks > 1, "interactive unfused draft compile_prefill", "with torchrun")
    if ranks > 1 and not o.compile:
        raise ValueError("torchrun needs --compile: only fused steps are split over ranks")
    parser.refuse(not o.compile, "unfused draft", "without --compile")
    parser.refuse(o.draft is None, "draft_sparsity speculate_k", "without --draft")
    parser.refuse(o.draft == "prompt", "draft_sparsity", "with --draft prompt")
    parser.refuse(o.draft is not None, "prompts unfused" + " batch_size" * (o.batch_size > 1), "with --draft")
    if o.draft == "self" and not o.draft_sparsity:
        raise ValueError("--draft self needs a --draft_sparsity above 0: at 0 it is the model itself")
    if o.draft and o.precision == "float32":
        raise ValueError("--draft needs --precision bfloat16 or float16: float32 sums depend on the number of guesses")
    return o


def calibrate(argv: list[str] | None = None) -> Namespace:
    parser, add = _parser("calibrate")
    cli.add_text_arguments(parser, 20480)
    cli.add_output_argument(parser, "calibration.safetensors")
    add("--plot", type=output_path, metavar="PNG", help="draw the distributions (default: not drawn)")
    add("--teal_histograms", type=Path, metavar="DIR", help="read TEAL's published folder (default: take statistics)")
    o = cli.parse_text_arguments(parser, argv)

    useless = "checkpoint_path data num_tokens seed device precision plot"
    parser.refuse(o.teal_histograms is not None, useless, "with --teal_histograms")
    if o.teal_histograms is not None and o.output is None:
        raise ValueError("--teal_histograms needs --output")
    if o.plot is not None and find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    return o


def greedy(argv: list[str] | None = None) -> Namespace:
    parser, add = _parser("greedy")
    cli.add_text_arguments(parser, 4096)
    cli.add_statistics_argument(parser)
    step = number(float, lambda f: 0.001 <= f < 1, "is outside [0.001, 1); 0.1 is TEAL's")
    add("--step", action=step, default=0.1, help="by which q's sparsity rises in a round; 0.1 is TEAL's")
    cli.add_output_argument(parser, "thresholds_greedy.safetensors")
    cli.refuse_old_flag(parser, "--method", "a script: greedy.py makes TEAL's thresholds, refine.py refined ones")
    return cli.parse_text_arguments(parser, argv)


def refine(argv: list[str] | None = None) -> Namespace:
    parser, add = _parser("refine")
    cli.add_text_arguments(parser, 262144)
    add("--statistics", type=Path, metavar="FILE", help="ignored: thresholds come from gradients (default: none)")
    add("--updates", action=at_least(0), default=32, help="gradient steps per level of sparsity")
    cli.add_output_argument(parser, "thresholds_refined.safetensors")
    return cli.parse_text_arguments(parser, argv)


def quantize(argv: list[str] | None = None) -> Namespace:
    parser, add = _parser("quantize")
    cli.add_text_arguments(parser, 20480, least=0)
    add("--mode", choices=["packed", "int8", "int4"], required=True, help="form of the new weights (no default)")
    add("--groupsize", type=int, default=64, help="int4: how many outputs share a scale and a minimum")
    add("--output_dir", type=output_folder, metavar="DIR", help="folder to write (default: DIR-packed, -int8 or -int4)")
    o = cli.parse_text_arguments(parser, argv)
    parser.refuse(o.num_tokens == 0, "data seed", "with --num_tokens 0")
    parser.refuse(o.mode != "int4", "groupsize", f"with --mode {o.mode}")
    parser.refuse(o.mode == "packed", "data num_tokens seed precision", "with --mode packed, which rounds nothing")
    return o


def finetune(argv: list[str] | None = None) -> Namespace:
    parser, add = _parser("finetune")
    cli.add_text_arguments(parser, 1 << 20)
    add("--own_tokens", action=at_least(0), default=0, help="further tokens, which the dense model writes")
    add("--sparsity", action=SPARSITY, nargs="+", default=[0.5], help="each window of a batch is cut at one of them")
    add("--thresholds", default="best", help="best, uniform, greedy, refined or a cut table's file")
    add("--targets", nargs="+", choices=PROJECTIONS, default=list(PROJECTIONS), help="projections to tune")
    losses = "next tokens of the text, or KL divergence from the dense model"
    add("--loss", choices=("next_token", "kl"), default="next_token", help=losses)
    add("--rank", action=at_least(1), default=32, help="rank of A B, which is added to a weight")
    positive = number(float, lambda f: 0 < f < float("inf"), "must be above 0")
    add("--alpha", action=positive, default=64.0, help="A B is multiplied by alpha / rank")
    add("--learning_rate", action=positive, default=2e-4, help="its largest value")
    add("--epochs", action=positive, default=1.0, help="how often to train on each window")
    add("--batch_size", action=at_least(1), default=16, help="windows per step")
    add("--context", action=at_least(2), default=1024, help="tokens of a window")
    add("--compile", action="store_true", help="use torch.compile for the blocks and the loss")
    add("--output_dir", type=output_folder, metavar="DIR", help="folder to write (default: DIR-tuned)")
    return parser.parse_args(argv)


def convert_hf_checkpoint(argv: list[str] | None = None) -> Namespace:
    parser, add = _parser("convert_hf_checkpoint")
    source = parser.add_mutually_exclusive_group(required=True).add_argument
    source("--repo_id", help="a repository of the Hugging Face hub, ORG/NAME (no default)")
    source("--checkpoint_dir", type=Path, metavar="DIR", help="folder of config.json, weights, tokenizer (no default)")
    source("--gguf", type=Path, metavar="FILE", help="a GGUF file (no default)")
    add("--output_dir", type=output_folder, metavar="DIR", help="folder to write (default: checkpoints/<org>/<name>)")
    return parser.parse_args(argv)


def eval(argv: list[str] | None = None) -> Namespace:
    parser, add = _parser("eval")
    cli.add_sparsity_arguments(parser)
    cli.add_device_arguments(parser)
    add("--tasks", default="perplexity", help=f"{', '.join(TASKS)}; or lm-eval's tasks, names or files, as a,b")
    add("--data", type=Path, metavar="FILE", help="text file, or the .jsonl of a task file (default: the task's own)")
    add_protocol_arguments(parser)
    add("--num_fewshot", action=at_least(0), help="examples before each question (default: as in the paper)")
    add("--limit", action=at_least(1), help="documents per task (default: all)")
    add("--batch_size", action=at_least(1), default=8, help="requests of a task per pass")
    add("--judge", type=Path, help="dense checkpoint that judges what --tasks generation writes (default: same)")
    add("--confirm_run_unsafe_code", action="store_true", help="let tasks such as humaneval run what the model writes")
    o = parser.parse_args(argv)

    # options that go together
    if o.tasks == "generation":
        vars(o).update({name: value for name, value in GENERATION.items() if name not in parser.given})
    parser.refuse(o.tasks == "generation", "sparse_fraction", "with --tasks generation, whose prompts are dense")
    parser.refuse(o.tasks != "generation", "judge", "without --tasks generation")
    parser.refuse("sparsity" not in parser.given, "thresholds statistics sparse_fraction", "without --sparsity")
    of_harness, where = "num_fewshot limit batch_size confirm_run_unsafe_code", f"with --tasks {o.tasks[:100]}"
    parser.refuse(o.tasks in TASKS, of_harness, where)
    parser.refuse(o.tasks not in TASKS, "context window num_windows", where)

    # tasks of the harness
    named = [] if o.tasks in TASKS else o.tasks.split(",")
    if mixed := [name for name in named if name in TASKS]:
        raise ValueError(f"--tasks {o.tasks[:100]}: {mixed[0]} is a run of its own; leave out the others")
    if o.data is not None and not all(name.endswith((".yaml", ".yml")) for name in named):
        raise ValueError(f"--data is for perplexity and task files; {o.tasks[:100]} has data of its own")
    return o


def add_protocol_arguments(parser: ArgumentParser) -> None:
    share, add = number(float, lambda f: 0 < f <= 1, "is outside (0, 1]"), parser.add_argument
    add("--sparse_fraction", action=share, default=0.99, help="share of each window, at its end, that is cut")
    add("--context", action=at_least(1), default=2048, help="first tokens of each window, which are not scored")
    add("--window", action=at_least(1), default=512, help="last tokens of each window, which are scored")
    add("--num_windows", action=at_least(1), default=128, help="how many windows, spread over the text")


def decode(argv: list[str] | None = None) -> tuple[Namespace, list[str]]:
    """The options of the sweep, and the flags that go to generate.py."""
    parser, add = _parser("benchmarks.decode", allow_abbrev=False)
    add("--random_init", nargs="+", default=[], metavar="NAME", help="named configs, random weights (default: none)")
    add("--checkpoint_path", nargs="+", default=[], help="folders, or files in them (default: the default model)")
    add_sparsities(parser, SWEEP)
    o, flags = parser.parse_known_args(argv)
    if generate(["--compile", *flags, "--sparsity", "0"]).prompts:  # raises for a flag that it does not know
        raise ValueError("--prompts has no effect in a sweep, whose prompts have one length; give --batch_size")
    return o, flags


def add_sparsities(parser: ArgumentParser, default: tuple[float, ...]) -> None:
    parser.add_argument("--sparsities", action=SPARSITY, nargs="+", default=list(default), help="sparsities to measure")


def cpu_decode(argv: list[str] | None = None) -> Namespace:
    parser, add = _parser("benchmarks.cpu_decode")
    cli.add_checkpoint_argument(parser)
    add("--random_init", metavar="NAME", help="a named config, random weights (default: weights of a checkpoint)")
    add("--gguf", metavar="FILE", help="the model for llama.cpp, in BF16 (default: none)")
    add("--llama_python", default="python", metavar="PYTHON", help="one that has llama-cpp-python")
    add_sparsities(parser, (0.5, 0.65))
    steps = number(int, lambda n: 1 <= n <= CACHE - PROMPT, f"is outside 1 to {CACHE - PROMPT}")
    add("--steps", action=steps, default=60, help="tokens of each measurement")
    add("--rounds", action=at_least(2), default=7, help="rounds, after one that warms up")
    add("--precision", choices=PRECISIONS, default="bfloat16", help="dtype of weights and activations")
    o = parser.parse_args(argv)
    parser.refuse(o.random_init is not None, "checkpoint_path", "with --random_init")
    parser.refuse(o.gguf is None, "llama_python", "without --gguf")
    return o


def gemv(argv: list[str] | None = None) -> Namespace:
    parser, add = _parser("benchmarks.gemv")
    add("--models", nargs="+", default=["llama-3-8b"], metavar="NAME", help="named configs whose shapes to measure")
    add_sparsities(parser, (*SWEEP, 0.8, 0.95))
    add("--dtype", choices=["bfloat16", "float16", "int8", "int4"], default="bfloat16", help="how weights are stored")
    return parser.parse_args(argv)


def plot(argv: list[str] | None = None) -> Namespace:
    o = Parser("benchmarks.plot").parse_args(argv)
    if find_spec("matplotlib") is None:
        raise ValueError("the plots need matplotlib: pip install matplotlib")
    return o


def paper(argv: list[str] | None = None) -> Namespace:
    parser, add = _parser("benchmarks.paper")
    add("action", choices=("typos", "estimate", "report"), help="(no default)")
    add("paths", nargs="+", help="see above (no default)")
    cli.add_device_arguments(parser)
    o = parser.parse_args(argv)
    if o.action == "report" and find_spec("matplotlib") is None:
        raise ValueError("the report needs matplotlib: pip install matplotlib; results stay, so call it again")
    return o


def quality(argv: list[str] | None = None) -> Namespace:
    parser, add = _parser("benchmarks.quality")
    cli.add_checkpoint_argument(parser)
    cli.add_statistics_argument(parser)
    add("--calibration", nargs="+", metavar="FILE", help="cats' text, as calibrate.py's --data (default: written)")
    add("--data", type=Path, metavar="FILE", help="text file to read (no default)")
    add("--text", choices=("wikitext", "c4", "alpaca", "code"), default="wikitext", help="what the text is")
    add("--rules", nargs="+", choices=QUALITY_RULES, default=QUALITY_RULES, help="rules to measure")
    add_sparsities(parser, SWEEP[1:])
    add_protocol_arguments(parser)
    cli.add_device_arguments(parser)
    parser.set_defaults(precision="float32")
    o = parser.parse_args(argv)
    parser.refuse(not set(o.rules) & set(GATED), "calibration", f"without one of the rules {', '.join(GATED)}")
    return o
