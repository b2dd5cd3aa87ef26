"""The fused decode step, launch by launch in Triton's interpreter (on a GPU: for real), against the plain model."""

import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from threading import Thread

import pytest
import torch
from models import FUSED, SWITCHES, build_cut, caches, random_tokens

from decoder import FUSED_FIELDS, MAX_ROWS, MAX_TOP_K, FusedGpuStep, fusable, unknown_parts, why_unfused
from kernels import cpu
from model import ModelArgs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
build = partial(build_cut, device=DEVICE)
MODELS = {
    "grouped heads": {},
    "window": {"sliding_window": 5},
    "biases, one head a group": {"qkv_bias": True, "n_local_heads": 4},
    "shifted": {"shifted": True},
    "shifted, large tiles": {"shifted": True, "resident": 1},
    "int8, shifted": {"quant": "int8", "shifted": True},
    "int8, large tiles": {"quant": "int8", "resident": 1},
    "int4, large tiles": {"quant": "int4", "groupsize": 16, "intermediate_size": 176, "resident": 1, "prompt": 60},
    "int4, shifted": {"quant": "int4", "groupsize": 16, "intermediate_size": 176, "shifted": True},
    "no power of two, tied": {"dim": 48, "head_dim": 24, "tie_embeddings": True},
    "three heads a group, one chunk": {"n_head": 6, "dim": 48, "head_dim": 8, "prompt": 20, "cache": 30},
    "three blocks of inputs a program": {"dim": 160, "head_dim": 16, "resident": 2},
    "switches": SWITCHES,
    "switches, int8, shifted": SWITCHES | {"quant": "int8", "shifted": True, "activation": "gelu_tanh"},
    "whole chunks outside the window": {"sliding_window": 70, "prompt": 200, "cache": 256},
}
# widths that tiles divide, so that rows are prefetched on Hopper; gate and up in the widest products' tiles, some of
# their rows prefetched during attention; qkv in three blocks of inputs
WIDE = {
    "dim": 512,
    "n_head": 8,
    "n_local_heads": 8,
    "intermediate_size": 5120,
    "std": 0.05,
    "by_channel": True,
    "resident": 80,
    "large": 1,
}
WIDE_MODELS = {
    "wide": WIDE,
    "wide, shifted": WIDE | {"shifted": True},
    "wide, switches": WIDE | SWITCHES,
    "small tiles prefetched, shifted": WIDE | {"shifted": True, "resident": 2112},
    "wide, int8": WIDE | {"quant": "int8", "shifted": True},
    "wide, int4": WIDE | {"quant": "int4", "groupsize": 64, "shifted": True},
    "wide, int4, tiles that do not divide gate": WIDE | {"quant": "int4", "groupsize": 64, "intermediate_size": 4224},
}


@pytest.mark.parametrize(
    ("name", "sparsity"),
    [(name, sparsity) for name in MODELS for sparsity in ((0.5,) if "shifted" in name else (0.0, 0.5))]
    + [pytest.param(name, sparsity, marks=pytest.mark.gpu) for name in WIDE_MODELS for sparsity in (0.0, 0.5, 0.7)],
)
def test_fused_steps_equal_plain_ones(name, sparsity, monkeypatch):
    """Sparsity 0 is dense, without shifts; 0.5 and 0.7 choose other tiles for the same thresholds."""
    constants = {"resident": 2112, "large": 1 << 26}
    options = {"prompt": 62, "cache": 140} | constants  # the steps cross from one chunk to the next
    options |= (MODELS | WIDE_MODELS)[name]
    prompt, cache, steps = options.pop("prompt"), options.pop("cache"), 4
    for constant in constants:
        monkeypatch.setattr(f"kernels.plan.{constant.upper()}", options.pop(constant))
    model = build(**options)
    if model.config.quant != "none" and DEVICE == "cpu":
        steps = 1  # of integers the interpreter makes long work
    model.setup_caches(1, cache)
    # the x of integers has 16 bits
    tolerance = 1e-4 if model.config.quant == "none" else 6e-3
    model(random_tokens(1, prompt, 101).to(DEVICE), torch.arange(prompt, device=DEVICE))
    before = [tensor.clone() for tensor in caches(model)]

    token, logits, tokens = torch.tensor([[3]], device=DEVICE), [], []
    for position in range(prompt, prompt + steps):
        out = model(token, torch.tensor([position], device=DEVICE), dense_prefix=None if sparsity else 1)
        token = out[:, -1].argmax(-1, keepdim=True)
        logits.append(out[0, -1])
        tokens.append(token.item())
    after = [tensor.clone() for tensor in caches(model)]
    for tensor, old in zip(caches(model), before, strict=True):
        tensor.copy_(old)

    model.sparsity = sparsity
    decoder = FusedGpuStep(model, temperature=0.0, top_k=1)
    decoder.start(torch.tensor([3], device=DEVICE), [prompt], [0])
    for expected in logits:
        decoder.step()
        torch.testing.assert_close(decoder.logits[0, :101], expected, rtol=1e-4, atol=tolerance)
    assert decoder.tokens[0, prompt : prompt + steps + 1].tolist() == [3, *tokens]
    assert decoder.position.item() == prompt + steps
    assert not decoder.chunks.arrived.any() and decoder.chunks.tag is None
    for fused, plain in zip(caches(model), after, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("options", [{"qkv_bias": True}, SWITCHES], ids=["", "switches"])
def test_a_step_of_16_bits_rounds_as_the_plain_one(options):
    """bfloat16 on a GPU, float16 in the interpreter, which knows no other; inputs are cut whatever they are."""
    dtype, rtol = (torch.bfloat16, 3e-2) if DEVICE == "cuda" else (torch.float16, 3e-3)
    model = build(dtype=dtype, by_channel=True, intermediate_size=176, **options)
    model.setup_caches(1, 80)
    model(random_tokens(1, 63, 101).to(DEVICE), torch.arange(63, device=DEVICE))
    expected = model(torch.tensor([[3]], device=DEVICE), torch.tensor([63], device=DEVICE))[0, -1].float()
    step = FusedGpuStep(model, temperature=0.0, top_k=1)
    step.start(torch.tensor([3], device=DEVICE), [63], [0])
    step.step()
    assert (step.logits[0, :101] - expected).norm() <= rtol * expected.norm()
    assert step.chunks.tag.item() == 2 and (step.y >> 16 == 1).all()  # the step's number, in each word that o awaits
    step.step()
    assert step.chunks.tag.item() == 3 and (step.y >> 16 == 2).all()


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("cut", [0.0, 0.5])
@pytest.mark.parametrize("form", ["none", "packed", "int8", "int4"])
def test_o_waits_until_all_its_inputs_are_of_this_step(form, cut, blocks, monkeypatch):
    """Its launch runs beside those who replace the inputs of the step before: the last ones at the end."""
    from test_integers import case
    from test_packed import packed_of

    from kernels.products import launch_product

    monkeypatch.setattr("kernels.plan.RESIDENT", 2112 if blocks == 1 else 2)
    x, product = case(192, [128], cut, 2, groupsize=64 if form == "int4" else 0)
    if form in ("none", "packed"):
        weight = product.weight.bfloat16() * 0.01  # so that sums lie on their grid, and in any order are the same
        stored, table = (weight, None) if form == "none" else packed_of(weight, [128])
        product = product._replace(weight=stored, weight_scale=table)
    assert product.plan("given", False).blocks == blocks
    out, expected, compiled = torch.zeros(3, 1, 128, device=DEVICE)
    launch_product("given", x[1:], product, expected, dtype=x.dtype)
    old, new = (row.view(torch.int16).int() & 0xFFFF | step << 16 for row, step in zip(x, (6, 7), strict=True))
    y, tag = old.clone()[None], torch.tensor([7], dtype=torch.int32, device=DEVICE)
    launch_product("given", new[None], product, compiled, dtype=x.dtype, tag=tag)

    def launch() -> None:
        with torch.cuda.stream(torch.cuda.Stream()) if DEVICE == "cuda" else nullcontext():
            launch_product("given", y, product, out, dtype=x.dtype, tag=tag)
            if DEVICE == "cuda":
                torch.cuda.current_stream().synchronize()

    running = Thread(target=launch, daemon=True)  # one that waits for ever ends with the tests
    running.start()
    for part in (slice(0, 164), slice(164, 192)):  # in the end one block is old
        running.join(0.5)
        assert running.is_alive()
        y[0, part] = new[part]
    running.join(60)
    assert expected.any() and torch.equal(compiled, expected) and torch.equal(out, expected)


@pytest.mark.skipif(DEVICE == "cuda", reason="what the interpreter prefetches can be seen")
@pytest.mark.parametrize(
    ("crowded", "sparsity", "shifted"),
    [(False, 0.0, False), (False, 0.5, False), (False, 0.5, True), (True, 0.0, False)],
)
def test_attention_prefetches_the_rows_of_gate_and_up_that_h_keeps(crowded, sparsity, shifted, monkeypatch):
    """By h as it is then and its norm's last rstd, once each: 12 pieces beside 8 heads; none beside many keys.

    160 inputs make two groups of 128 rows, the second one short, and 4,128 bytes three pieces, the last one short.
    """
    import triton.language as tl

    from kernels import fused_step, plan

    fetched, expected, attend = [], [], fused_step.launch_attention

    def prefetch(rows_ptr, wanted, n_bytes):
        at = [address for address, want in zip(rows_ptr.handle.data, wanted.handle.data, strict=True) if want]
        fetched.extend((int(address), int(n_bytes.handle.data[0])) for address in at)

    monkeypatch.setattr("kernels.triton_gemv.prefetch", prefetch)
    monkeypatch.setattr(plan, "LARGE", 1)
    monkeypatch.setattr(plan, "CROWDED", 8 * 140 - crowded)
    monkeypatch.setattr(plan, "ROWS_AHEAD", 256)
    for name in ("gdc_wait", "gdc_launch_dependents"):
        monkeypatch.setattr(tl.extra.cuda, name, lambda **options: None)
    model = build(shifted=shifted, n_layer=1, n_head=16, n_local_heads=8, dim=160, intermediate_size=1032)
    model.setup_caches(1, 140)
    w13, gain = model.layers[0].feed_forward.w13, model.layers[0].ffn_norm.weight
    gain.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    gain[::7] = 0
    w13.threshold[:, ::7] = w13.shift[::7].abs() if shifted else 0  # ties: cut
    model.sparsity = sparsity
    decoder = FusedGpuStep(model, temperature=0.0, top_k=1)
    decoder.pdl = True

    def launch(*arguments, **options):
        x = decoder.residual.h * decoder.last_rstds[1] * gain
        kept = (x - w13.shift if shifted else x).abs() > w13.threshold
        if sparsity:
            assert kept.any() and not kept.all()
        else:
            kept[:] = not crowded
        expected.extend(
            (w13.weight[row].data_ptr() + half * 4128 + start, min(2048, 4128 - start))
            for half in range(2)
            for row in kept[half].nonzero()[:, 0]
            for start in range(0, 4128, 2048)
        )
        attend(*arguments, **options)

    monkeypatch.setattr(fused_step, "launch_attention", launch)
    decoder.last_rstds.copy_(torch.tensor([[0.05], [0.06]]))  # of a step before
    decoder.start(torch.tensor([3]), [0], [0])
    decoder.step()
    assert sorted(fetched) == sorted(expected) and bool(expected) == (not crowded)
    assert not decoder.logits.isnan().any()


COMPILE = """
import sys
import torch
import kernels.plan
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from decoder import FusedGpuStep
from kernels.quantized import fill_module
from model import ModelArgs
from sparse_model import SparseTransformer

capability = int(sys.argv[1])
kernels.plan.LARGE = 1

class AbsentGPU:
    def get_current_target(self):
        return GPUTarget("cuda", capability, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

driver.set_active(AbsentGPU())
run, awaiting = JITFunction.run, set()

def compile_only(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    ptx = kernel.asm["ptx"]
    assert ptx.count("stage[") < 2  # two layouts would make the compiler copy `half_mma.stage_assembly`
    tag = dict(zip(self.arg_names, args, strict=False)).get("tag_ptr")
    if self.__name__ in ("_half_kernel", "_integer_kernel") and tag is not None and options["PDL"]:
        awaiting.add(self.__name__)  # it waits for the launch before at the end alone
        assert ptx.count("griddepcontrol.wait") == 1
        assert ptx.index("ld.volatile") < ptx.rindex("red.") < ptx.index("griddepcontrol.wait")
    return kernel

JITFunction.run = compile_only
switches = {"qk_norm": "head", "activation": "gelu", "o_bias": True, "mlp_bias": True, "embedding_multiplier": 3.0}
switches |= {"residual_multiplier": 0.22, "logits_scaling": 7.0, "rotary_share": 0.5}
switches["rope_scaling"] = {"rope_type": "longrope", "original_max_position_embeddings": 300, "attention_factor": 1.2}
switches["rope_scaling"] |= {"short_factor": [1.0] * 16, "long_factor": [1.0] * 16}
widths = {"none": 5120, "int8": 5136, "int4": 4224, "packed": 5120}
forms = (("none", {}), ("int8", {}), ("int4", {}), ("packed", {}), ("none", switches))
for quant, others in forms[: 5 if capability == 90 else 3]:
    config = ModelArgs(
        block_size=256, vocab_size=1000, n_layer=1, n_head=8, n_local_heads=8, dim=512, quant=quant,
        intermediate_size=widths[quant] + (4 if others else 0), groupsize=64, **others,  # + 4: 8 does not divide it
    )
    model = SparseTransformer(config, "cpu", torch.bfloat16).requires_grad_(False)
    for module in model.sites if quant == "packed" else ():
        fill_module(module, 0.02, torch.Generator())
    for module in model.sites:
        module.set_cut(module.threshold, torch.zeros(module.weight.shape[0]))
    model.setup_caches(1, 140)
    every = capability == 90 and not others
    for sparsity, resident in ((0.0, 80), (0.5, 80), (0.7, 80), (0.5, 2112)) if every else ((0.5, 80),):
        kernels.plan.RESIDENT = resident  # 2112: small tiles
        model.sparsity = sparsity
        for drafts in (0, 3) if capability == 90 and (sparsity, resident) == (0.5, 80) else (0,):
            decoder = FusedGpuStep(model, temperature=0.8, top_k=200, drafts=drafts)
            decoder.pdl = capability >= 90
            decoder.step()
assert capability < 90 or awaiting == {"_half_kernel", "_integer_kernel"}
"""


def test_a_step_compiles_for_gpus_that_are_absent(tmp_path):
    """The interpreter takes more than the compiler does, and no dependent launch. Relies on Triton's own classes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command, root = [sys.executable, "-c", COMPILE], Path(__file__).parents[1]
    start = partial(subprocess.Popen, cwd=root, env=environment, stderr=subprocess.PIPE, text=True)
    for compiling in [start([*command, capability]) for capability in ("90", "80", "120")]:  # side by side
        _, errors = compiling.communicate(timeout=600)
        assert compiling.returncode == 0, errors[-2000:]


def test_infinite_inputs_end_in_not_a_number_instead_of_a_hang():
    model = build()
    model.setup_caches(1, 140)  # two chunks to join
    model.tok_embeddings.weight[3] = float("inf")
    decoder = FusedGpuStep(model, temperature=0.0, top_k=1)
    decoder.start(torch.tensor([3], device=DEVICE), [0], [0])
    decoder.step()
    assert decoder.logits[0, :101].isnan().all()


@dataclass
class WithAnotherField(ModelArgs):
    experts: int = 0


def test_a_model_with_a_switch_that_the_fused_steps_do_not_know_is_not_fused(monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda: "built")
    known, unknown = WithAnotherField(**FUSED, qkv_bias=True), WithAnotherField(**FUSED, experts=8)
    assert fusable(known) and why_unfused(known, torch.device("cpu"), 1, 1) is None
    assert not fusable(unknown)
    assert fusable(ModelArgs(**{k: v for k, v in (FUSED | SWITCHES).items() if k != "vector_std"}))
    for field, value in {"qk_norm": "whole", "norm": "layer", "post_norm": True, "gated": False}.items():
        assert unknown_parts(ModelArgs(**FUSED, **{field: value})) == [f"{field} = {value!r}"]
    assert why_unfused(unknown, torch.device("cpu"), 1, 1) == "a fused step does not implement experts = 8"
    assert {field.name for field in fields(ModelArgs)} >= FUSED_FIELDS


def test_what_else_keeps_a_step_from_being_fused(monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda: "built")
    gpu, config = torch.device("cuda"), ModelArgs(**FUSED)
    for device in (gpu, torch.device("cpu")):
        assert why_unfused(config, device, MAX_ROWS, MAX_TOP_K) is None
        assert why_unfused(config, device, MAX_ROWS + 1, 1) == "a fused step serves at most 8 rows"
    assert "top_k of at most 1024" in why_unfused(config, gpu, 1, MAX_TOP_K + 1)
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert "C++ compiler" in why_unfused(config, torch.device("cpu"), 1, 1)


def draw(logits: torch.Tensor, temperature: float, top_k: int, n: int, seed: int = 5) -> torch.Tensor:
    """n draws of the sampling kernel from the same logits."""
    from kernels.fused_step import GROUP, launch_sample

    top = torch.stack([group.max() for group in logits.split(GROUP)])[None]
    logits = logits[None]
    groups = torch.zeros(1, 1 << (top_k + 31).bit_length(), dtype=torch.int32, device=DEVICE)
    token, position = (torch.zeros(1, dtype=torch.int64, device=DEVICE) for _ in range(2))
    tokens = torch.full((1, n + 1), -1, device=DEVICE)
    seeds = torch.tensor([seed], device=DEVICE)
    for _ in range(n):
        launch_sample(logits, top, groups, seeds, position, token, tokens, None, temperature, top_k, False)
    assert position.item() == n and token.item() == tokens[0, -1].item()
    return tokens[0, 1:].cpu()


def test_draws_follow_the_softmax_of_the_top_k():
    logits = torch.randn(1003, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 2
    n, top_k, temperature = 200, 5, 0.7
    best = logits.topk(top_k)
    counts = (draw(logits, temperature, top_k, n)[:, None] == best.indices.cpu()).sum(0)
    assert counts.sum() == n  # nothing outside the top_k
    expected = n * torch.softmax(best.values.cpu() / temperature, 0)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 18.5  # 4 degrees of freedom: one seed in a thousand is worse


def test_draws_repeat_with_the_seed():
    logits = torch.zeros(64, device=DEVICE)
    assert draw(logits, 1.0, 64, 12).tolist() == draw(logits, 1.0, 64, 12).tolist()
    assert draw(logits, 1.0, 64, 12).tolist() != draw(logits, 1.0, 64, 12, seed=6).tolist()


@pytest.mark.parametrize("top_k", [1, 3, 7, 300])
def test_top_k_is_exact_with_ties_and_more_tokens_than_there_are(top_k):
    logits = torch.tensor([0.0, 4.0, -1.0, 4.0, 3.0] + [-9.0] * 40, device=DEVICE)
    drawn = set(draw(logits, 3.0, top_k, 30).tolist())
    if top_k == 1:
        assert drawn <= {1, 3}  # equal logits are both first
    elif top_k == 3:
        assert drawn == {1, 3, 4}
    else:
        assert {1, 3, 4} <= drawn <= set(range(45))


def test_greedy_takes_the_first_of_the_largest():
    logits = torch.tensor([0.0, 4.0, -1.0, 4.0, 3.0], device=DEVICE)
    assert draw(logits, 0.0, 1, 2).tolist() == [1, 1]
