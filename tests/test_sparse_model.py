"""The sparse model against the dense one: thresholds, where they apply, what is counted, layout and compilation."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from models import SMALL, build, change_config, decode, random_tokens
from safetensors.torch import load_file

from model import ModelArgs, Transformer
from sparse_model import SITES, SparseProjection, SparseTransformer
from thresholds import Cuts

INF = float("inf")
QKV, DOWN = 0, 3  # of the four `sites` of a layer
IN = {**dict.fromkeys(("q", "k", "v", "o", "gate", "up"), 32), "down": 48}
OUT = {"q": 32, "k": 16, "v": 16, "o": 32, "gate": 48, "up": 48, "down": 32}
VARIANTS = {
    "plain": {},
    "biases, tied": {"qkv_bias": True, "tie_embeddings": True},
    "window": {"sliding_window": 4, "windowed_layers": [1]},
}


def pair(dtype=torch.float32, **changes) -> tuple[Transformer, SparseTransformer]:
    """A dense model of random weights and biases, and a sparse one that has loaded its state."""
    dense = build(Transformer, SMALL | {"n_local_heads": 2}, vector_std=0.2, dtype=dtype, **changes)
    sparse = SparseTransformer(dense.config, dtype=dtype).requires_grad_(False).eval()
    sparse.load_state_dict(dense.state_dict())
    return dense, sparse


def set_random_thresholds(sparse: SparseTransformer) -> list[torch.Tensor]:
    """A different one for every input and segment; returns them in the order of `sites`."""
    generator = torch.Generator().manual_seed(5)
    for i, module in enumerate(sparse.sites):
        scale = 0.2 if i % 4 in (1, DOWN) else 0.9
        module.set_cut(scale * torch.rand(module.threshold.shape, generator=generator))
    return [module.threshold.clone() for module in sparse.sites]


def mask_by_hand(dense: Transformer, thresholds: list[torch.Tensor], dense_prefix: int = 0) -> None:
    """Hooks on the dense layers: every segment sees the input with its own small values zeroed, from a position on."""

    def hook(module, args, output, thresholds):
        (x,) = args
        parts, start = [], 0
        for t, width in zip(thresholds, module.segments.values(), strict=True):
            masked = x * (x.abs() > t)
            masked[:, :dense_prefix] = x[:, :dense_prefix]
            rows = slice(start, start + width)
            parts.append(F.linear(masked, module.weight[rows], None if module.bias is None else module.bias[rows]))
            start += width
        return torch.cat(parts, dim=-1)

    for module, t in zip(dense.sites, thresholds, strict=True):
        module.register_forward_hook(lambda module, args, output, t=t: hook(module, args, output, t))


# ---------------------------------------------------------------- against the dense model


@pytest.mark.parametrize("variant", VARIANTS)
def test_threshold_zero_is_the_dense_model(variant):
    dense, sparse = pair(**VARIANTS[variant])
    idx = random_tokens(2, 12)
    full = dense(idx)
    for logits in (sparse(idx), sparse(idx, dense_prefix=3), decode(sparse, idx, 5), decode(sparse, idx, 0)):
        torch.testing.assert_close(logits, full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_threshold_zero_is_the_dense_model_within_a_short_dtype(dtype):
    exact = pair()[0]
    dense, sparse = pair(dtype)
    for parameter, rounded in zip(exact.parameters(), dense.parameters(), strict=True):
        parameter.data.copy_(rounded)  # the same weights in float32
    idx = random_tokens(2, 12)
    truth = exact(idx)

    def error(logits):
        return (logits.float() - truth).pow(2).mean().sqrt()

    own = error(decode(dense, idx, 5))
    assert 0 < error(decode(sparse, idx, 5)) <= 2 * own and 0 < error(sparse(idx)) <= 2 * own


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [1, 2])
def test_decoding_equals_the_dense_model_with_masked_inputs(variant, batch):
    dense, sparse = pair(**VARIANTS[variant])
    idx = random_tokens(batch, 10)
    untouched = dense(idx)
    mask_by_hand(dense, set_random_thresholds(sparse))
    masked = dense(idx)
    assert (masked - untouched).abs().max() > 0.5  # the thresholds matter
    torch.testing.assert_close(decode(sparse, idx, 0), masked, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decode(sparse, idx, 0), decode(dense, idx, 0), atol=1e-4, rtol=1e-4)


def test_decoding_equals_inputs_masked_before_the_layer():
    dense, sparse = pair()
    idx = random_tokens(1, 8)
    for module in dense.sites:
        module.register_forward_pre_hook(lambda module, args: (torch.where(args[0].abs() <= 0.3, 0, args[0]),))
    for module in sparse.sites:
        module.set_cut(torch.full((1, 1), 0.3))
    torch.testing.assert_close(decode(sparse, idx, 0), dense(idx), atol=1e-4, rtol=1e-4)


def test_several_tokens_are_dense_in_generation():
    dense, sparse = pair()
    set_random_thresholds(sparse)
    idx = random_tokens(2, 9)
    torch.testing.assert_close(sparse(idx), dense(idx), atol=1e-4, rtol=1e-4)
    sparse.setup_caches(2, 9)
    torch.testing.assert_close(sparse(idx, torch.arange(9)), dense(idx), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prefix", [0, 1, 5, 10])
def test_dense_prefix_equals_decoding_after_a_dense_prompt(prefix):
    dense, sparse = pair()
    thresholds, idx = set_random_thresholds(sparse), random_tokens(2, 10)
    logits = sparse(idx, dense_prefix=prefix)
    if prefix == 1:  # a prompt of one token cannot be told from a step: it is cut
        sparse.setup_caches(2, 10)
        first = sparse(idx[:, :1], torch.arange(1), dense_prefix=1)
        rest = [sparse(idx[:, i : i + 1], torch.tensor([i])) for i in range(1, 10)]
        stepwise = torch.cat([first, *rest], dim=1)
    else:
        stepwise = decode(sparse, idx, prefix)
    torch.testing.assert_close(logits, stepwise, atol=1e-4, rtol=1e-4)
    mask_by_hand(dense, thresholds, prefix)
    torch.testing.assert_close(logits, dense(idx), atol=1e-4, rtol=1e-4)
    assert all(module.dense_prefix is None for module in sparse.sites)


def test_dense_prefix_is_taken_back_after_an_error():
    _, sparse = pair()
    with pytest.raises(IndexError):
        sparse(torch.tensor([[1000]]), dense_prefix=0)
    assert all(module.dense_prefix is None for module in sparse.sites)


# ---------------------------------------------------------------- counts


def test_a_row_that_two_batch_rows_keep_is_read_once():
    projection = SparseProjection(4, {"a": 2, "b": 3})
    torch.nn.init.ones_(projection.weight)
    projection.threshold[1] = 3.0
    x = torch.tensor([[[2.0, 2.0, 0.5, 0.0]], [[2.0, 5.0, 0.0, 0.0]]])  # [2 rows, 1 position, 4]
    projection.dense_prefix = 0
    projection(x)
    assert projection.kept.tolist() == [5, 1]  # of segment a: 3 and 2 inputs; of b: 0 and 1
    assert projection.read.tolist() == [3, 1]
    assert (projection.seen, projection.steps) == (2, 1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("prefix", [0, 4])
def test_counts_against_the_inputs_themselves(batch, prefix):
    _, sparse = pair(qkv_bias=True)
    thresholds, length = set_random_thresholds(sparse), 9
    inputs = []
    hooks = [module.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for module in sparse.sites]
    idx = random_tokens(batch, length)
    for _ in range(2):  # counts add up
        sparse(idx, dense_prefix=prefix)
    for hook in hooks:
        hook.remove()
    steps = length - prefix
    kept_weights = read_bytes = total = 0
    for x, t, module in zip(inputs[:8], thresholds, sparse.sites, strict=True):
        for segment, limits in zip(module.segments, t, strict=True):
            n_in, width = IN[segment], OUT[segment]
            keep = x[:, prefix:].abs() > limits
            kept_weights += keep.sum().item() * width
            read_bytes += keep.any(0).sum().item() * width * 4 / steps
            total += n_in * width * batch * steps
    assert 0.2 < kept_weights / total < 0.9
    assert sparse.achieved_sparsity() == pytest.approx(1 - kept_weights / total)
    # the head, 5 norms, the biases of q, k and v of 2 layers
    rest = 4 * (96 * 32 + 5 * 32 + 2 * 64)
    assert sparse.bytes_per_step() == pytest.approx(read_bytes + rest, abs=1)
    for module in sparse.sites:
        module.reads_all = True
    assert sparse.bytes_per_step() == Transformer.bytes_per_step(sparse) > read_bytes + rest
    sparse.reset_counts()
    assert sparse.achieved_sparsity() == 0


def test_counts_of_known_thresholds():
    dense, sparse = pair()
    matrices = 2 * sum(IN[name] * OUT[name] for name in IN)
    limits = torch.zeros(48)
    limits[:30] = INF
    sparse.sites[DOWN].set_cut(limits[None])  # 30 of 48 inputs
    sparse.sites[4 + QKV].set_cut(torch.tensor([[0.0], [INF], [0.0]]))  # k
    cut = 30 * 32 + 32 * 16
    for batch in (1, 2):
        sparse.reset_counts()
        sparse(random_tokens(batch, 7), dense_prefix=2)
        assert sparse.achieved_sparsity() == pytest.approx(cut / matrices)
        assert sparse.bytes_per_step() == dense.bytes_per_step() - 4 * cut
    # a dense pass and decoding by the kernels count nothing
    sparse(random_tokens(1, 7))
    decode(sparse, random_tokens(1, 3), 1)
    assert sparse.achieved_sparsity() == pytest.approx(cut / matrices)


def test_nothing_counted_is_nothing_saved():
    dense, sparse = pair()
    assert sparse.achieved_sparsity() == 0 and sparse.bytes_per_step() == dense.bytes_per_step()
    sparse(random_tokens(1, 4), dense_prefix=4)
    assert sparse.achieved_sparsity() == 0 and sparse.bytes_per_step() == dense.bytes_per_step()


# ---------------------------------------------------------------- thresholds


def random_cuts(sparse: SparseTransformer, columns: int | None = None, **changes) -> Cuts:
    """Of each site another threshold, per input or [S, 1]; shifts for every second site."""
    generator = torch.Generator().manual_seed(6)
    shapes = [module.threshold.shape for module in sparse.sites]
    thresholds = [torch.rand(s, columns or n_in, generator=generator) for s, n_in in shapes]
    shifts = [torch.randn(n_in, generator=generator) if i % 2 else None for i, (_, n_in) in enumerate(shapes)]
    return Cuts(0.4, thresholds, shifts)._replace(**changes)


@pytest.mark.parametrize("columns", [None, 1])
def test_set_cuts_reaches_every_site_in_order(columns):
    dense, sparse = pair()
    cuts = random_cuts(sparse, columns)
    sparse.set_cuts(cuts)
    assert sparse.sparsity == 0.4
    for i, module in enumerate(sparse.sites):
        owner, name = list(SITES.values())[i % 4].module.split(".")
        assert module is getattr(getattr(sparse.layers[i // 4], owner), name)
        assert tuple(module.segments) == list(SITES.values())[i % 4].projections
        assert torch.equal(module.threshold, cuts.thresholds[i].expand_as(module.threshold))
        if i % 2:
            assert torch.equal(module.shift, cuts.shifts[i])
            torch.testing.assert_close(module.offset, dense.sites[i].weight @ cuts.shifts[i])
        else:
            assert module.shift is None and module.offset is None
    sparse.set_cuts(random_cuts(sparse, shifts=[None] * 8))
    assert all(module.shift is None and module.offset is None for module in sparse.sites)


def test_cut_inputs_are_replaced_by_their_shifts():
    dense, sparse = pair()
    cuts = random_cuts(sparse)
    sparse.set_cuts(cuts)
    idx = random_tokens(1, 8)
    for module, threshold, shift in zip(dense.sites, cuts.thresholds, cuts.shifts, strict=True):
        if len(threshold) > 1:  # of several segments' thresholds: the first, for all
            threshold[:] = threshold[0]
        replaced = torch.zeros(threshold.shape[1]) if shift is None else shift

        def replace(_, args, t=threshold[0], replaced=replaced):
            (x,) = args
            return (torch.where((x - replaced).abs() <= t, replaced, x),)

        module.register_forward_pre_hook(replace)
    sparse.set_cuts(cuts)
    expected = dense(idx)
    torch.testing.assert_close(decode(sparse, idx, 0), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sparse(idx, dense_prefix=0), expected, atol=1e-4, rtol=1e-4)


def test_cuts_of_another_model_set_nothing():
    _, sparse = pair()
    cuts = random_cuts(sparse)
    deeper, wider = random_cuts(pair(n_layer=3)[1]), random_cuts(pair(intermediate_size=40)[1])
    longer = [torch.zeros(33) if shift is None else shift for shift in cuts.shifts]
    for other in (deeper, wider, Cuts(0.4, [], []), cuts._replace(shifts=longer), cuts._replace(shifts=[])):
        with pytest.raises(ValueError, match=r"thresholds are of another model: they are for .* this model has 8"):
            sparse.set_cuts(other)
    assert sparse.sparsity == 0 and not any(module.threshold.any() for module in sparse.sites)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_keeps_thresholds_and_counters(dtype):
    _, sparse = pair()
    before = set_random_thresholds(sparse)
    sparse.to(dtype)
    for module, threshold in zip(sparse.sites, before, strict=True):
        assert module.weight.dtype == dtype and module.kept.dtype == module.read.dtype == torch.int64
        assert module.threshold.dtype == torch.float32 and torch.equal(module.threshold, threshold)


def test_state_dict_round_trip():
    _, sparse = pair(qkv_bias=True)
    set_random_thresholds(sparse)
    state = sparse.state_dict()
    again = SparseTransformer(sparse.config, dtype=torch.float32)
    again.load_state_dict(state)
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    idx = random_tokens(1, 6)
    assert torch.equal(decode(sparse, idx, 2), decode(again, idx, 2))


# ---------------------------------------------------------------- layout and checkpoints


def test_weights_are_stored_by_input_row(tiny):
    sparse = SparseTransformer.from_checkpoint(tiny, dtype=torch.float32)
    tensors = load_file(tiny / "model.safetensors")
    for layer in range(2):
        attention, mlp = sparse.layers[layer].attention, sparse.layers[layer].feed_forward
        for module, names in ((attention.wqkv, "qkv"), (attention.wo, "o")):
            whole = torch.cat([tensors[f"layers.{layer}.attention.w{name}.weight"] for name in names])
            assert torch.equal(module.weight, whole.t())
        for module, names in ((mlp.w13, "13"), (mlp.w2, "2")):
            whole = torch.cat([tensors[f"layers.{layer}.feed_forward.w{name}.weight"] for name in names])
            assert torch.equal(module.weight, whole.t())
    for module in sparse.sites:
        assert module.weight.is_contiguous() and module.weight.shape == (module.threshold.shape[1], sum(module.widths))
        assert not module.threshold.any() and not module.weight.requires_grad
    assert [list(m.segments) for m in sparse.sites[:4]] == [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]
    idx = torch.randint(300, (1, 9), generator=torch.Generator().manual_seed(0))
    dense = Transformer.from_checkpoint(tiny, dtype=torch.float32)
    torch.testing.assert_close(decode(sparse, idx, 3), dense(idx), atol=1e-4, rtol=1e-4)


def test_a_checkpoint_that_does_not_fit(copy):
    change_config(copy, intermediate_size=50)
    message = r"do not fit its config: layers\.0\.feed_forward\.w1\.weight is \(48, 32\)"
    with pytest.raises(ValueError, match=message) as error:
        SparseTransformer.from_checkpoint(copy)
    assert "\n" not in str(error.value)


def test_column_norms():
    _, sparse = pair()
    module = sparse.layers[0].attention.wqkv
    columns = module.weight.t()  # [out, in]
    expected = torch.stack([columns[rows].norm(dim=0) for rows in (slice(0, 32), slice(32, 48), slice(48, 64))])
    torch.testing.assert_close(module.column_norms(), expected)
    assert sparse.to(torch.bfloat16).layers[0].attention.wqkv.column_norms().dtype == torch.float32


def test_sizes_equal_the_dense_model():
    dense, sparse = pair(qkv_bias=True)
    assert sum(p.numel() for p in dense.parameters()) == sum(p.numel() for p in sparse.parameters())
    meta = SparseTransformer(ModelArgs.from_name("llama-3-8b"), device="meta", dtype=torch.bfloat16)
    assert meta.layers[0].feed_forward.w2.threshold.shape == (1, 14336)
    assert meta.layers[0].attention.wqkv.threshold.dtype == torch.float32


# ---------------------------------------------------------------- compilation


@pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", "aot_eager"), ("cpu", "inductor"), pytest.param("cuda", "inductor", marks=pytest.mark.gpu)],
)
def test_the_step_compiles_once_for_all_thresholds(device, backend):
    if backend == "inductor" and device == "cpu" and not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    _, sparse = pair(n_layer=1, qkv_bias=True)
    sparse.to(device).setup_caches(1, 16)
    idx = random_tokens(1, 10).to(device)
    step = torch.compile(sparse, fullgraph=True, backend=backend)
    with torch.no_grad():
        for turn, threshold in enumerate((torch.zeros(1), torch.full((1,), 0.3), torch.linspace(0, 1, 32))):
            for module in sparse.sites[:DOWN]:
                module.set_cut(threshold[None].to(device))
            with torch.compiler.set_stance("fail_on_recompile" if turn else "default"):
                for i in range(4):
                    position = torch.tensor([i], device=device)
                    compiled = step(idx[:, i : i + 1], position).clone()
                    torch.testing.assert_close(compiled, sparse(idx[:, i : i + 1], position), atol=1e-4, rtol=1e-4)
