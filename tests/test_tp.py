"""Ranks: a model shared by processes of this CPU equals one process to the bit; plans of shards; ends without a hang.

python tests/test_tp.py 3    # the default model's own weights, 200 tokens, 1 rank against 3
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import SWITCHES, build_cut

import tp
from cli import one_voice
from decoder import FusedCpuStep
from kernels import cpu
from kernels.plan import BLOCK_IN, plan_for
from kernels.quantized import Form
from model import ModelArgs
from sparse_model import SparseTransformer
from thresholds import Cuts

SHAPE = {"block_size": 128, "vocab_size": 301, "n_layer": 2, "n_head": 8, "n_local_heads": 4, "dim": 64}
SHAPE |= {"intermediate_size": 320, "head_dim": 16}
FORMS = {
    "bfloat16": {},
    "float16, tied": {"dtype": torch.float16, "tie_embeddings": True},
    "int8": {"quant": "int8", "intermediate_size": 448},
    "int4, shifted": {"quant": "int4", "groupsize": 16, "shifted": True, "intermediate_size": 448},
    "switches, shifted": SWITCHES | {"shifted": True, "sliding_window": 5},
}
KV_HEADS = {2: 2, 3: 3, 4: 2}  # of 4 ranks two have the same
ROWS = {2: (1, 3), 3: (1,), 4: (1,)}
STEPS = 8


def split(whole: SparseTransformer) -> tp.RankTransformer:
    """This rank's part of a model, with its cuts."""
    state = {
        name: tensor.transpose(0, 1) if tensor.dim() > 1 and "layers." in name else tensor
        for name, tensor in whole.state_dict().items()
        if not name.endswith(("threshold", "shift", "offset"))
    }
    part = tp.RankTransformer(whole.config, whole.device, whole.dtype).requires_grad_(False).eval()
    part.load_state_dict(state)
    part.set_cuts(Cuts(0.5, [m.threshold for m in whole.sites], [m.shift for m in whole.sites]))
    return part


def run(step, rows: int, steps: int, replay: str = "replay", vocab: int = 0) -> tuple[torch.Tensor, ...]:
    """Logits, tokens, and of a GPU's step each group's largest, from empty caches, at positions that differ by row."""
    step.start(torch.arange(5, 5 + rows), list(range(0, 3 * rows, 3)), list(range(rows)))
    logits = []
    for _ in range(steps):
        getattr(step, replay)()
        logits.append(step.logits[:, : vocab or None].clone())
    return torch.stack(logits), step.tokens.clone(), getattr(step, "top", step.tokens).clone()


def equal(one: SparseTransformer, part: tp.RankTransformer, kinds: tuple, rows: int, steps=STEPS, **options) -> bool:
    """Whether the steps of these two kinds have the same bits."""
    results = []
    for model, kind in zip((one, part), kinds, strict=True):
        model.setup_caches(rows, 64)
        step, by = kind(model, 0.8, 20, options.get("dense", False)), options.get("by", "replay")
        results.append(run(step, rows, steps, by, one.config.vocab_size))
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def join(r: int, ranks: int, port: int) -> None:
    """Joins `ranks` ranks, as torchrun would have it."""
    os.environ |= {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    tp.start("cpu")


def compare(ranks: int) -> dict[str, bool]:
    """Whether ranks equal one, by case."""
    found, kinds = {}, (FusedCpuStep, tp.RankCpuStep)
    heads = {"n_local_heads": KV_HEADS[ranks]} | ({"n_head": 6} if ranks == 3 else {})
    for name, form in list(FORMS.items())[2 * (ranks == 4) :]:
        one = build_cut(SHAPE | heads, **{"dtype": torch.bfloat16} | form)
        part = split(one)
        for rows in ROWS[ranks]:
            for dense in (False, True):
                found[f"{name}, {rows} rows, dense {dense}"] = equal(one, part, kinds, rows, dense=dense)
        whole = zip(one.layers[1].named_parameters(), part.whole_block(1).named_parameters(), strict=True)
        found[f"{name}, gathered"] = all(torch.equal(a, b) for (_, a), (_, b) in whole)
    tokens = torch.arange(20)[None]
    found["a pass"] = torch.allclose(one(tokens).float(), part(tokens).float(), atol=0.1, rtol=0.05)
    return found


def peer_memory_of_a_cpu(words: int, _device) -> tuple:
    """What `tp.peer_memory` gives of a GPU."""
    memory = tp.common_memory(8 * words * tp.count())
    return torch.tensor([memory.data_ptr() + 8 * words * r for r in range(tp.count())]), memory


def interpreted() -> dict[str, bool]:
    """The same of a GPU's step, whose ranks write into each other's memory, or add by all-reduce."""
    import lanes

    from decoder import FusedGpuStep

    lanes.install()
    shape = SHAPE | {"n_layer": 1, "vocab_size": 130, "intermediate_size": 128}
    one = build_cut(shape, dtype=torch.bfloat16)
    part, found, tp.peer_memory = split(one), {}, peer_memory_of_a_cpu
    for tp.reduction, steps in (("peer", 2), ("nccl", 1)):
        found[f"a GPU's step, {tp.reduction}"] = equal(one, part, (FusedGpuStep, tp.RankGpuStep), 1, steps, by="step")
    return found


def work(r: int, ports: list[int], output: str) -> None:
    """One of four processes: what each test asks for, written to `output`; at the end rank 1 of 2 is killed."""
    torch.set_num_threads(1)
    found = {}
    for ranks, port in zip((2, 3, 4, 2), ports, strict=True):
        if r >= ranks:
            continue
        join(r, ranks, port)
        if port != ports[-1]:
            found[ranks] = compare(ranks) | (interpreted() if ranks == 2 else {})
            dist.barrier()
            dist.destroy_process_group()

    # a rank that is killed ends the other's step
    if r < 2:
        part = split(build_cut(SHAPE, dtype=torch.bfloat16))
        part.setup_caches(1, 128)
        step, start = tp.RankCpuStep(part, 0.8, 20), time.perf_counter()
        try:
            for _ in range(9):
                run(step, 1, 10)
                if r == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
        except ValueError as error:
            found["killed"] = f"{error} after {time.perf_counter() - start < 10}"
    if r == 0:
        Path(output).write_text(json.dumps(found))


def free_ports(n: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What four processes found."""
    if cpu.library() is None:
        pytest.skip("needs a C++ compiler")
    output = tmp_path_factory.mktemp("ranks") / "found.json"
    context = mp.start_processes(work, (free_ports(4), str(output)), 4, join=False, start_method="spawn")
    try:
        deadline = time.monotonic() + 100
        while any(process.is_alive() for process in context.processes):
            codes = [process.exitcode for process in context.processes]
            assert set(codes) <= {None, 0, -signal.SIGKILL} and time.monotonic() < deadline, codes
            time.sleep(0.1)
    finally:
        for process in context.processes:
            process.kill()
    assert [process.exitcode for process in context.processes] == [0, -signal.SIGKILL, 0, 0]
    return json.loads(output.read_text())


@pytest.mark.parametrize("ranks", ["2", "3", "4"])
def test_ranks_equal_one_to_the_bit(found, ranks):
    wrong = [case for case, right in found[ranks].items() if not right]
    assert len(found[ranks]) > 9 and not wrong


def test_a_killed_rank_ends_the_others(found):
    assert found["killed"] == "another rank has ended after True"


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
@pytest.mark.parametrize(("name", "counts"), [("llama-3-8b", (2, 4, 8)), ("llama-3-70b", (2, 4, 8)), ("phi-4", (2,))])
def test_parts_make_up_the_whole_and_split_no_sum(name, counts, quant):
    config = ModelArgs.from_name(name + ("" if quant == "none" else f"-{quant}"))
    form = Form.named(quant, torch.bfloat16, 64)
    for ranks in counts:
        parts = [tp.part_of(config, r, ranks) for r in range(ranks)]
        for projection, n in {"q": config.n_head * config.head_dim, "down": config.intermediate_size}.items():
            ends = [end for part in parts for end in part.spans[projection]]
            assert ends[0] == 0 and ends[-1] == n and ends[1:-1:2] == ends[2:-1:2]
        assert [part.tokens.stop for part in parts[:-1]] == [part.tokens.start for part in parts[1:]]
        for sparsity in (0.0, 0.5, 0.65):
            for prologue, n, key in (("given", config.dim, "o"), ("silu", config.intermediate_size, "down")):
                plan = plan_for(prologue, n, [config.dim], sparsity, form, True)
                assert all(part.spans[key][0] % (BLOCK_IN * plan.blocks) == 0 for part in parts)


def test_uneven_parts_and_repeated_heads():
    config = ModelArgs.from_name("llama-2-7b")  # 172 units of 64
    assert tp.edges(11008, 64, 8) == [0, 1344, 2752, 4096, 5504, 6848, 8256, 9600, 11008]
    assert [tp.part_of(config, r, 8).config.intermediate_size for r in (0, 1)] == [1344, 1408]
    config = ModelArgs(n_head=8, n_local_heads=2, dim=512, intermediate_size=512)
    assert [tp.part_of(config, r, 4).spans["k"] for r in range(4)] == [(0, 64), (0, 64), (64, 128), (64, 128)]


@pytest.mark.parametrize(
    ("name", "ranks", "says"),
    [
        ("qwen2.5-0.5b", 4, "qwen2.5-0.5b has 14 heads, 2 key/value heads: 4 ranks cannot share them"),
        ("qwen2.5-0.5b", 8, "14 heads"),
        ("qwen2.5-0.5b", 7, "2 key/value heads"),
        ("olmo-2-7b", 2, "a norm over all heads"),
    ],
)
def test_numbers_that_do_not_fit(name, ranks, says):
    with pytest.raises(ValueError, match=says):
        tp.part_of(ModelArgs.from_name(name), 0, ranks)
    assert tp.part_of(ModelArgs.from_name("qwen2.5-0.5b"), 1, 2).config.n_head == 7


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_speaks(rank, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr("signal.alarm", lambda _: None)
    streams = sys.stdout, sys.stderr
    try:
        with pytest.raises(ValueError, match="another rank has ended: gloo"), one_voice():
            print("out")
            raise RuntimeError("gloo: peer is gone")
        print("after", file=sys.stderr)
    finally:
        sys.stdout, sys.stderr = streams
    assert capsys.readouterr() == (("out\n", "after\n") if rank == 0 else ("", ""))


def test_torchrun(tmp_path):
    """A run prints one report and one JSON line; a script that is not split says so in one line."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    options = ["--random_init", "stories15M", "--compile", "--num_samples", "1", "--max_new_tokens", "3", "--json"]
    root, ports = Path(tp.__file__).parent, free_ports(1)
    done = subprocess.run(
        [*command, str(ports[0]), "generate.py", *options, "--device", "cpu"], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ranks"] == 2 and done.stdout.count("Speed") == 1


def real_weights(r: int, ranks: int, port: int, report: Callable = print) -> None:
    """The default model at 50 %: 200 tokens from an empty cache, of one rank and of this many."""
    from formats.default_model import resolve_checkpoint
    from thresholds import cuts_for

    torch.set_num_threads(1)
    join(r, ranks, port)
    folder, found = resolve_checkpoint(None), []
    _, cuts = cuts_for("best", 0.5, folder, lambda: None)
    for cls, kind in ((SparseTransformer, FusedCpuStep), (tp.RankTransformer, tp.RankCpuStep)):
        model = cls.from_checkpoint(folder)
        model.set_cuts(cuts)
        model.setup_caches(1, 210)
        for dense in (True, False):
            step, start = kind(model, 0.8, 200, dense), time.perf_counter()
            step.start(torch.tensor([1]), [0], [1234])
            logits = []
            for _ in range(200):
                step.replay()
                logits.append(step.logits.clone())
            ms = 5 * (time.perf_counter() - start)
            found.append((torch.cat(logits), step.tokens[0, :201].clone(), ms))
    for name, one, many in zip(("dense", "50 %"), found[:2], found[2:], strict=True):
        same = torch.equal(one[0], many[0]) and torch.equal(one[1], many[1])
        if r == 0:
            words = "equal" if same else "DIFFER"
            report(f"{name}: 200 tokens and their logits {words}; {one[2]:.1f} and {many[2]:.1f} ms a step")


if __name__ == "__main__":
    mp.spawn(real_weights, (int(sys.argv[1]), free_ports(1)[0]), int(sys.argv[1]))
