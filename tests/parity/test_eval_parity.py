"""Perplexity and tasks of the lm-evaluation-harness against PyTorch with the same weights."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from limits import assert_close
from oracle import make_pair, torch, transformers

from convert import to_hf
from convert.source import open_directory
from opt_jax import OPTTokenizer
from opt_jax.evaluation._perplexity import perplexity

VOCABULARY = 4096  # that of the tokenizer of "tiny"
CONTEXT = 64


@pytest.fixture(scope="module")
def pair():
    return make_pair("opt-125m", vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, num_hidden_layers=1)


@pytest.fixture(scope="module")
def ids(shared_data):
    text = (shared_data / "wikitext-2" / "valid.txt").read_text(encoding="utf-8")[:3000]
    return np.array(OPTTokenizer.from_pretrained("tiny").encode(text), np.int32)


def torch_loss(hf, ids, scored):
    """PyTorch's sum of the losses of the last `scored` tokens."""
    labels = torch.from_numpy(ids).long()[None]
    with torch.no_grad():
        logits = hf(labels).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits[-scored:], labels[0, 1:][-scored:], reduction="sum").item()


def test_non_overlapping_windows(pair, ids):
    """The mean of the mean losses of full windows, as in GPTQ's `opt_eval` (opt.py), which gives published numbers."""
    hf, ours = pair
    count = len(ids) // CONTEXT
    losses = [torch_loss(hf, ids[i * CONTEXT : (i + 1) * CONTEXT], CONTEXT - 1) / (CONTEXT - 1) for i in range(count)]
    result = perplexity(ours, ids)
    assert count > 8 and len(ids) % CONTEXT and result.windows == count and result.tokens == count * (CONTEXT - 1)
    assert_close(result.loss, np.mean(losses), rtol=1e-5)
    assert_close(result.perplexity, math.exp(np.mean(losses)), rtol=1e-5, what="perplexity")


@pytest.mark.parametrize("stride", [16, 50])
def test_sliding_windows(pair, ids, stride):
    """The loop of https://huggingface.co/docs/transformers/perplexity. Its weights of windows differ slightly."""
    hf, ours = pair
    total, tokens, theirs, previous = 0.0, 0, [0.0, 0], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + CONTEXT, len(ids))
        scored = end - previous - (begin == 0)
        loss = torch_loss(hf, ids[begin:end], scored)
        total, tokens, previous = total + loss, tokens + scored, end
        weight = scored - (begin > 0)  # the page subtracts one token too many
        theirs = [theirs[0] + loss / scored * weight, theirs[1] + weight]
        if end == len(ids):
            break
    result = perplexity(ours, ids, "sliding", stride=stride)
    assert result.tokens == tokens == len(ids) - 1
    assert_close(result.loss, total / tokens, rtol=1e-5)
    assert_close(result.perplexity, math.exp(total / tokens), rtol=1e-5)
    assert_close(result.loss, theirs[0] / theirs[1], rtol=1e-3)  # the weights matter little


# The harness ------------------------------------------------------------------------------------------------


TASKS: dict[str, dict[str, Any]] = {
    "choice": dict(
        output_type="multiple_choice",
        doc_to_text="{{sentence}} It was",
        doc_to_target="label",
        doc_to_choice=["terrible", "great"],
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
        num_fewshot=1,
        fewshot_split="validation",
    ),
    "last_words": dict(  # a continuation of several tokens: its likelihood, and whether it is the greedy one
        output_type="loglikelihood",
        doc_to_text="{{sentence[:20]}}",
        doc_to_target="{{sentence[20:]}}",
        metric_list=[{"metric": "perplexity"}, {"metric": "acc"}],
    ),
    "rolling": dict(
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{sentence}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    ),
    "generation": dict(
        output_type="generate_until",
        doc_to_text="{{sentence}}",
        doc_to_target="{{sentence}}",
        generation_kwargs=dict(until=["\n\n", "a"], max_gen_toks=12, do_sample=False, temperature=0.0),
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pair, shared_data) -> Path:
    """A directory with our model, its export by `convert.to_hf`, texts of SST-2 and WikiText-2, and tasks over them."""
    path = tmp_path_factory.mktemp("harness")
    pair[1].save_pretrained(path / "orbax", tokenizer=OPTTokenizer.from_pretrained("tiny"))
    to_hf.convert(open_directory(path / "orbax"), path / "hf")
    lines = (shared_data / "sst2" / "dev.tsv").read_text(encoding="utf-8").splitlines()[:12]
    rows = [dict(zip(("sentence", "label"), line.split("\t"), strict=True)) for line in lines]
    rows = [row | {"label": int(row["label"])} for row in rows]
    wikitext = (shared_data / "wikitext-2" / "test.txt").read_text(encoding="utf-8")
    texts = [{"sentence": wikitext[i * 700 : i * 700 + 100 * i]} for i in range(1, 7)]  # up to several windows long
    for name, lines in (("sst2", rows), ("wikitext", texts)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    (path / "tasks").mkdir()
    for name, task in TASKS.items():
        file = path / ("wikitext.jsonl" if name == "rolling" else "sst2.jsonl")
        files = dict(dataset_path="json", dataset_kwargs={"data_files": {"validation": str(file)}})
        task = task | files | dict(task=name, validation_split="validation")  # JSON is YAML
        (path / "tasks" / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def both(folder):
    """Results of `simple_evaluate` for the harness's `hf` model, and for ours."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from opt_jax.evaluation.harness import OPTLM

    hf = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    theirs: Any = HFLM
    make: Any = OPTLM
    models = [theirs(hf, tokenizer=tokenizer, batch_size=5), make(str(folder / "orbax"), batch_size=5)]
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    run: Any = lm_eval.simple_evaluate
    return [run(model=m, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0) for m in models]


@pytest.mark.parametrize("task", TASKS)
def test_same_numbers_as_the_harness_with_pytorch(both, task):
    theirs, ours = (result["results"][task] for result in both)
    numbers = {name: value for name, value in theirs.items() if isinstance(value, float)}
    assert numbers
    for name, value in numbers.items():
        assert_close(ours[name], value, rtol=1e-4, what=name)


@pytest.mark.parametrize("task", TASKS)
def test_same_answer_to_every_request(both, task):
    theirs, ours = (result["samples"][task] for result in both)
    assert len(theirs) == len(ours) == (6 if task == "rolling" else 12)
    for their, our in zip(theirs, ours, strict=True):
        assert json.dumps(their["arguments"]) == json.dumps(our["arguments"])
        for (expected,), (got,) in zip(their["resps"], our["resps"], strict=True):
            if task == "generation":
                assert got == expected
            elif task == "rolling":
                assert_close(got, expected, rtol=1e-4)
            else:
                assert_close(got[0], expected[0], rtol=1e-4)
                assert got[1] == expected[1]
    if task == "generation":
        texts = [text for our in ours for (text,) in our["resps"]]
        assert any(texts) and not any("a" in text for text in texts)
