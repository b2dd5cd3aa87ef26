"""README's "What works with what": every form of a weight in every kind of run, by generate.py."""

import pytest
import torch
from models import CONFIG, flags, write_checkpoint

import calibrate
import eval as evaluate
import finetune
import generate
import greedy
import quantize
from kernels import cpu
from model import read_config
from tp import part_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUANTISED = ["packed", "int8", "int4"]
FORMS = ["plain", *QUANTISED]
SHAPE = CONFIG | {"intermediate_size": 192, "num_key_value_heads": 4, "vocab_size": 300}
TEXT = "Hello, my name is Ann. The story is of rivers and of the sea."


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint in each form, and a file of prompts of different lengths."""
    plain = write_checkpoint(tmp_path_factory.mktemp("org") / "plain", SHAPE, TEXT)
    calibrate.main(flags(checkpoint_path=plain, num_tokens=300, device="cpu"))
    for mode in QUANTISED:
        rounded = mode != "packed"
        quantize.main(flags(mode=mode, checkpoint_path=plain, num_tokens=0 if rounded else None, device="cpu"))
    calibrate.main(flags(checkpoint_path=plain.with_name("plain-int4"), num_tokens=300, device="cpu"))
    (plain.parent / "prompts.txt").write_text("Hello\nHello, my name is Ann. The\nThe sea\n")
    (plain.parent / "text.txt").write_text(TEXT * 20)
    return {form: plain if form == "plain" else plain.with_name(f"plain-{form}") for form in FORMS}


def run(folder, **options) -> dict:
    options = {"compile": True, "prompt": "Hello", "max_new_tokens": 10, "num_samples": 1, "device": DEVICE} | options
    return generate.main(flags(checkpoint_path=folder, **options))


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("form", FORMS)
def test_rows_and_drafts_leave_a_text_as_it_is(folders, form, sparsity):
    if DEVICE == "cpu" and cpu.library() is None:
        pytest.skip("no C++ compiler")
    folder = folders[form]
    text = run(folder, sparsity=sparsity)["text"]
    assert run(folder, sparsity=sparsity, batch_size=3)["text"] == text
    prompts = folder.parent / "prompts.txt"
    assert run(folder, sparsity=sparsity, prompts=prompts, prompt=None)["text"][0] == text
    for draft in ("self", "prompt", folders["int4"], folders["packed"]):
        assert run(folder, sparsity=sparsity, draft=draft)["text"] == text
    if form == "packed":
        assert run(folders["plain"], sparsity=sparsity)["text"] == text


@pytest.mark.parametrize("form", FORMS)
def test_steps_that_are_not_fused(folders, form):
    eager = run(folders[form], sparsity=0.5, compile=None)
    assert eager["text"] and 0.2 < eager["achieved_sparsity"] < 0.8
    many = run(folders[form], sparsity=0.5, compile=None, batch_size=9)
    assert many["batch"] == 9
    with pytest.raises(ValueError, match=r"of different lengths .* need fused steps"):
        run(folders[form], compile=None, prompt=None, prompts=folders[form].parent / "prompts.txt")


@pytest.mark.parametrize("precision", ["float16", "float32"])
@pytest.mark.parametrize("form", FORMS)
def test_other_precisions(folders, form, precision):
    if form == "packed":
        with pytest.raises(
            ValueError, match=f"packed weights are bfloat16: choose --precision bfloat16, not {precision}"
        ):
            run(folders[form], precision=precision)
    else:
        assert run(folders[form], precision=precision, sparsity=0.5)["text"]


@pytest.mark.parametrize("form", FORMS)
def test_what_takes_plain_weights_alone(folders, form):
    config, folder = read_config(folders[form]), folders[form]
    if form == "packed":
        with pytest.raises(ValueError, match="plain-packed has packed weights, which run on one rank"):
            part_of(config, 0, 1)
    else:
        assert part_of(config, 0, 1).config == config
    if form != "plain":
        with pytest.raises(ValueError, match=f"has {form} weights; tune the checkpoint that it was made from"):
            finetune.main(flags(checkpoint_path=folder, device="cpu"))
        with pytest.raises(ValueError, match="is quantised already; give the checkpoint that it was made from"):
            quantize.main(flags(checkpoint_path=folder, mode="packed"))


def test_scripts_that_take_every_form(folders, tmp_path):
    text = {"data": folders["plain"].parent / "text.txt", "device": "cpu"}
    windows = text | {"context": 16, "window": 16, "num_windows": 2, "sparsity": 0.5}
    found = {form: evaluate.main(flags(checkpoint_path=folder, **windows)) for form, folder in folders.items()}
    assert found["plain"] | {"model": "plain-packed"} == found["packed"]
    assert len({result["perplexity"] for result in found.values()}) == 3

    tables = {}
    for form, folder in folders.items():
        output = tmp_path / form
        tables[form] = greedy.main(flags(checkpoint_path=folder, num_tokens=200, step=0.5, output=output, **text))
    shares = {form: table.tensors["0.shares"] for form, table in tables.items()}
    assert torch.equal(shares["plain"], shares["packed"])
