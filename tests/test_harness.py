"""Tasks of the LM evaluation harness: our model against the harness's own Hugging Face class on the same weights."""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
from lm_eval.api.instance import Instance
from models import flags

import eval as evaluation
import harness
from calibrate import collect
from convert_hf_checkpoint import main as convert
from harness import HarnessModel
from model import Transformer
from sparse_model import SparseTransformer
from thresholds import uniform
from tokenizer import load_tokenizer

TASKS = Path(__file__).parents[1] / "benchmarks" / "tasks"
PAIRS = [
    ("Hello, my name", " is Ann"),
    ("Hello, my name", " is"),
    ("Hello, my name", " was"),
    ("", "A story of rivers"),
]
PAIRS += [("this is ", "a story"), ("x " * 90, "and so on"), ("rivers", " rivers")]


@pytest.fixture(scope="module")
def both(tiny, tmp_path_factory) -> tuple[Path, Path]:
    """The same random weights as a Hugging Face folder and converted."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("harness")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=160,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "hf")
    content = json.loads((tiny / "tokenizer.json").read_text())
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] = [{"id": i, "content": s, **special} for i, s in ((1, "<s>"), (2, "</s>"))]
    vocabulary = content["model"]["vocab"]
    for i, name in ((1, "<s>"), (2, "</s>")):
        vocabulary.pop(next(token for token, token_id in vocabulary.items() if token_id == i))
        vocabulary[name] = i
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder / "hf")
    convert(flags(checkpoint_dir=folder / "hf", output_dir=folder / "tiny"))
    return folder / "hf", folder / "tiny"


def ours(folder: Path, sparse_fraction: float | None = None, batch_size: int = 4) -> HarnessModel:
    cls = Transformer if sparse_fraction is None else SparseTransformer
    model = cls.from_checkpoint(folder, dtype=torch.float32)
    return HarnessModel(model, load_tokenizer(folder), sparse_fraction, batch_size)


def cut(mine: HarnessModel, sparsity: float) -> None:
    """Sets uniform thresholds and starts counting."""
    tokens = torch.randint(300, (4, 64), generator=torch.Generator().manual_seed(1))
    statistics = collect(mine.model, tokens)
    mine.model.set_cuts(uniform(None, lambda: statistics, sparsity))
    mine.model.reset_counts()


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def test_numbers_are_those_of_the_harnesss_own_class(both):
    pytest.importorskip("accelerate", reason="lm-eval's Hugging Face class needs accelerate")
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(both[0]), device="cpu", dtype="float32", batch_size=2)
    mine = ours(both[1])
    assert (mine.max_length, mine.prefix_token_id, mine.eot_token_id) == (160, 1, 2)
    requests = instances("loglikelihood", PAIRS)
    for (a, same), (b, also) in zip(mine.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert a == pytest.approx(b, abs=1e-3) and same == also

    texts = instances("loglikelihood_rolling", [("Hello, my name is Ann.",), ("a story of rivers. " * 60,)])
    assert mine.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-4)

    options = {"until": ["r", "zz"], "max_gen_toks": 12, "do_sample": False}
    prompts = ["Hello, my name", "Hello, my", "this is a story of", "y " * 100]
    continuations = instances("generate_until", [(prompt, options) for prompt in prompts])
    found = mine.generate_until(continuations)
    assert found == theirs.generate_until(continuations) and any(found)
    unlimited = instances("generate_until", [(prompt, {"max_gen_toks": 12}) for prompt in prompts])
    assert mine.generate_until(unlimited) == theirs.generate_until(unlimited)


@pytest.mark.parametrize("fraction", [0.5, 0.99])
def test_sparse_requests_are_cut_as_windows_are_and_batches_change_nothing(both, fraction):
    runs = []
    for batch_size in (1, 4):
        mine = ours(both[1], fraction, batch_size)
        cut(mine, 0.5)
        found = mine.loglikelihood(instances("loglikelihood", PAIRS))
        runs.append((found, mine.model.achieved_sparsity()))
    for (a, _), (b, _) in zip(*(found for found, _ in runs), strict=True):
        assert a == pytest.approx(b, abs=1e-3)
    assert runs[0][1] == pytest.approx(runs[1][1], abs=1e-6) and 0.3 < runs[0][1] < 0.7
    context, continuation = (mine.tok_encode(part) for part in ("this is a story of", " rivers and"))
    idx = torch.tensor([context + continuation])
    logits = mine.model(idx[:, :-1], dense_prefix=round((idx.shape[1] - 1) * (1 - fraction)))[0]
    expected = torch.log_softmax(logits, -1)[len(context) - 1 :].gather(1, torch.tensor(continuation)[:, None]).sum()
    ((value, _),) = mine._loglikelihood_tokens([(None, context, continuation)], disable_tqdm=True)
    assert value == pytest.approx(expected.item(), abs=1e-4)


def test_new_tokens_are_cut_too(both):
    mine = ours(both[1], 0.5)
    cut(mine, 0.6)
    mine.generate_until(instances("generate_until", [("Hello, my name is", {"max_gen_toks": 9})]))
    prompt = len(mine.tok_encode("Hello, my name is"))
    assert mine.model.sites[0].steps <= prompt - round(prompt * 0.5) + 8
    assert mine.model.sites[0].steps > prompt - round(prompt * 0.5)
    with pytest.raises(ValueError, match="only greedy generation"):
        mine.generate_until(instances("generate_until", [("a", {"do_sample": True})]))


DOCUMENTS = {
    "multiple_choice": [{"query": "Question: Who?\n", "choices": ["Ann", "a river", "this"], "gold": 1}] * 3,
    "winogrande": [{"context_options": ["this is Ann", "this is a river"], "continuation": "of rivers.", "gold": 0}]
    * 3,
    "cloze": [{"context": "Hello, my name is", "continuation": "Ann"}] * 3,
    "gsm8k": [{"context": "One and one?", "chain_of_thought": "1 + 1 = 2", "answer": "2"}] * 3,
}


@pytest.mark.parametrize("task", DOCUMENTS)
def test_task_files_with_a_local_jsonl(both, tmp_path, capsys, monkeypatch, task):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS[task]))
    task_file = tmp_path / f"{task}.yaml"  # the context of this model is short
    task_file.write_text((TASKS / task_file.name).read_text().replace("do_sample:", "max_gen_toks: 20\n  do_sample:"))
    options = {"checkpoint_path": both[1], "tasks": str(task_file), "data": path, "limit": 2}
    result = evaluation.main(flags(**options, precision="float32", json=True))
    (scores,) = result["results"].values()
    assert scores and all(isinstance(value, float) for value in scores.values())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["sparsity"] == 0 and set(result) >= {"task", "model", "achieved_sparsity", "thresholds"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "no_such_task"}, "unknown task 'no_such_task'"),
        ({"tasks": "absent.yaml"}, r"absent.yaml does not exist"),
        ({"tasks": str(TASKS / "cloze.yaml"), "data": Path("absent.jsonl")}, r"absent.jsonl does not exist"),
        ({"tasks": str(TASKS / "cloze.yaml")}, r"cloze.yaml names no data; give it --data"),
        ({"tasks": "piqa", "data": Path("a.jsonl")}, r"--data is for perplexity and task files; piqa"),
    ],
)
def test_mistakes(both, options, message):
    with pytest.raises(ValueError, match=message):
        evaluation.main(flags(checkpoint_path=both[1], precision="float32", **options))


def test_code_that_the_model_writes_runs_with_consent_alone(both, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    runs = []
    monkeypatch.setattr(harness, "simple_evaluate", lambda *_, **options: runs.append(options) or {"results": {}})
    with pytest.raises(ValueError, match=r"task humaneval_64 runs code .* --confirm_run_unsafe_code allows it"):
        evaluation.main(flags(checkpoint_path=both[1], tasks="humaneval_64"))  # which includes humaneval's file
    assert not runs and os.environ["HF_ALLOW_CODE_EVAL"] == "0"
    evaluation.main(flags(checkpoint_path=both[1], tasks="piqa"))
    evaluation.main(flags(checkpoint_path=both[1], tasks="humaneval", confirm_run_unsafe_code=True))
    assert [run["confirm_run_unsafe_code"] for run in runs] == [False, True]
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "line 1 of .* is not valid JSON"),
        ("[1]\n", "element 1 of .* is not a JSON object"),
        ("", "is empty; give it a line of JSON per document"),
        ("\n\n", "is empty"),
        ('{"other": 1}\n', "cannot be evaluated"),
        ('{"query": "a"}\n{"query": 1}\n', "the documents of .* are not alike"),
    ],
)
def test_data_that_are_no_documents(both, tmp_path, content, message):
    path = tmp_path / "broken.jsonl"
    path.write_text(content)
    options = {"tasks": str(TASKS / "multiple_choice.yaml"), "data": path, "precision": "float32"}
    with pytest.raises(ValueError, match=message):
        evaluation.main(flags(checkpoint_path=both[1], **options))


@pytest.mark.parametrize(("suffix", "mark"), [("txt", b""), ("JSON", b"\xef\xbb\xbf"), ("jsonl.gz", b"")])
def test_data_of_any_suffix(tmp_path, suffix, mark):
    documents = [{"query": "é", "gold": 0}, {"query": "b", "choices": ["c"]}]
    content = mark + "\r\n".join(map(json.dumps, documents)).encode()
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    config, _ = harness.load_task(str(TASKS / "multiple_choice.yaml"), path)
    every_field = {"query": None, "gold": None, "choices": None}
    assert config["custom_dataset"]()["test"].to_list() == [every_field | document for document in documents]


WRITES = "{{ cycler.__init__.__globals__.os.system('touch MARK') }}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f'doc_to_text: "{WRITES}"', "cannot be evaluated .SecurityError"),
        (f'doc_to_target: "{WRITES}"', "cannot be evaluated .SecurityError"),
        (f'doc_to_choice: "{WRITES}"', "cannot be evaluated .SecurityError"),
        (f'gen_prefix: "{WRITES}"', "cannot be evaluated .SecurityError"),
        (f'description: "{WRITES}"', "cannot be evaluated .SecurityError"),
        (f'fewshot_config: {{doc_to_text: "{WRITES}"}}', "cannot be evaluated .SecurityError"),
        ("doc_to_text: !function os.getcwd", "is not a task file"),
        ("doc_to_text: !!python/object/apply:os.getcwd []", "is not a task file"),
        ("metric_list: [{metric: ./evil.py}]", "the metric './evil.py', which may run code"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]", "hf_evaluate, which may run code"),
        ("metric_list: [{metric: [acc]}]", "which may run code"),
        ("metric_list: &a [{metric: acc}, *a]", "is not a task file"),
        ("task: [{task: piqa, doc_to_text: x}]", "a task inside, which may run code"),
        ("use_prompt: promptsource:x", "use_prompt, which may run code"),
        ("unsafe_code: true", "unsafe_code, which may run code"),
        ("class: os.getcwd", "class, which may run code"),
        ("dataset_kwargs: {trust_remote_code: true}", "trust_remote_code, which may run code"),
        ("include: other.yaml", "cannot be evaluated .TypeError"),
    ],
)
def test_a_task_file_cannot_run_code(both, tmp_path, line, message):
    key = line.split(":")[0]
    lines = [text for text in (TASKS / "multiple_choice.yaml").read_text().splitlines() if not text.startswith(key)]
    lines = [text for text in lines if key != "metric_list" or not text.startswith("  -")]
    (tmp_path / "task.yaml").write_text("\n".join([*lines, line.replace("MARK", str(tmp_path / "mark"))]))
    documents = [document | {"query": str(i)} for i, document in enumerate(DOCUMENTS["multiple_choice"])]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    runner, few = ours(both[1]), 1 if key == "fewshot_config" else 0
    if few:
        with open(tmp_path / "task.yaml", "a") as file:
            file.write("\nfewshot_split: test\n")
    with pytest.raises(ValueError, match=message):
        harness.evaluate(runner, str(tmp_path / "task.yaml"), tmp_path / "data.jsonl", few)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("limit", [3, "3"])
def test_the_token_limit_by_all_its_names(both, name, limit):
    mine = ours(both[1])
    mine.text_tokenizer.eos_ids = ()
    passes, logits = [], mine._logits
    mine._logits = lambda *args: passes.append(args) or logits(*args)
    total = {"max_gen_toks": 1, "max_length": len(mine.tok_encode("Hello")) + 3}
    for options in ({name: limit, "until": None}, {name: limit, "until": [""]}, total):
        passes.clear()
        mine.generate_until(instances("generate_until", [("Hello", options)]))
        assert len(passes) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": False, "temperature": 0.7}, None),
        ({"do_sample": False, "temperature": "0.7", "top_p": 0.9, "num_beams": 1}, None),
        ({"temperature": "0.0"}, None),
        ({"do_sample": True}, "only greedy generation"),
        ({"temperature": 0.7}, "only greedy generation"),
        ({"temperature": "0.7"}, "only greedy generation"),
        ({"max_gen_toks": "many"}, "cannot be read"),
        ({"temperature": None}, "cannot be read"),
        ({"max_gen_toks": 160}, "asks for 160 new tokens; the model's context is 160"),
        ({"num_beams": 4}, "asks for num_beams .*, which is not supported"),
        ({"repetition_penalty": 1.3}, "asks for repetition_penalty"),
    ],
)
def test_options_as_the_harness_reads_them(both, options, message):
    mine = ours(both[1])
    request = instances("generate_until", [("Hello", {"max_gen_toks": 2} | options)])
    if message is None:
        assert mine.generate_until(request) == mine.generate_until(
            instances("generate_until", [("Hello", {"max_gen_toks": 2})])
        )
    else:
        with pytest.raises(ValueError, match=message):
            mine.generate_until(request)


def test_what_is_not_finite_has_no_score(both):
    mine = ours(both[1])
    mine.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        mine.loglikelihood(instances("loglikelihood", PAIRS))
    with pytest.raises(ValueError, match="not finite"):
        mine.generate_until(instances("generate_until", [("Hello", {"max_gen_toks": 2})]))


def test_without_lm_eval(both, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "harness", None)
    with pytest.raises(ValueError, match="need"):
        evaluation.main(flags(checkpoint_path=both[1], tasks="piqa"))
