"""Packed bfloat16: the very same numbers, products and tokens as those of plain weights."""

import pytest
import torch
from models import CONFIG, FUSED, build, build_cut, edit_json, flags, write_checkpoint
from safetensors.torch import load_file, save_file

import generate
import quantize
from decoder import FusedCpuStep
from kernels import cpu, packed
from kernels.quantized import Form, dense_weight, dequantize, form_of, unpack
from model import Transformer
from sparse_model import SparseTransformer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = FUSED | {"head_dim": 64, "intermediate_size": 192, "n_head": 2, "n_local_heads": 1}
PACKABLE = CONFIG | {"intermediate_size": 192, "num_key_value_heads": 4, "vocab_size": 300}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16)


def numbers(kind: str, n: int, c: int) -> torch.Tensor:
    """bfloat16 [n, c] of a kind."""
    generator = torch.Generator().manual_seed(n)
    normal = torch.randn(n, c, generator=generator).mul(0.02).bfloat16()
    if kind == "normal, some zeros":
        return normal.where(torch.rand(n, c, generator=generator) > 0.01, 0)
    if kind == "all patterns":  # not numbers, infinities and denormals among them
        return torch.randint(-32768, 32768, (n, c), generator=generator, dtype=torch.int16).view(torch.bfloat16)
    if kind == "denormals":
        return torch.randint(-128, 128, (n, c), generator=generator, dtype=torch.int16).view(torch.bfloat16)
    return torch.full((n, c), {"zeros": 0.0, "ones": 1.0, "infinite": float("inf")}[kind]).bfloat16()


def packed_of(weight: torch.Tensor, widths: list[int]):
    parts, escapes = zip(*(packed.pack(part) for part in weight.split(widths, dim=1)), strict=True)
    return torch.cat(parts, dim=1), packed.escape_table(torch.cat(escapes), len(weight), widths)


@pytest.mark.parametrize("widths", [[64], [576, 192, 192], [640, 1984]])
@pytest.mark.parametrize("kind", ["normal, some zeros", "all patterns", "denormals", "zeros", "ones", "infinite"])
def test_a_round_trip_keeps_every_bit(kind, widths):
    for n in (1, 32, 70):
        weight = numbers(kind, n, sum(widths))
        stored, table = packed_of(weight, widths)
        assert form_of(stored, table) == Form("packed", torch.uint8, 64) and stored.nbytes == weight.nbytes * 3 // 4
        assert torch.equal(bits(packed.unpack(stored, table)), bits(weight))
        assert torch.equal(bits(dequantize(stored, table, torch.bfloat16)), bits(weight))  # the library's


def test_a_compiled_graph_unpacks_whole():
    stored, table = packed_of(numbers("normal, some zeros", 40, 128), [64, 64])
    compiled = torch.compile(lambda w, t: dequantize(w, t, torch.bfloat16) * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(stored, table), packed.unpack(stored, table) * 2)
    torch.library.opcheck(unpack, (stored, table))


def test_normal_weights_have_few_escapes():
    _, escapes = packed.pack(torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).bfloat16())
    assert len(escapes) - 1 < 2e-4 * 512 * 512


@pytest.mark.parametrize("change", ["base", "place", "order", "segments", "twice"])
def test_damaged_escapes_are_an_error(change):
    weight = numbers("normal, some zeros", 40, 128)
    (_, a), (_, b) = (packed.pack(part) for part in weight.split([64, 64], dim=1))
    escapes = torch.cat((a, b))
    assert len(a) > 3 and len(packed.escape_table(escapes, 40, [64, 64]))
    damaged = {
        "base": torch.cat((torch.tensor([-1 - 241]), escapes[1:])),
        "place": torch.cat((a, torch.tensor([40 * 64 << 16]), b)),
        "order": torch.cat((a.flip(0).roll(1), b)),
        "segments": a,
        "twice": torch.cat((a, a[-1:], b)),
    }[change]
    with pytest.raises(ValueError, match="escapes of packed weights are damaged"):
        packed.escape_table(damaged, 40, [64, 64])


def pair(
    shape: dict = SHAPE, device: str = "cpu", zeros: float = 0.01, **options
) -> tuple[SparseTransformer, SparseTransformer]:
    """Models of the same bfloat16 weights, plain and packed, with the same cuts."""
    plain = build_cut(shape, std=0.1, dtype=torch.bfloat16, device=device, **options)
    for module in (*plain.sites, plain.output):
        module.weight[torch.rand(module.weight.shape, device=device) < zeros] = 0
    for module in plain.sites:
        module.set_cut(module.threshold, module.shift)
    model = build(SparseTransformer, shape | {"quant": "packed"}, dtype=torch.bfloat16, device=device)
    model.sparsity = plain.sparsity
    kept = {n: t for n, t in plain.state_dict().items() if n.split(".")[-1] not in ("threshold", "shift", "offset")}
    model.load_state_dict(kept | quantize.pack_model(plain))
    for ours, theirs in zip(model.sites, plain.sites, strict=True):
        ours.set_cut(theirs.threshold, theirs.shift)
    return plain, model


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_cpus_steps_equal_the_plain_ones(rows):
    if cpu.library() is None:
        pytest.skip("no C++ compiler")
    models = pair(shifted=rows == 3)
    tokens = torch.arange(9)[None]
    assert torch.equal(*(model(tokens) for model in models))
    for dense in (False, True):
        found = []
        for model in models:
            model.setup_caches(rows, 256)
            step = FusedCpuStep(model, 0.8, 20, dense)
            step.start(torch.arange(rows), [5 + r for r in range(rows)], [1] * rows)
            step.replay(200)
            found.append((step.tokens.clone(), step.logits.clone()))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_weights_that_are_all_escapes_still_give_the_same_sums():
    weight = numbers("all patterns", 64, 192).nan_to_num(1.0, 1.0, -1.0).clamp(-1e3, 1e3)
    stored, table = packed_of(weight, [64, 128])
    x, threshold = torch.randn(2, 64).bfloat16(), torch.full((2, 64), 0.5)
    from kernels.sparse_gemv import sparse_gemv

    assert torch.equal(
        sparse_gemv(x, weight, threshold, [64, 128]), sparse_gemv(x, stored, threshold, [64, 128], table)
    )


@pytest.mark.parametrize("base", range(packed.LEAST_BASE, packed.MOST_BASE + 1, 8))
def test_all_numbers_of_a_window_are_made_again(base):
    patterns = torch.arange(-32768, 32768, dtype=torch.int32)
    inside = ((patterns >> 7 & 255) >= base) & ((patterns >> 7 & 255) < base + 16)
    window = patterns[inside].to(torch.int16).view(torch.bfloat16)[None].to(DEVICE)
    stored, table = packed_of(window, [4096])
    assert table[0] == base * 0x00800080 and not table[packed.HEADER :].any()
    assert torch.equal(bits(packed.unpack(stored, table)), bits(window))
    launch = pytest.importorskip("kernels.triton_dequantize").launch_unpack
    assert torch.equal(bits(launch(stored, table)), bits(window))


@pytest.mark.parametrize(("n_in", "widths", "blocks", "tiles"), [(70, [128, 64], 2, (64, 128)), (40, [256], 1, (128,))])
@pytest.mark.parametrize(("rows", "cut", "early"), [(1, 0.0, False), (8, 0.5, False), (2, 0.5, True)])
def test_a_gpus_product_is_the_plain_one(n_in, widths, blocks, tiles, rows, cut, early, monkeypatch):
    """To the bit, in the interpreter by the assembly in numpy, see `lanes`. early: rows of cut inputs are loaded."""
    pytest.importorskip("triton")
    from kernels import plan
    from kernels.few_rows import Prepared
    from kernels.products import launch_product
    from kernels.triton_gemv import Product

    weight = torch.randn(n_in, sum(widths), generator=torch.Generator().manual_seed(1)).mul(0.02).bfloat16().to(DEVICE)
    weight[17, 5], weight[30, 60], weight[31, 9] = float("inf") if cut and not early else 1e10, 1e-39, 1e28
    x = torch.randn(rows, n_in, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    x[:, 17] = 0.1 if cut else 1.0  # a cut infinity does not matter
    threshold = torch.full((len(widths), n_in), 0.5 if cut else -1.0, device=DEVICE)
    room = Prepared(*(torch.zeros(8192, dtype=t, device=DEVICE) for t in (torch.bfloat16, torch.int32, torch.float32)))
    outs = []
    for stored, table, tile in ((weight, None, 64), *((*packed_of(weight, widths), tile) for tile in tiles)):
        made = plan.Plan(blocks, tile, 0, early=early and table is not None)
        monkeypatch.setattr(plan, "_half_plan", lambda *_, made=made: made)
        out = torch.zeros(rows, sum(widths), device=DEVICE)
        product = Product(
            stored, threshold, widths, cut, table, fineness=torch.full((sum(widths),), 2.0**16, device=DEVICE)
        )
        launch_product("given", x, product, out, prepared=room if rows > 1 else None, dtype=torch.bfloat16)
        outs.append(out)
    assert outs[0].isfinite().all()
    for out in outs[1:]:
        assert torch.equal(out.view(torch.int32), outs[0].view(torch.int32))


@pytest.mark.parametrize("device", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_gpu_unpacks_to_the_bit(device):
    if device == "interpreter" and torch.cuda.is_available():
        pytest.skip("the kernel runs on the GPU here")
    launch = pytest.importorskip("kernels.triton_dequantize").launch_unpack
    for widths, n in (([128, 64, 64], 40), ([192], 70)):
        weight = numbers("normal, some zeros", n, sum(widths)).to(DEVICE)
        assert torch.equal(bits(launch(*packed_of(weight, widths))), bits(weight))


@pytest.mark.parametrize("rows", [1, pytest.param(2, marks=pytest.mark.gpu), pytest.param(8, marks=pytest.mark.gpu)])
def test_a_gpus_steps_equal_the_plain_ones(rows):
    pytest.importorskip("triton")
    from decoder import FusedGpuStep

    wide = {"dim": 512, "n_head": 8, "n_local_heads": 2, "intermediate_size": 5120}
    wide = wide if DEVICE == "cuda" else {"n_layer": 1}
    models = pair(SHAPE | wide, device=DEVICE, zeros=0.002, shifted=True)
    for dense in (False, True) if DEVICE == "cuda" else (False,):
        found = []
        for model in models:
            model.setup_caches(rows, 256)
            step = FusedGpuStep(model, 0.8, 20, dense)
            step.start(torch.arange(rows, device=DEVICE), [5 + r for r in range(rows)], [1] * rows)
            for _ in range(200 if DEVICE == "cuda" else 1):
                step.replay() if DEVICE == "cuda" else step.step()
            found.append((step.tokens.clone(), step.logits.clone()))
        assert torch.equal(found[0][0], found[1][0])
        assert DEVICE == "cpu" or torch.equal(found[0][1], found[1][1])  # the interpreter multiplies bfloat16's bits


@pytest.mark.parametrize(("n_vocab", "dim"), [(200, 192), (70, 64)])
def test_a_gpus_lm_head_is_the_plain_one(n_vocab, dim):
    launch_head = pytest.importorskip("kernels.fused_step").launch_head
    weight = numbers("normal, some zeros", n_vocab, dim)
    weight[3, 5], weight[3, 6], weight[-1, -1], weight[40, 60] = 1e-30, -3.0, 1e4, 7e-39
    x, outs = torch.randn(3, dim, generator=torch.Generator().manual_seed(0)).to(DEVICE), []
    for stored, scale in ((weight, None), packed_of(weight, [dim])):
        logits, top = torch.full((3, n_vocab + 8), float("nan")), torch.full((3, n_vocab // 8 + 8), float("nan"))
        logits, top = logits.to(DEVICE), top.to(DEVICE)
        launch_head(x, stored.to(DEVICE), None if scale is None else scale.to(DEVICE), 1.0, logits, top, False)
        outs.append(logits[:, :n_vocab])
    assert outs[0].isfinite().all() and torch.equal(*outs)


@pytest.fixture(scope="module")
def plain_and_packed(tmp_path_factory):
    """A checkpoint and what quantize.py --mode packed makes of it."""
    folder = write_checkpoint(tmp_path_factory.mktemp("org") / "plain", PACKABLE, "Hello, my name is Ann.")
    return folder, quantize.main(flags(mode="packed", checkpoint_path=folder))


def test_a_run_of_the_packed_checkpoint_is_the_plain_ones(plain_and_packed):
    plain, checkpoint = plain_and_packed
    assert checkpoint.name == "plain-packed"
    texts = []
    for folder in (plain, checkpoint):
        result = generate.main(
            flags(checkpoint_path=folder, compile=True, prompt="Hello", max_new_tokens=30, num_samples=1, device="cpu")
        )
        texts.append(result["text"])
    assert texts[0] == texts[1]


def test_a_damaged_or_foreign_packed_checkpoint_is_an_error(plain_and_packed, tmp_path):
    import shutil

    folder = shutil.copytree(plain_and_packed[1], tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    name = "layers.0.attention.wo.scale"
    tensors[name] = torch.cat((tensors[name], torch.tensor([1 << 60])))
    save_file(tensors, folder / "model.safetensors")
    for cls in (Transformer, SparseTransformer):
        with pytest.raises(ValueError, match=r"^layers\.0\.attention\.wo\.weight: the packed weights .* damaged"):
            cls.from_checkpoint(folder)
    tensors[name] = tensors[name].float()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"wo\.scale is .* float32, config.json asks for"):
        SparseTransformer.from_checkpoint(folder)
    edit_json(folder / "config.json", quantization={"mode": "packed2"})
    with pytest.raises(ValueError, match=r"only quantize\.py's packed, int8 and int4"):
        SparseTransformer.from_checkpoint(folder)


def test_any_changed_byte_changes_the_checksum():
    weight, escapes = packed.pack(numbers("normal, some zeros", 16, 64))
    stored = weight.t().contiguous()
    listed = packed.with_checksum(stored, escapes)
    assert len(listed) > 4 and torch.equal(listed[1:], escapes)
    for tensor in (stored, listed):
        raw = tensor.view(torch.uint8).flatten()
        for i in range(len(raw)):
            for change in (1, 0x80, 0xFF):
                raw[i] ^= change
                assert not torch.equal(packed.with_checksum(stored, listed[1:]), listed)
                raw[i] ^= change
    assert torch.equal(packed.with_checksum(stored, listed[1:]), listed)


@pytest.fixture(scope="module")
def model_and_tensors():
    """A packed model and its checkpoint's tensors, with escapes in every matrix."""
    plain, model = pair()
    return model, quantize.pack_model(plain)


def flipped(tensor: torch.Tensor, at: int, bit: int) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[at] ^= 1 << bit
    return tensor


TAMPERED = {  # a list of escapes begins with its checksum and the first segment's base
    "first word": ("weight", lambda t: flipped(t, 0, 0)),
    "last word": ("weight", lambda t: flipped(t, -1, 7)),
    "row zeroed": ("weight", lambda t: torch.cat((t[:1], 0 * t[1:2], t[2:]))),
    "rows swapped": ("weight", lambda t: torch.cat((t[1:2], t[:1], t[2:]))),
    "checksum": ("scale", lambda t: flipped(t, 0, 62)),
    "base": ("scale", lambda t: flipped(t, 1, 0)),
    "an escape's bits": ("scale", lambda t: flipped(t, 2, 15)),
    "an escape's place": ("scale", lambda t: flipped(t, -1, 16)),
    "an escape becomes a base": ("scale", lambda t: ~flipped(t, 2, 0)),
    "an escape lost": ("scale", lambda t: t[:-1]),
    "all lost": ("scale", lambda t: t[:0]),
    "an older version's": ("scale", lambda t: t[1:]),
}


@pytest.mark.parametrize("name", ["layers.0.attention.wqkv", "layers.1.feed_forward.w2", "output"])
@pytest.mark.parametrize("kind", TAMPERED)
def test_tampered_packed_weights_are_an_error(model_and_tensors, kind, name):
    model, tensors = model_and_tensors
    what, change = TAMPERED[kind]
    assert len(tensors[f"{name}.scale"]) > 4
    damaged = {f"{name}.{what}": change(tensors[f"{name}.{what}"])}
    with pytest.raises(ValueError, match=rf"^{name}\.weight: .* damaged, or an older .*quantize\.py --mode packed$"):
        model.load_state_dict(tensors | damaged, strict=False)
    model.load_state_dict(tensors, strict=False)


def test_random_packed_weights_are_the_same_in_every_class():
    shape = SHAPE | {"quant": "packed", "dim": 128}  # down is as long as it is wide in bytes
    dense, sparse = (build(cls, shape, dtype=torch.bfloat16) for cls in (Transformer, SparseTransformer))
    for ours, theirs in zip(dense.sites, sparse.sites, strict=True):
        assert torch.equal(dense_weight(ours, torch.bfloat16), theirs.dequantized(torch.bfloat16).t())


def test_packed_weights_run_in_bfloat16_alone(plain_and_packed):
    with pytest.raises(ValueError, match="choose --precision bfloat16, not float16"):
        SparseTransformer.from_checkpoint(plain_and_packed[1], dtype=torch.float16)
    with pytest.raises(ValueError, match="o cannot be packed: its rows of 80 are no multiple of 64"):
        build(SparseTransformer, SHAPE | {"quant": "packed", "dim": 80}, dtype=torch.bfloat16)
    model = SparseTransformer.from_checkpoint(plain_and_packed[1])
    plain = SparseTransformer.from_checkpoint(plain_and_packed[0])
    assert 0.74 < model.bytes_per_step() / plain.bytes_per_step() < 0.80
    assert torch.equal(dense_weight(model.output, torch.bfloat16), plain.output.weight)
    assert model.config.sensitive_quant == "packed"
