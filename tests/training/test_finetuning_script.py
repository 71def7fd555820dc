"""train.py with --task and --lora-rank: stopped, resumed, finished, loaded, exported."""

import json
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from support.training_runs import metrics

import train
from convert.__main__ import main as convert
from opt_jax import OPTConfig, OPTForCausalLM, OPTTokenizer
from opt_jax.model.heads import OPTForQuestionAnswering, OPTForSequenceClassification, named_parameters
from opt_jax.training.step import new_model

pytestmark = pytest.mark.slow


def save(directory, seed):
    """A small checkpoint with the tokenizer of "tiny"."""
    config = OPTConfig(
        vocab_size=4096,
        hidden_size=16,
        num_hidden_layers=2,
        ffn_dim=32,
        num_attention_heads=2,
        max_position_embeddings=64,
        dropout=0.1,
        init_std=0.1,
    )
    new_model(config, seed, "float32").save_pretrained(directory, tokenizer=OPTTokenizer.from_pretrained("tiny"))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    directory = tmp_path_factory.mktemp("start") / "model"
    save(directory, seed=0)
    return directory


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "train.tsv"
    lines = [f"{word} {i} times\t{label}" for i in range(12) for word, label in (("def", "code"), ("and", "prose"))]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def run(output, start, **options):
    common = dict(batch_size=8, warmup_steps=1, learning_rate=1e-2, eval_every=2, mesh="data=-1", steps=4)
    chosen: Any = common | dict(output=str(output), model=str(start)) | options
    train.main(train.Options(**chosen))
    return metrics(output)


def test_classification_with_lora_from_start_to_export(start, texts, tmp_path, capsys):
    options: dict[str, Any] = dict(
        task="sequence-classification", data=(texts,), lora_rank=2, lora_targets=("q_proj", "fc1")
    )
    uninterrupted = run(tmp_path / "uninterrupted", start, **options)
    assert "LoRA of rank 2" in capsys.readouterr().out
    assert [0 <= line["val_accuracy"] <= 1 for line in uninterrupted if "val_loss" in line] == [True, True]

    run(tmp_path / "run", start, stop_after=2, **options)
    with pytest.raises(ValueError, match="holds the adapters of a run with --lora-rank"):
        OPTForSequenceClassification.from_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match="lora_rank was 2, is now 3"):
        run(tmp_path / "run", start, **options | dict(lora_rank=3))
    moved = start.rename(start.with_name("moved"))  # frozen parameters are read from here, not from checkpoints
    save(start, seed=1)
    with pytest.raises(ValueError, match="not trained: checksum of the parameters was [0-9]+, is now "):
        run(tmp_path / "run", start, **options)
    shutil.rmtree(start)
    moved.rename(start)
    resumed = run(tmp_path / "run", start, **options)
    assert [line["loss"] for line in resumed] == [line["loss"] for line in uninterrupted]
    printed = capsys.readouterr().out
    assert (
        "adapters are merged in" in printed and f"for PEFT, they are also in {tmp_path / 'run' / 'adapter'}" in printed
    )
    assert f'OPTForSequenceClassification.from_pretrained("{tmp_path / "run"}")' in printed

    model, before = (
        OPTForSequenceClassification.from_pretrained(tmp_path / "run"),
        OPTForCausalLM.from_pretrained(start),
    )
    assert model.config.extra["label2id"] == {"code": 0, "prose": 1} and model.config.num_labels == 2
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["target_modules"] == ["q_proj", "fc1"] and adapter["modules_to_save"] == ["score"]
    assert adapter["base_model_name_or_path"] == str(start) and adapter["task_type"] == "SEQ_CLS"
    merged = OPTForSequenceClassification.from_pretrained(start, adapter=tmp_path / "run" / "adapter")
    for (name, one), other in zip(named_parameters(merged).items(), named_parameters(model).values(), strict=True):
        np.testing.assert_allclose(one[...], other[...], rtol=1e-6, atol=1e-6, err_msg=name)

    theirs = named_parameters(before)
    changed = {n for n, p in named_parameters(model).items() if n in theirs and (p[...] != theirs[n][...]).any()}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "fc1"} and len(changed) == 4
    assert all(name.endswith("kernel") for name in changed)
    tokenizer = OPTTokenizer.from_pretrained(tmp_path / "run")
    assert np.isfinite(model(**tokenizer(["def x"])).logits).all()

    assert convert(["to-hf", str(tmp_path / "run" / "model"), str(tmp_path / "hf")]) in (0, None)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["OPTForSequenceClassification"]
    assert config["id2label"] == {"0": "code", "1": "prose"}
    again = OPTForSequenceClassification.from_pretrained(tmp_path / "hf")
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_accuracy_on_sst2_is_that_of_the_saved_model(shared_data, tmp_path):
    for name, count in (("train", 100), ("dev", 40)):
        lines = (shared_data / "sst2" / f"{name}.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / f"{name}.tsv").write_text("".join(lines[:count]), encoding="utf-8")
    lines = run(
        tmp_path / "run",
        "tiny",
        task="sequence-classification",
        data=(str(tmp_path / "train.tsv"),),
        validation_data=(str(tmp_path / "dev.tsv"),),
        seq_len=64,
        eval_every=3,
        steps=3,
    )
    rows = [line.split("\t") for line in (tmp_path / "dev.tsv").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row[1] != "label"]
    model = OPTForSequenceClassification.from_pretrained(tmp_path / "run")
    tokenizer = OPTTokenizer.from_pretrained(tmp_path / "run")
    inputs = tokenizer([text for text, _ in rows], padding_side="right")
    assert inputs["input_ids"].shape[1] > 64  # longer rows were cut in training
    logits = model(**{name: array[:, :64] for name, array in inputs.items()}).logits
    right = [str(i) == label for i, (_, label) in zip(logits.argmax(-1), rows, strict=True)]
    assert 0 < sum(right) < len(right) and lines[-1]["val_accuracy"] == pytest.approx(np.mean(right))


def test_question_answering_learns_and_its_checkpoint_loads(start, tmp_path):
    context = "In the beginning there was a def, and the def was in the file number "
    paragraphs = []
    for i in range(10):
        answer = {"text": str(i), "answer_start": len(context)}
        qas = [{"id": str(i), "question": "Which file?", "answers": [answer]}]
        paragraphs.append({"context": f"{context}{i}.", "qas": qas})
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    options: dict[str, Any] = dict(
        task="question-answering", data=(str(path),), validation_data=(str(path),), eval_every=4
    )
    lines = run(tmp_path / "run", start, stop_after=4, steps=6, **options)
    assert lines[3]["val_loss"] < lines[0]["loss"] and 0 <= lines[3]["val_exact_match"] <= lines[3]["val_f1"] <= 1
    assert isinstance(OPTForQuestionAnswering.from_pretrained(tmp_path / "run"), OPTForQuestionAnswering)
    assert len(run(tmp_path / "run", start, steps=6, **options)) == 6
    model = OPTForQuestionAnswering.from_pretrained(tmp_path / "run" / "model")
    assert convert(["to-hf", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == ["OPTForQuestionAnswering"]
    again = OPTForQuestionAnswering.from_pretrained(tmp_path / "hf")
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_task_needs_a_checkpoint(texts, tmp_path):
    with pytest.raises(ValueError, match="--task sequence-classification fine-tunes a checkpoint"):
        run(tmp_path / "run", "small", task="sequence-classification", data=(texts,))
