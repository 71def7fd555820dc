"""Fine-tuning: losses and batches of the tasks, SQuAD's rules, LoRA, and the step on one device and on meshes."""

import json
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import exhaustive

from opt_jax import OPTConfig, OPTForCausalLM
from opt_jax.data.windows import Windows
from opt_jax.model.heads import OPTForQuestionAnswering, OPTForSequenceClassification
from opt_jax.model.lora import LoRA, is_adapter, is_trained
from opt_jax.parallel.mesh import make_mesh, use_mesh
from opt_jax.parallel.rules import named_leaves
from opt_jax.training.optimizer import make_optimizer, make_schedule
from opt_jax.training.option_checks import check_options
from opt_jax.training.options import Options
from opt_jax.training.step import (
    batch_loss,
    join,
    make_train_step,
    new_model,
    new_state,
    place_batch,
    split,
    state_shardings,
)
from opt_jax.training.tasks import squad
from opt_jax.training.tasks.classification import Classification, label_config, read_tsv
from opt_jax.training.tasks.common import IGNORED, Batches, make_predict_step, task_loss

CONFIG = OPTConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    ffn_dim=64,
    num_attention_heads=4,
    max_position_embeddings=32,
    dropout=0.1,
    init_std=0.2,
    num_labels=3,
)
BATCH = 8
CLASSES = {"lm": OPTForCausalLM, "classify": OPTForSequenceClassification, "answer": OPTForQuestionAnswering}
RNG = np.random.default_rng(0)
EXAMPLES = [RNG.integers(3, 64, n).tolist() for n in RNG.integers(4, 33, 40)]


@cache
def batches(kind, multiple=4):
    lengths = np.array([len(e) for e in EXAMPLES])
    if kind == "classify":
        labels = RNG.integers(0, 3, 40)
    elif kind == "answer":
        labels = np.stack([lengths // 3, lengths // 2], axis=1)
    else:
        return Windows(np.concatenate(EXAMPLES).astype(np.int32), 16, BATCH)
    return Batches(EXAMPLES, labels, BATCH, 32, pad=1, seed=0, multiple=multiple)


@cache
def programs(kind, rank, spec):
    mesh = make_mesh(spec, devices=jax.devices()[:1] if spec == "data=1" else None)
    schedule = make_schedule(peak=1e-2, warmup_steps=2, steps=30)
    optimizer = make_optimizer(schedule)
    new = lambda: new_model(CONFIG, 0, "float32", CLASSES[kind])  # noqa: E731
    plain = jax.eval_shape(new)
    lora = LoRA(rank, 8.0, ("q_proj", "out_proj", "fc1", "fc2")) if rank else None
    adapted = lora.adapt(plain) if lora else None

    def begin():
        return (
            new_state(lora.initial(adapted, new(), 0), optimizer, is_trained) if lora else new_state(new(), optimizer)
        )

    abstract = jax.eval_shape(begin)
    shardings = state_shardings(abstract, mesh)
    loss = batch_loss if kind == "lm" else task_loss
    step = make_train_step(optimizer, schedule, CONFIG, 0, shardings, mesh, loss_of=loss)
    return mesh, jax.jit(begin, out_shardings=shardings), step, shardings, lora, plain


def train(kind, rank, spec, steps=3, accumulate=1):
    mesh, begin, step, *_ = programs(kind, rank, spec)
    state, losses = begin(), []
    with use_mesh(mesh), jax.transfer_guard("disallow"):
        for n in range(steps):
            batch = place_batch(partial(batches(kind).batch, n), BATCH, accumulate, mesh)
            state, measured = step(state, batch)
            losses.append([float(jax.device_get(measured[name])) for name in ("loss", "grad_norm")])
    return state, np.array(losses)


# Losses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classify", "answer"])
def test_the_loss_of_a_task_is_that_of_the_model(kind):
    model = new_model(CONFIG, 0, "float32", CLASSES[kind])
    batch: Any = batches(kind).batch(0)
    loss, count = task_loss(model, batch)
    expected = 0.0
    for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        n = mask.sum()  # one row at a time, without padding
        targets = (
            {"labels": label[None]}
            if kind == "classify"
            else {"start_positions": label[:1], "end_positions": label[1:]}
        )
        expected += float(model(ids[None, :n], **targets).loss) * (1 if kind == "classify" else 2)
    assert int(count) == BATCH * (1 if kind == "classify" else 2)
    np.testing.assert_allclose(float(loss), expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
@pytest.mark.parametrize("kind, rank", [exhaustive("classify", 0), ("answer", 0), ("classify", 2), exhaustive("lm", 2)])
def test_meshes_and_micro_batches_train_alike(kind, rank):
    _, expected = train(kind, rank, "data=1")
    assert not np.allclose(expected[0], expected[2], rtol=1e-3)  # the loss changes
    _, losses = train(kind, rank, "data=2,fsdp=2,tensor=2", accumulate=2 if kind == "answer" else 1)
    if kind == "answer":  # its dropout depends on the number of micro-batches
        _, expected = train(kind, rank, "data=1", accumulate=2)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)


@pytest.mark.slow
def test_predictions_are_those_of_all_rows():
    mesh, begin, _, shardings, *_ = programs("classify", 0, "data=1")
    held_out = Batches(EXAMPLES, np.zeros(40, int), 16, 32, pad=1)
    state = begin()
    predict = make_predict_step(shardings.full_model, mesh)
    seen = []
    with use_mesh(mesh):
        for numbers, rows in held_out.all():
            _, count, logits = predict(state.full_model, place_batch(rows, 16, 1, mesh))
            assert int(count) == (numbers >= 0).sum()
            seen += [(n, row) for n, row in zip(numbers, np.asarray(logits), strict=True) if n >= 0]
    assert sorted(n for n, _ in seen) == list(range(40))
    for number, row in seen[::7]:
        ids = np.array([EXAMPLES[number]])
        np.testing.assert_allclose(row, state.full_model(ids).logits[0], atol=1e-5)


# Batches --------------------------------------------------------------------------------------------------------------


def test_a_batch_depends_on_seed_and_step_alone():
    make = lambda seed: Batches(EXAMPLES, np.arange(40), BATCH, 32, 1, seed)  # noqa: E731
    straight, jumping = make(3), make(3)
    batches_in_order = [straight.batch(step) for step in range(12)]
    for step in (11, 0, 5):
        again, part = jumping.batch(step), jumping.batch(step, slice(2, 5))
        for name, values in batches_in_order[step].items():
            np.testing.assert_array_equal(again[name], values)
            np.testing.assert_array_equal(part[name], values[2:5])
    epoch = np.concatenate([batch["labels"] for batch in batches_in_order[:5]])
    assert sorted(epoch) == list(range(40)) and list(epoch) != list(range(40))
    assert list(np.concatenate([batch["labels"] for batch in batches_in_order[5:10]])) != list(epoch)
    assert not np.array_equal(make(4).batch(0)["labels"], batches_in_order[0]["labels"])


def test_batches_are_padded_to_few_lengths():
    rows = [[5] * n for n in (3, 32, 33, 70, 90)]
    batches = Batches(rows, np.arange(5), 1, 90, pad=1, multiple=4)
    assert [batches.batch(i)["input_ids"].shape[1] for i in range(5)] == [32, 32, 64, 92, 92]
    first = Batches(rows, np.arange(5), 4, 90, pad=1).batch(1)  # the last example, and three rows to fill the batch
    assert first["labels"].tolist() == [4, IGNORED, IGNORED, IGNORED]
    assert first["attention_mask"].sum(axis=1).tolist() == [90, 1, 1, 1]
    assert (first["input_ids"][:, -1] == [5, 1, 1, 1]).all()


# Data -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ("good\t1\nbad 0\n", r"x.tsv:2: expected a text, a tab and a label, found 'bad 0'"),
        ("good\t1\t2\n", r"x.tsv:1: expected"),
        ("good\t\n", r"x.tsv:1: expected"),
        ("good\t1\nbad\xff\t0\n", r"x.tsv:2: not UTF-8"),
        ("\n", r"x.tsv: no examples"),
        ("1\tgood\n0\tbad\n1\tfine\n", r"x.tsv: 3 different labels, more than texts: put the text first"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, message):
    (tmp_path / "x.tsv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_tsv([str(tmp_path / "x.tsv")])


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffna\u00efve\tyes\r\n\r\n\U0001f600 x\u2028y\tno\r\n",  # of Windows
        "label\tsentence\nyes\tna\u00efve\nno\t\U0001f600 x\u2028y\n",
        "Sentence\tLabel\nna\u00efve\tyes\n\U0001f600 x\u2028y\tno",
    ],
)
def test_columns_line_ends_and_unicode(tmp_path, content):
    (tmp_path / "x.tsv").write_bytes(content.encode())
    assert read_tsv([str(tmp_path / "x.tsv")]) == (["na\u00efve", "\U0001f600 x\u2028y"], ["yes", "no"])


def test_files_of_tasks_that_are_not_there(tmp_path):
    for read in (read_tsv, squad.read_squad):
        with pytest.raises(FileNotFoundError, match="none: no such file"):
            read([str(tmp_path / "none")])
        with pytest.raises(FileNotFoundError, match="a directory: name the files in it"):
            read([str(tmp_path)])


def test_a_label_that_only_the_held_out_examples_have(tmp_path):
    (tmp_path / "train.tsv").write_text("a\tyes\nb\tno\n")
    (tmp_path / "dev.tsv").write_text("a\tperhaps\n")
    files = ([str(tmp_path / "train.tsv")], [str(tmp_path / "dev.tsv")])
    with pytest.raises(ValueError, match=r"dev\.tsv: no example in --data has the label 'perhaps'"):
        Classification(*files, None, batch_size=2, seq_len=8, seed=0)  # type: ignore[reportArgumentType]


def test_labels_are_numbered_by_size_or_alphabet(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text("sentence\tlabel\na\t10\nb\t9\nc\t10\n")
    assert label_config([str(path)])["label2id"] == {"9": 0, "10": 1}
    path.write_text("a\tpos\nb\tneg\n")
    assert label_config([str(path)])["id2label"] == {"0": "neg", "1": "pos"}
    path.write_text("a\tpos\n")
    with pytest.raises(ValueError, match="nothing to tell apart"):
        label_config([str(path)])


def test_classification_measures_accuracy(tmp_path):
    from opt_jax import OPTTokenizer

    (tmp_path / "train.tsv").write_text("def f\tyes\nclass A\tno\nimport sys\tyes\n")
    (tmp_path / "dev.tsv").write_text("return\tno\nreturn self\tyes\nwhile\tno\n")
    files = ([str(tmp_path / "train.tsv")], [str(tmp_path / "dev.tsv")])
    tokenizer = OPTTokenizer.from_pretrained("tiny")
    task = Classification(*files, tokenizer, batch_size=2, seq_len=8, seed=0)
    assert task.training.examples[0] == tokenizer("def f", return_tensors=None).input_ids

    def always_no(rows):
        batch = rows(slice(0, 2))
        counted = (batch["labels"] != IGNORED).sum()
        return counted * 0.5, counted, np.array([[1.0, 0.0]] * 2)

    assert task.evaluate(always_no) == {"val_loss": 0.5, "val_accuracy": pytest.approx(2 / 3)}


# SQuAD ----------------------------------------------------------------------------------------------------------------

CONTEXT = "The tower was built by Gustave Eiffel's company. It opened in 1889, in the city of Paris. " * 3


def squad_file(path, **changes):
    start = CONTEXT.index("1889")
    answer = {"id": "q1", "question": " When did it open?", "answers": [{"text": "1889", "answer_start": start}]}
    unanswerable = {"id": "q2", "question": "Who painted it?", "answers": [], "is_impossible": True}
    qas = [answer | changes, unanswerable]
    content = {"version": "v2.0", "data": [{"title": "x", "paragraphs": [{"context": CONTEXT, "qas": qas}]}]}
    path.write_text(json.dumps(content))
    return [str(path)]


def test_windows_cover_a_long_context_and_find_the_answer(tmp_path):
    from opt_jax import OPTTokenizer

    tokenizer = OPTTokenizer.from_pretrained("tiny")
    questions = squad.read_squad(squad_file(tmp_path / "x.json"))
    windows = [w for w in squad.windows(questions, tokenizer, 48) if w.question == 0]
    assert len(windows) > 2 and all(len(w.ids) <= 48 and w.ids[0] == tokenizer.bos_token_id for w in windows)
    covered = {i for w in windows for o in w.offsets if o for i in range(*o)}
    assert covered >= set(range(len(CONTEXT.rstrip())))
    spans: Any = [(w.offsets[w.answer[0]], w.offsets[w.answer[1]]) for w in windows if w.answer[0]]
    texts = {CONTEXT[first[0] : last[1]].strip() for first, last in spans}
    assert texts and all("1889" in text for text in texts)
    assert all(w.answer == (0, 0) for w in squad.windows(questions, tokenizer, 48) if w.question == 1)

    window = next(w for w in windows if w.answer[0])
    logits = np.zeros((48, 2))
    logits[window.answer[0], 0] = logits[window.answer[1], 1] = 5
    logits[window.answer[1] + 1, 0] = 9  # an end before the start
    logits[1, 1] = 9  # an end in the question
    assert squad.best_answer(questions[0], [(window, logits)], may_lack=True).strip() in texts
    logits[0] = 6
    assert squad.best_answer(questions[0], [(window, logits)], may_lack=True) == ""
    assert squad.best_answer(questions[0], [(window, logits)], may_lack=False).strip() in texts
    with pytest.raises(ValueError, match="--seq-len 8 leaves no room for a context behind the question 'Wh"):
        squad.windows(questions, tokenizer, 8)


@pytest.mark.parametrize(
    "answer, truth, em, f1",
    [
        ("the Eiffel Tower!", "Eiffel tower", 1, 1),
        ("Eiffel", "the Eiffel Tower", 0, 2 / 3),
        ("a b b c", "b b d", 0, 4 / 6),  # "a" is an article
        ("", "", 1, 1),
        ("", "x", 0, 0),
        ("the", "an", 1, 1),
    ],
)
def test_exact_match_and_f1_are_those_of_squad(answer, truth, em, f1):
    assert (squad.exact_match(answer, truth), squad.f1(answer, truth)) == (em, pytest.approx(f1))


def test_the_best_of_several_true_answers_counts():
    questions = [squad.Question("", "", (("in 1889", 0), ("1889", 0))), squad.Question("", "", ())]
    assert squad.scores(questions, ["1889", ""]) == (1, 1)
    assert squad.scores(questions, ["1889", "no"]) == (0.5, 0.5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(answers=[{"text": "1889", "answer_start": 3}]), "question 'q1': its answer '1889' is not at character 3"),
        (dict(answers=[]), "question 'q1' has no answer, and is not marked is_impossible"),
        (dict(answers=None), "not in the form of SQuAD .a value is of another type"),
    ],
)
def test_bad_squad_files_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"x.json: {message}"):
        squad.read_squad(squad_file(tmp_path / "x.json", **change))
    (tmp_path / "y.json").write_text("{")
    with pytest.raises(ValueError, match="y.json is not valid JSON"):
        squad.read_squad([str(tmp_path / "y.json")])


def test_a_squad_file_of_windows_is_read(tmp_path):
    squad_file(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "x.json").read_bytes())
    assert len(squad.read_squad([str(tmp_path / "x.json")])) == 2


# LoRA -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lm", "classify"])
def test_only_adapters_and_heads_are_trained_and_have_moments(kind):
    _, begin, _, _, lora, plain = programs(kind, 2, "data=1")
    assert lora is not None
    before = jax.device_get(begin())
    after, losses = train(kind, 2, "data=1")
    trained = set(named_leaves(after.model))
    expected = {n for n in named_leaves(after.full_model) if is_adapter(n) or n == "score.kernel"}
    assert trained == expected and len(trained) == 8 + (kind == "classify")
    moments = [n for n in named_leaves(after.opt_state) if ".mu." in n or ".nu." in n]
    assert len(moments) == 2 * len(trained) and all(n.endswith(tuple(trained)) for n in moments)
    for name, value in named_leaves(after.frozen).items():
        np.testing.assert_array_equal(value, named_leaves(before.frozen)[name], err_msg=name)
    assert all((v != named_leaves(before.model)[n]).any() for n, v in named_leaves(after.model).items())
    # Merged, they give a plain model that computes the same.
    merged, ids = lora.merge(after.full_model, plain), np.array([EXAMPLES[0]])
    assert type(merged) is CLASSES[kind] and set(named_leaves(merged)) == set(named_leaves(plain))
    ours = merged.model.forward(ids).last_hidden_state
    theirs = after.full_model.model.forward(ids).last_hidden_state
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert np.abs(ours - before.full_model.model.forward(ids).last_hidden_state).max() > 0.01


def test_adapters_that_qwix_leaves_out_are_noticed(monkeypatch):
    plain = jax.eval_shape(lambda: new_model(CONFIG, 0, "float32"))
    import qwix

    monkeypatch.setattr(qwix, "apply_lora_to_model", lambda base, *_, **__: base)
    with pytest.raises(RuntimeError, match="qwix added 0 adapters instead of 4"):
        LoRA(2, 8.0).adapt(plain)


@pytest.mark.slow
def test_lora_computes_in_bfloat16():
    plain = jax.eval_shape(lambda: new_model(CONFIG, 0, "bfloat16"))
    lora = LoRA(2, 8.0)
    adapted = lora.adapt(plain)
    new = lambda: new_state(  # noqa: E731
        lora.initial(adapted, new_model(CONFIG, 0, "bfloat16"), 0),
        make_optimizer(lambda _: jnp.float32(0.01)),
        is_trained,
    )
    mesh = make_mesh("fsdp=-1")
    shardings = state_shardings(jax.eval_shape(new), mesh)
    schedule = make_schedule(peak=1e-2, warmup_steps=2, steps=30)
    step = make_train_step(make_optimizer(schedule), schedule, CONFIG, 0, shardings, mesh)
    with use_mesh(mesh):
        state, measured = step(
            jax.jit(new, out_shardings=shardings)(), place_batch(partial(batches("lm").batch, 0), BATCH, 1, mesh)
        )
    assert np.isfinite(float(measured["loss"]))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.full_model))


def test_split_and_join():
    model = new_model(CONFIG, 0, "float32")
    one, other = split(model, lambda name: "fc1" in name)
    assert all("fc1" in n for n in named_leaves(one)) and len(named_leaves(one)) == 2
    again = join(one, other)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, again, model)


# Options --------------------------------------------------------------------------------------------------------------

TASK = dict(task="sequence-classification", data=("x.tsv",))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(task="question-answering"), "--task question-answering needs --data"),
        (TASK | dict(vocab_size=300), "--vocab-size is for a new tokenizer"),
        (TASK | dict(eval_batches=3), "--eval-batches: with --task all held-out examples are measured"),
        (dict(task="question-answering", data=("x",), mixture=(1.0,)), "--mixture is for pretraining data"),
        (dict(lora_rank=0), "--lora-rank 0: must be at least 1"),
        (dict(lora_alpha=8.0), "--lora-alpha is for --lora-rank"),
        (dict(lora_targets=("fc1",)), "--lora-targets is for --lora-rank"),
        (TASK | dict(plan=True, topology="v5p:8x8x8"), "--plan .* runs nothing: leave out --data, --task"),
        (dict(lora_rank=8, plan=True, topology="v5p:8x8x8"), "leave out --lora-rank"),
    ],
)
def test_options_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        check_options(Options(**changes))


@pytest.mark.parametrize("targets", [(), ("q_proj", "q_proj"), ("lm_head",)])
def test_bad_targets_are_refused(targets):
    with pytest.raises(ValueError, match="choose from q_proj, k_proj"):
        LoRA(2, 8.0, targets)
