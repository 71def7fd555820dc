"""The adapter to the lm-evaluation-harness against `model.score`. tests/parity compares it with PyTorch."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from lm_eval.tasks import manager as task_manager
from reference import our_model

from opt_jax import OPTForCausalLM, OPTTokenizer
from opt_jax.cli import main
from opt_jax.evaluation.harness import OPTLM, find_tasks, run

pytestmark = pytest.mark.slow

CONTEXT = 64
make: Any = OPTLM  # the harness's decorator hides the class's type
TEXTS = [
    "def f(x):",
    "import os",
    "class A:\n    def f(self):\n        return self.a + self.b",
    "if x:",
    "for i in",
] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return OPTTokenizer.from_pretrained("tiny")


@pytest.fixture(scope="module")
def model(tokenizer):
    return our_model("opt-125m", vocab_size=len(tokenizer), max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def lm(model, tokenizer):
    return make(model, tokenizer=tokenizer, batch_size=4)


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


def test_loglikelihood_of_continuations(lm, model, tokenizer):
    pairs = [(text, f" return {i}") for i, text in enumerate(TEXTS)] + [("", "import os"), ("x ", "= 1")]
    results = lm.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(pairs, results, strict=True):
        ids = tokenizer.encode(context + continuation)
        first = 1 if not context else len(tokenizer.encode(context.rstrip()))  # the space belongs to the token after it
        assert value == pytest.approx(float(model.score([ids])[0, first:].sum()), rel=1e-5)
        assert greedy is False
    prompt = tokenizer.encode("def f(x):")
    best = model.generate([prompt], max_new_tokens=3, eos_token_id=[]).sequences[0, len(prompt) :].tolist()
    ((value, greedy), (_, other)) = lm._loglikelihood_tokens([(None, prompt, best), (None, prompt, best[:2] + [9])])
    assert greedy is True and other is False and value > -30


def test_a_context_that_is_too_long_loses_its_beginning(lm, model):
    ids = np.random.RandomState(0).randint(3, 4096, 100).tolist()
    ((value, _),) = lm._loglikelihood_tokens([(None, ids[:-3], ids[-3:])], disable_tqdm=True)
    assert value == pytest.approx(float(model.score(np.array([ids[-CONTEXT - 1 :]]))[0, -3:].sum()), rel=1e-5)
    with pytest.raises(ValueError, match="a context of 10 and a continuation of 65 tokens: .* at most 64"):
        lm._loglikelihood_tokens([(None, ids[:10], ids[:65])])
    with pytest.raises(ValueError, match="a continuation of 0 tokens: neither may be empty"):
        lm._loglikelihood_tokens([(None, ids[:10], [])])


def test_rolling_scores_every_token_once(lm, model, tokenizer):
    long = " ".join(TEXTS)
    ids = [2, *tokenizer.encode(long)]  # as with `hf`, the </s> of the text is predicted too
    assert CONTEXT < len(ids) < 2 * CONTEXT
    expected = model.score(np.array([ids[: CONTEXT + 1]]))[0, 1:].sum()
    rest = len(ids) - CONTEXT - 1
    expected += model.score(np.array([ids[-CONTEXT - 1 :]]))[0, -rest:].sum()
    short, value = lm.loglikelihood_rolling(requests(("import os",), (long,)), disable_tqdm=True)
    assert value == pytest.approx(float(expected), rel=1e-5)
    assert short == pytest.approx(float(model.score([[2, *tokenizer.encode("import os")]])[0, 1:].sum()), rel=1e-5)


def test_few_compilations(lm, tokenizer, compiled):
    """One for each bucket of lengths and one for the last batch, not one for each length."""
    text = " ".join(TEXTS)
    contexts = [text[:n] for n in range(4, 94, 3)]
    rows = [len(tokenizer.encode(context + " x")) - 1 for context in contexts]
    assert len(set(rows)) > 15 and len(contexts) % 4 == 2
    jax.clear_caches()
    compiled.clear()
    lm.loglikelihood(requests(*((context, " x") for context in contexts)), disable_tqdm=True)
    scores = [name for name in compiled if "_score" in name]
    buckets = {next(b for b in (16, 24, 32, 48, 64) if n <= b) for n in rows}
    assert 1 <= len(scores) <= len(buckets) + 1, (scores, buckets)
    compiled.clear()
    lm.loglikelihood(requests(*((context, " yz") for context in contexts[1:-1])), disable_tqdm=True)
    assert len([name for name in compiled if "_score" in name]) <= 1  # the last batch may have another number of rows


def test_generation_ends_at_new_stop_strings_which_are_cut_off(lm, model, tokenizer):
    free = dict(until=["\x00"], max_gen_toks=10)
    texts = lm.generate_until(requests(*((text, free) for text in TEXTS[:5])), disable_tqdm=True)
    for prompt, text in zip(TEXTS, texts, strict=False):
        ids = tokenizer.encode(prompt)
        out = model.generate([ids], max_new_tokens=10)
        assert text == tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    stop = texts[0][3:5]
    assert stop and stop not in texts[0][:4]
    stopped = lm.generate_until(
        requests(
            (TEXTS[0], dict(until=[stop], max_gen_toks=10)),
            (TEXTS[1], free),
            (TEXTS[0], dict(until=stop, max_gen_toks=10, do_sample=False, temperature=0.7, top_p=0.9)),
        ),
        disable_tqdm=True,
    )
    assert stopped == [texts[0][: texts[0].index(stop)], texts[1], stopped[0]]
    straddling = TEXTS[0][-1] + texts[0][0]  # it begins in the prompt, so it ends nothing
    assert straddling not in texts[0]
    (text,) = lm.generate_until(requests((TEXTS[0], dict(until=[straddling], max_gen_toks=10))), disable_tqdm=True)
    assert text == texts[0]


def test_options_of_generation(lm):
    sampled = dict(until=["\n\n"], max_gen_toks=8, do_sample=True, temperature=1.5, top_k=500)
    texts = lm.generate_until(requests(*[("import os", sampled)] * 3), disable_tqdm=True)
    assert len(set(texts)) > 1  # equal requests are drawn independently
    with pytest.raises(ValueError, match="no_such_option"):
        lm.generate_until(requests(("x", sampled | dict(no_such_option=1))), disable_tqdm=True)
    with pytest.raises(ValueError, match="64 new tokens leave no room for a prompt in the context of 64"):
        lm.generate_until(requests(("x", dict(until=[], max_gen_toks=64))), disable_tqdm=True)


def test_the_tokenizer_comes_from_where_the_model_does(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"not in the cache {tmp_path}"):
        make("no-such/model", cache_dir=tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(device="cuda"), "device is not an option of opt-jax"),
        (dict(batch_size="auto"), "batch_size 'auto' must be a number"),
        (dict(batch_size=0), "batch size 0"),
        (dict(max_length=65), "max_length 65: must be at least 1 and at most 64"),
        (dict(dtype="float32"), "dtype: only for a model that is loaded by name"),
        (dict(tokenizer=None), "a model object does not know its tokenizer"),
    ],
)
def test_bad_arguments(model, tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(model, **(dict(tokenizer=tokenizer) | arguments))


# Through the harness itself -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks")
    rows = [dict(text=text, label=i % 2) for i, text in enumerate(TEXTS[:5])]
    (path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = dict(
        task="colours",
        dataset_path="json",
        dataset_kwargs={"data_files": {"test": str(path / "data.jsonl")}},
        test_split="test",
        output_type="multiple_choice",
        doc_to_text="{{text}}",
        doc_to_target="label",
        doc_to_choice=[" red", " green"],
        metric_list=[{"metric": "acc"}],
    )
    (path / "colours.yaml").write_text(json.dumps(task))
    return path


def test_by_its_name_in_python(tasks):
    import lm_eval

    manager, names = find_tasks(["colours"], [str(tasks)])
    evaluate: Any = lm_eval.simple_evaluate
    report = evaluate(
        model="opt-jax",
        model_args=dict(pretrained="tiny", dtype="float32"),
        tasks=names,
        task_manager=manager,
        batch_size=2,
        bootstrap_iters=0,
    )
    assert report["n-samples"]["colours"]["effective"] == 5 and 0 <= report["results"]["colours"]["acc,none"] <= 1


def test_command(tasks, capsys, tmp_path):
    words = ["eval", "tiny", "--tasks", "colours", "--include-path", str(tasks), "--limit", "3", "--batch-size", "2"]
    assert main(words) == 0
    assert "|colours|" in capsys.readouterr().out
    output = tmp_path / "out.json"
    assert main([*words, "--json", "--output", str(output), "--log-samples"]) == 0
    report = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out) == report
    assert report["results"]["colours"]["sample_len"] == 3 and len(report["samples"]["colours"]) == 3
    assert report["model"] == "tiny" and report["harness"]["n-shot"]["colours"] == 0
    tokenizer, prompt = OPTTokenizer.from_pretrained("tiny"), report["samples"]["colours"][0]["arguments"][0]
    value = float(report["samples"]["colours"][0]["resps"][0][0][0])
    ids = tokenizer.encode("".join(prompt))
    scores = OPTForCausalLM.from_pretrained("tiny").score([ids])[0]
    assert value == pytest.approx(float(scores[len(tokenizer.encode(prompt[0])) :].sum()), rel=1e-5)


def test_a_series_of_checkpoints(tasks, capsys, tmp_path, compiled):
    """With one compilation, the numbers of single runs."""
    tokenizer = OPTTokenizer.from_pretrained("tiny")
    for step in (2, 10):
        trained = our_model("opt-125m", seed=step, vocab_size=len(tokenizer), max_position_embeddings=CONTEXT)
        trained.save_pretrained(tmp_path / "models" / f"step{step}", tokenizer=tokenizer)
    words = ["--tasks", "colours", "--include-path", str(tasks), "--log-samples", "--output", str(tmp_path / "x.json")]
    assert main(["eval", str(tmp_path / "models"), "--all-checkpoints", *words]) == 0
    programs = sum("_score" in name for name in compiled)
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    reports = json.loads((tmp_path / "x.json").read_text())
    assert [report["step"] for report in reports] == [2, 10]
    assert reports[0]["samples"] != reports[1]["samples"]
    compiled.clear()
    assert main(["eval", reports[1]["model"], *words, "--json"]) == 0
    single = json.loads(capsys.readouterr().out)
    assert reports[1]["results"] == single["results"] and reports[1]["samples"] == single["samples"]
    assert sum("_score" in name for name in compiled) == programs > 0
    accuracies = [f"{report['results']['colours']['acc,none']:.4f}" for report in reports]
    assert [row[:2] for row in table[-4:-2]] == [["step2", accuracies[0]], ["step10", accuracies[1]]]


def test_tasks_that_nobody_has(tasks, capsys):
    assert main(["eval", "tiny", "--tasks", "colours", "--include-path", str(tasks / "none")]) == 1
    assert capsys.readouterr().err == f"opt-jax: error: --include-path {tasks / 'none'}: no such directory\n"


def test_tasks_of_the_harness_itself(tasks, tmp_path, monkeypatch):
    """The harness is cut down to one task: reading all of its 14,000 takes a minute."""
    real = Path(task_manager.__file__)
    shutil.copytree(real.parent / "piqa", tmp_path / "piqa")
    monkeypatch.setattr(task_manager, "__file__", str(tmp_path / real.name))
    assert find_tasks(["colours,piqa"], [str(tasks)])[1] == ["colours", "piqa"]
    with pytest.raises(ValueError, match="--tasks no_such_task: no such task, neither in --include-path nor"):
        find_tasks(["colours", "no_such_task"], [str(tasks)])


def test_a_file_that_is_no_task_is_an_error_of_one_line(tmp_path):
    for name in ("a", "b"):  # the harness compares their names
        (tmp_path / f"{name}.yaml").write_text("task: null" if name == "a" else "task: b")
    with pytest.raises(ValueError, match=f"--include-path {tmp_path}: the tasks there cannot be read"):
        find_tasks(["b"], [str(tmp_path)])


def test_settings_reach_the_harness(tasks, model, tokenizer):
    report = run(model, tokenizer, find_tasks(["colours"], [str(tasks)]), 4, limit=0.4)
    assert report["results"]["colours"]["sample_len"] == 2 and "samples" not in report
