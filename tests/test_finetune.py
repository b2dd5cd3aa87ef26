"""LoRA on cut inputs: gradients against plain torch, what is merged, runs that stop and go on, mistakes."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from models import SMALL, TINY, build, change_config, copy_with_text, flags, random_tokens, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import finetune
import generate
import options
import quantize
import refine
from finetune import Training, merge
from formats.checkpoint import load_weights
from formats.files import read_json
from formats.text import text_windows
from kernels import fused_step
from model import Transformer
from sparse_model import SparseTransformer, dense_prefix_of
from thresholds import STATISTICS_NAME, Cuts, load_statistics, load_table
from tokenizer import load_tokenizer

TABLE = "thresholds_refined.safetensors"


def random_cuts(model: SparseTransformer, sparsity: float, seed: int, shifted: bool = True) -> Cuts:
    generator = torch.Generator().manual_seed(seed)
    thresholds = [0.6 * torch.rand(module.threshold.shape, generator=generator) for module in model.sites]
    shifts = [0.4 * torch.rand(len(m.weight), generator=generator) - 0.2 if shifted else None for m in model.sites]
    return Cuts(sparsity, thresholds, shifts)


def training_of(model: SparseTransformer, windows: torch.Tensor, rows: list[Cuts], own: int = 0, **changes) -> Training:
    """A training on windows, of which the model wrote the first `own`."""
    o = options.finetune(flags(batch_size=len(rows), **changes))
    return Training(model, rows, windows[own:], windows[:own], o)


def fill_b(training: Training) -> None:
    """A B that is not zero, so that A has a gradient too."""
    generator = torch.Generator().manual_seed(9)
    for name, parameter in training.parameters.items():
        if ".b." in name:
            parameter.data.normal_(0, 0.1, generator=generator)


def reference(model: SparseTransformer, training: Training, rows: list[Cuts], prefix: int) -> dict[str, torch.Tensor]:
    """Copies of A and B; every site of `model` becomes a plain product with them, window by window."""
    copies = {name: p.detach().clone().requires_grad_() for name, p in training.parameters.items()}
    scaling = training.o.alpha / training.o.rank
    paths = [name for name, module in model.named_modules() if module in model.sites]

    def product(j: int):
        def hook(module, args, _):
            out = []
            for r, x in enumerate(args[0]):
                threshold, shift = rows[r].thresholds[j], rows[r].shifts[j]
                parts = []
                weights = zip(module.segments, module.weight.split(module.widths, 1), strict=True)
                for s, (p, weight) in enumerate(weights):
                    if f"{paths[j]}.a.{p}" in copies:
                        weight = weight + copies[f"{paths[j]}.a.{p}"] @ copies[f"{paths[j]}.b.{p}"] * scaling
                    c = 0.0 if shift is None else shift
                    keep = (x - c).abs() > threshold[s]
                    keep[:prefix] = True
                    parts.append((x * keep + c * ~keep) @ weight)
                out.append(torch.cat(parts, -1))
            return torch.stack(out) + (0 if module.bias is None else module.bias)

        return hook

    for j, module in enumerate(model.sites):
        module.register_forward_hook(product(j))
    return copies


CAPPED = {"post_norm": True, "attention_softcap": 3.0, "logit_softcap": 2.0, "logits_scaling": 0.5}
CAPPED |= {"tie_embeddings": True}
GATELESS = {"gated": False, "activation": "gelu", "norm": "layer", "o_bias": True, "mlp_bias": True}
BY_LENGTH = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}
MODELS = {
    "biases": {"qkv_bias": True, "rope_scaling": BY_LENGTH},
    "capped": CAPPED,
    "no gate": GATELESS | {"parallel_residual": True},
}


@pytest.mark.parametrize(("loss", "own"), [("kl", 0), ("next_token", 0), ("next_token", 1), ("kl", 1)])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_plain_torch(name, loss, own, shifted, monkeypatch):
    monkeypatch.setattr(finetune, "LARGEST_STEP", 1e9)
    monkeypatch.setattr(finetune, "LOGITS", 96 * 32)  # the loss in several pieces
    monkeypatch.setattr(finetune, "keep_all", lambda *_: shifted)
    options = MODELS[name] | {"n_local_heads": 2, "vector_std": 0.2}
    model, plain, dense = (build(SparseTransformer, **options) for _ in range(3))
    rows, windows = [random_cuts(model, 0.5, 1, shifted), random_cuts(model, 0.3, 2, shifted)], random_tokens(2, 40)
    training = training_of(model, windows, rows, own, loss=loss, rank=4, alpha=6.0, targets="q v o up down".split())
    fill_b(training)
    assert len(training.parameters) == 2 * 5 * 2
    copies = reference(plain, training, rows, dense_prefix_of(40))

    # of the reference
    batch = training.windows[training.order]
    logits, target = plain(batch).log_softmax(-1), dense(batch).log_softmax(-1)
    of_window = F.kl_div(logits, target, log_target=True, reduction="none").sum((1, 2))
    tokens = torch.full((2,), 40)
    texts = training.order < (0 if loss == "kl" else 2 - own)
    of_text = F.nll_loss(logits[:, :-1].transpose(1, 2), batch[:, 1:], reduction="none").sum(1)
    value = torch.where(texts, of_text, of_window).sum() / (tokens - texts.long()).sum()
    value.backward()

    # of the script
    gradients = {}
    monkeypatch.setattr(
        training.optimizer, "step", lambda: gradients.update({n: p.grad for n, p in training.parameters.items()})
    )
    torch.testing.assert_close(training.step(0), value.detach(), atol=1e-5, rtol=1e-4)
    for name, copy in copies.items():
        assert copy.grad.abs().max() > 1e-4
        torch.testing.assert_close(gradients[name], copy.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_run_as_the_model_in_training(dtype):
    model, windows = build(SparseTransformer, n_local_heads=2, dtype=dtype), random_tokens(2, 40)
    rows = [random_cuts(model, 0.5, 1)] * 2
    training = training_of(model, windows, rows, precision=str(dtype)[6:])
    fill_b(training)
    before = model(windows)
    with torch.no_grad():
        tuned = model.head(training.student(windows))
    merge(model, training.student)
    model.set_cuts(rows[0])
    merged = model(windows, dense_prefix=dense_prefix_of(40))
    # in bfloat16 an input near its threshold may be cut in one and kept in the other
    difference, change = (merged - tuned).abs().mean(), (merged - before).abs().mean()
    assert change > 0.3 and difference < (1e-5 if dtype == torch.float32 else 0.1) * change


def test_a_level_of_zero_is_dense(monkeypatch):
    model, windows = build(SparseTransformer), random_tokens(2, 40)
    windows[1] = windows[0]
    cuts = random_cuts(model, 0.5, 1)
    monkeypatch.setattr(finetune, "cuts_for", lambda *_: ("refined", cuts))
    rule, rows = finetune.cuts_of_rows(options.finetune(flags(sparsity=[0, 0.5], batch_size=5)), None, model)
    assert rule == "refined" and [row.sparsity for row in rows] == [0, 0.5, 0, 0.5, 0]
    hidden = training_of(model, windows, rows[1:3]).student(windows)
    dense = finetune.without_head(model)(windows)
    torch.testing.assert_close(hidden[1], dense[0], atol=1e-5, rtol=1e-5)
    assert (hidden[0] - dense[0]).abs().mean() > 0.1


def test_the_learning_rate_rises_and_falls():
    model = build(SparseTransformer)
    training = training_of(model, random_tokens(8, 20), [random_cuts(model, 0.5, 1)], epochs=25, learning_rate=0.5)
    rates = [training.learning_rate(i) for i in range(training.steps)]
    assert training.steps == 200 and rates[9] == max(rates) == pytest.approx(0.5, rel=0.01)
    assert rates[0] == pytest.approx(0.05, rel=0.01) and rates[-1] < 1e-4 and rates[9:] == sorted(rates[9:])[::-1]
    training.step(3)
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(rates[3])
    seen = training.order.view(25, 8).sort(1).values
    assert torch.equal(seen, torch.arange(8).expand(25, 8)) and not torch.equal(training.order[:8], seen[0])


def test_training_lowers_the_divergence_on_other_text():
    model = build(SparseTransformer, n_local_heads=2, seed=3, std=0.25)
    windows, other = random_tokens(1024, 40, seed=5), random_tokens(16, 40, seed=6)
    cuts = refine.scaled_to(model, other, 0.4, refine.initial_cuts(model, windows[:8]))
    training = training_of(model, windows, [cuts] * 16, loss="kl", epochs=2, learning_rate=3e-3)

    def divergence() -> torch.Tensor:
        with torch.no_grad():
            hidden, dense = (part(other).flatten(0, 1) for part in (training.student, training.teacher))
            return finetune.loss_and_gradient(hidden, torch.full((len(dense),), finetune.DENSE), dense, model)[0]

    before = divergence()
    for _ in training.run():
        pass
    assert divergence() < 0.95 * before
    assert training.losses[-8:].mean() < 0.95 * training.losses[:8].mean()


# ---------------------------------------------------------------- the script


def tune(folder: Path, **changes) -> Path:
    o = {"data": folder / "text.txt", "num_tokens": 1200, "context": 40, "batch_size": 4, "epochs": 2, "rank": 4}
    o |= {"learning_rate": 0.01, "precision": "float32", "device": "cpu", "output_dir": folder.parent / "tuned"}
    return finetune.main(flags(checkpoint_path=folder, **o | changes))


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory) -> Path:
    """A checkpoint with a text and a cut table of two levels."""
    folder = copy_with_text(tiny, tmp_path_factory.mktemp("base"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refine, "LEVELS", (0.3, 0.6))
        o = {"data": folder / "text.txt", "num_tokens": 800, "updates": 0, "precision": "float32", "device": "cpu"}
        refine.main(flags(checkpoint_path=folder, **o))
    return folder


@pytest.fixture(scope="module")
def tuned(base) -> Path:
    return tune(base, sparsity=[0.3, 0.6], own_tokens=400)


def test_the_tuned_checkpoint(base, tuned):
    before, after = load_weights(base), load_weights(tuned)
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {name for name in before if "attention.w" in name or "feed_forward.w" in name}
    for name in ("config.json", "tokenizer.json"):
        assert (base / name).read_bytes() == (tuned / name).read_bytes()
    assert not list(tuned.parent.glob("*state*"))

    # how it was made
    made = read_json(tuned / "finetune.json")
    assert made["text_tokens"] == {"text.txt": 1080, "the model's own after the beginnings of these": 400}
    assert made["steps"] == len(made["losses"]) == round(2 * (27 + 10) / 4) and made["tokens_seen"] == 18 * 160
    assert made["options"]["sparsity"] == "[0.3, 0.6]" and made["options"]["rank"] == "4"

    # the table cuts as much of the text held out as the one before cuts with the weights before
    table, old = load_table(tuned / TABLE, tuned), load_table(base / TABLE)
    texts = text_windows([base / "text.txt"], load_tokenizer(base, 300), 1200, 40)[-3:]
    shares = []
    for folder, cuts in ((base, old), (tuned, table)):
        model = SparseTransformer.from_checkpoint(folder, "cpu", torch.float32)
        for i in range(2):
            model.set_cuts(cuts.level(i))
            shares.append(refine.share_cut(model, texts))
    assert shares[2:] == pytest.approx(shares[:2], abs=2e-3) and abs(shares[1] - 0.6) > 5e-3
    assert table.levels == [0.3, 0.6] and json.loads(table.metadata["quality"])["text"].startswith("held-out")
    ratio = table.level(0).thresholds[3] / old.level(0).thresholds[3]
    assert ratio.std() < 2e-3 * ratio.mean() and torch.equal(table.level(0).shifts[3], old.level(0).shifts[3])


def test_scripts_take_the_tuned_checkpoint(tuned, tmp_path, capsys):
    common = {"checkpoint_path": tuned, "device": "cpu", "precision": "float32"}
    generate.main(flags(prompt="Hello", num_samples=1, max_new_tokens=4, sparsity=0.5, **common))
    assert "refined thresholds" in capsys.readouterr().out
    quantize.main(flags(mode="int8", num_tokens=0, output_dir=tmp_path / "int8", **common))
    assert load_table(tmp_path / "int8" / TABLE, tmp_path / "int8").levels == [0.3, 0.6]


def test_merged_into_fused_and_half_precision_weights(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "fused")
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        parts = [tensors.pop(f"layers.{layer}.attention.{name}.weight") for name in ("wq", "wk", "wv")]
        tensors[f"layers.{layer}.attention.wqkv.weight"] = torch.cat(parts).half()
    save_file(tensors, folder / "model.safetensors")
    table = load_table(folder / TABLE)
    table.metadata.pop("fingerprint")
    table.save(folder / TABLE)
    out = tune(folder, targets=["v", "gate"])
    before, after = load_weights(folder), load_weights(out)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {f"layers.{i}.{name}.weight" for i in (0, 1) for name in ("attention.wqkv", "feed_forward.w1")}
    name = "layers.0.attention.wqkv.weight"
    assert after[name].dtype == torch.float16 and torch.equal(before[name][:48], after[name][:48])
    assert not torch.equal(before[name][48:], after[name][48:])


def test_a_block_without_a_gate(base, tmp_path):
    text = (base / "text.txt").read_text()
    folder = write_checkpoint(tmp_path / "neox", TINY | {"architectures": ["GPTNeoXForCausalLM"]}, text)
    (folder / "text.txt").write_text(text)
    out = tune(folder, thresholds="uniform", targets=["q", "gate", "up"], epochs=0.5)
    before, after = load_weights(folder), load_weights(out)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {f"layers.{i}.{name}.weight" for i in (0, 1) for name in ("attention.wq", "feed_forward.w3")}
    with pytest.raises(ValueError, match="--targets gate: neox has no such projection"):
        tune(folder, thresholds="uniform", targets=["gate"], output_dir=tmp_path / "none")


def test_uniform_thresholds_keep_their_statistics(base, tmp_path):
    out = tune(base, thresholds="uniform", epochs=0.1, output_dir=tmp_path / "out")
    before, after = (load_statistics(folder / STATISTICS_NAME, folder) for folder in (base, out))
    assert not (out / TABLE).exists() and after.threshold(1, "v", 0.5) == before.threshold(1, "v", 0.5)


def test_the_model_tunes_on_its_own_text(base, tmp_path):
    out = tune(base, data=None, num_tokens=400, epochs=0.2, sparsity=0, loss="next_token", output_dir=tmp_path / "out")
    assert read_json(out / "finetune.json")["text_tokens"] == {"the model's own, seed 0": 360}


@pytest.fixture
def stopped(monkeypatch) -> list[int]:
    """The steps made, of which the eighth is interrupted. Each is saved."""
    monkeypatch.setattr(finetune, "LOOK_SECONDS", 0)
    monkeypatch.setattr(finetune, "SAVE_SECONDS", 0)
    original, steps = Training.step, []

    def stop(self, step):
        steps.append(step)
        if len(steps) == 8:
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(Training, "step", stop)
    return steps


def test_a_stopped_run_goes_on_to_the_same_losses(base, tuned, tmp_path, stopped):
    chosen = {"sparsity": [0.3, 0.6], "own_tokens": 400, "output_dir": tmp_path / "out"}
    with pytest.raises(KeyboardInterrupt):
        tune(base, **chosen)
    state = tmp_path / "out.state.safetensors"
    assert state.exists() and not (tmp_path / "out").exists()

    # other options, another text and another checkpoint are refused
    other = shutil.copytree(base, tmp_path / "other")
    change_config(other, rope_theta=5000.0)
    (other / TABLE).unlink()
    table = load_table(base / TABLE)
    table.metadata.pop("fingerprint")
    table.save(other / TABLE)
    for folder, changes, message in (
        (base, {"rank": 8}, "another rank: '4', now '8'; go on with the same, delete the file"),
        (base, {"sparsity": [0.3]}, r"another sparsity: '\[0.3, 0.6\]', now '\[0.3\]'"),
        (base, {"num_tokens": 1100}, "another number of tokens: '1480', now"),
        (base, {"seed": 1}, "another (seed|text or cut table)"),
        (other, {"data": base / "text.txt"}, "another checkpoint"),
    ):
        with pytest.raises(ValueError, match=f"is of a run with {message}"):
            tune(folder, **chosen | changes)

    # so is a damaged one
    saved = state.read_bytes()
    with safe_open(state, "pt") as file:
        metadata = file.metadata()
    for name, change in (("layers.0.attention.wo.b.o", None), ("layers.1.feed_forward.w2.a.down.exp_avg", slice(1))):
        tensors = load_file(state)
        damaged = tensors.pop(name)
        save_file(tensors if change is None else tensors | {name: damaged[change].clone()}, state, metadata)
        with pytest.raises(ValueError, match=f"is damaged: {name} is missing or has another shape; delete it"):
            tune(base, **chosen)
        state.write_bytes(saved)

    # the same ones end as a run that was not stopped
    with pytest.warns(UserWarning, match="goes on where an earlier run stopped, after step 7 of 18"):
        out = tune(base, **chosen)
    assert stopped == [*range(8), *range(7, 18)] and not state.exists()
    assert read_json(out / "finetune.json")["losses"] == read_json(tuned / "finetune.json")["losses"]
    assert (out / "model.safetensors").read_bytes() == (tuned / "model.safetensors").read_bytes()
    expected, table = (load_table(folder / TABLE) for folder in (tuned, out))
    assert table.metadata == expected.metadata
    assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in table.tensors.items())


def test_a_recorded_step_does_what_others_do(base, tuned, tmp_path, stopped, monkeypatch):
    recorded = []

    def record(launch, *state):
        before = [tensor.clone() for tensor in state]
        launch()
        assert all(map(torch.equal, before, state))  # record_graph would undo the change
        recorded.append(launch)
        return SimpleNamespace(replay=launch)

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(finetune, "keep_all", lambda *_: True)
    monkeypatch.setattr(fused_step, "record_graph", record)
    chosen = {"sparsity": [0.3, 0.6], "own_tokens": 400, "output_dir": tmp_path / "out", "compile": True}
    with pytest.raises(KeyboardInterrupt):
        tune(base, **chosen)
    with pytest.warns(UserWarning, match="after step 7 of 18"):
        out = tune(base, **chosen)
    assert len(recorded) == 2
    assert read_json(out / "finetune.json")["losses"] == read_json(tuned / "finetune.json")["losses"]


def test_a_state_that_is_none(base, tmp_path):
    (tmp_path / "out.state.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"truncated or not a state of finetuning file .*; delete it"):
        tune(base, output_dir=tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 40}, "40 tokens of text are one window of 40; another one must be held out"),
        ({"num_tokens": 30}, "3291 tokens of text, 30 asked for: at least 256 are needed"),
        ({"context": 4000}, "--context 4000 exceeds the model's context of 160"),
        ({"sparsity": [0.1, 0.2, 0.3], "batch_size": 2}, "--batch_size 2 has no row for each of 3 levels"),
        ({"sparsity": [0.3, 0.9], "thresholds": "refined"}, "outside what the cut table covers"),
        ({"targets": ["q", "w"]}, "invalid choice: 'w'"),
        ({"rank": 0}, "--rank 0 must be at least 1"),
        ({"learning_rate": "nan"}, "--learning_rate nan must be above 0"),
        ({"epochs": 0}, "--epochs 0.0 must be above 0"),
        ({"thresholds": "greedy"}, "no cut table beside"),
        ({"data": "none.txt"}, "none.txt does not exist"),
    ],
)
def test_mistakes(base, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tune(base, **{"output_dir": tmp_path / "out"} | changes)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_tuned(base, tmp_path):
    o = {"mode": "int8", "num_tokens": 0, "device": "cpu", "output_dir": tmp_path / "int8"}
    int8 = quantize.main(flags(checkpoint_path=base, **o))
    with pytest.raises(ValueError, match="has int8 weights; tune the checkpoint that it was made from"):
        tune(int8)
    with pytest.raises(ValueError, match="is there already; delete it"):
        tune(base, output_dir=int8)
    copy = shutil.copytree(base, tmp_path / "damaged")
    tensors = load_file(copy / "model.safetensors")
    tensors["norm.weight"][3] = float("nan")
    save_file(tensors, copy / "model.safetensors")
    table = load_table(copy / TABLE)
    table.metadata.pop("fingerprint")
    table.save(copy / TABLE)
    with pytest.raises(ValueError, match=r"the loss at --learning_rate 0\.01 in float32 is not finite"):
        tune(copy, data=base / "text.txt", output_dir=tmp_path / "out")


@pytest.mark.gpu
@pytest.mark.parametrize(("compiled", "kept"), [(True, 1.0), (True, 0.0), (False, 1.0)])
def test_on_a_gpu(base, tmp_path, stopped, monkeypatch, compiled, kept):
    monkeypatch.setattr(finetune, "KEPT", kept)
    recorded, record = [], fused_step.record_graph
    monkeypatch.setattr(fused_step, "record_graph", lambda *args: recorded.append(record(*args)) or recorded[-1])

    # with a stop: what a graph reads is what the state set
    chosen = {"device": "cuda", "compile": compiled or None, "output_dir": tmp_path / "out"}
    with pytest.raises(KeyboardInterrupt):
        tune(base, sparsity=[0.3, 0.6], **chosen)
    with pytest.warns(UserWarning, match="after step 7 of"):
        out = tune(base, sparsity=[0.3, 0.6], **chosen)
    assert len(recorded) == (2 if compiled and kept else 0)
    losses = read_json(out / "finetune.json")["losses"]
    assert sum(losses[-4:]) < sum(losses[:4])

    # as on a CPU, without one
    out = tune(base, sparsity=[0.3, 0.6], output_dir=tmp_path / "cpu")
    assert losses == pytest.approx(read_json(out / "finetune.json")["losses"], rel=0.02)


def test_without_head_shares_all_tensors():
    model = build(Transformer, SMALL)
    headless = finetune.without_head(model)
    for name, tensor in headless.state_dict().items():
        assert tensor.data_ptr() == model.state_dict()[name].data_ptr()
