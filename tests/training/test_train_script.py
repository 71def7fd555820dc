"""train.py as users run it: a run from start to end, resumed runs, and options that are refused."""

import json
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.processes import environment
from support.training_runs import command_line, metrics, run_options

import train
from convert.__main__ import main as convert
from opt_jax import OPTForCausalLM, OPTTokenizer
from opt_jax.cli import main
from opt_jax.data import windows
from opt_jax.data.tokens import Tokens
from opt_jax.parallel import mesh
from opt_jax.training import goodput
from opt_jax.training.checkpoints import Checkpoints
from opt_jax.training.step import TrainState

pytestmark = pytest.mark.slow
STEPS = 20


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """A run in this process has one device, unless the test gives a larger mesh."""

    def make_mesh(spec, devices, dcn):
        return mesh.make_mesh(spec, devices or (jax.devices()[:1] if spec in (None, "data=1") else None), dcn)

    monkeypatch.setattr(train, "make_mesh", make_mesh)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options of a run that takes seconds, with dropout."""
    directory = tmp_path_factory.mktemp("train")
    changes = dict(steps=STEPS, warmup_steps=5, checkpoint_every=5, eval_every=10, eval_batches=2)
    return run_options(directory, positions=32, **changes)


def run(options, output, **changes):
    train.main(train.Options(**(options | dict(output=str(output)) | changes)))
    return metrics(output)


def same(ours, theirs):
    """Assert that the metrics are equal, but for times."""
    of_time = {"tokens_per_s", "step_seconds", "mfu", "memory_bytes", "time", "began"}

    def timeless(lines):
        return [{k: v for k, v in line.items() if k not in of_time and not k.endswith("_seconds")} for line in lines]

    assert timeless(ours) == timeless(theirs)


@pytest.fixture(scope="module")
def uninterrupted(options, tmp_path_factory):
    """(directory, output) of a finished run on one device."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    done = subprocess.run(
        command_line(options | dict(mesh="data=1"), output),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return output, done.stdout


def test_a_run_leaves_what_it_promises(uninterrupted):
    output, printed = uninterrupted
    lines = metrics(output)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    names = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "step_seconds"}
    assert all(names <= set(line) for line in lines)
    assert [line["step"] for line in lines if "val_loss" in line] == [10, 20]
    assert [line["step"] for line in lines if "validation_seconds" in line] == [10, 20]
    assert [line["step"] for line in lines if "checkpoint_seconds" in line] == [6, 11, 16]
    assert [line["step"] for line in lines if {"began", "start_seconds", "compile_seconds"} & set(line)] == [1]
    assert all("time" in line for line in lines)
    assert lines[-1]["val_loss"] < lines[0]["loss"] and lines[-1]["tokens"] == STEPS * 8 * 32
    record = json.loads((output / "run.json").read_text())
    assert record["options"]["dtype"] == "float32" and record["options"]["seq_len"] == 32
    assert record["model"]["hidden_size"] == 16
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["15", "20"]

    model, tokenizer = OPTForCausalLM.from_pretrained(output), OPTTokenizer.from_pretrained(output)
    out = model(tokenizer("def self return x", return_tensors="np").input_ids)
    assert np.isfinite(np.asarray(out.logits)).all()
    assert f"opt-jax generate --model {output}" in printed and "a sample: " in printed
    assert "\ngoodput " in printed and "compile " in printed
    first = printed.splitlines()[0]
    assert f"jax {jax.__version__}, " in first and "1 process, 1 x " in first
    assert first.endswith("mesh data=1 x fsdp=1 x tensor=1")


def test_a_finished_run_says_so(options, uninterrupted, capsys):
    before = (uninterrupted[0] / "metrics.jsonl").read_bytes()
    run(options, uninterrupted[0], mesh="data=-1", log_every=3, eval_every=7)
    assert f"{uninterrupted[0]} is finished: {STEPS} steps" in capsys.readouterr().out
    assert (uninterrupted[0] / "metrics.jsonl").read_bytes() == before


def test_keeps_the_best_model_and_checkpoints_by_count_by_steps_and_by_minutes(options, tmp_path):
    output = tmp_path / "run"
    kept = lambda: sorted(int(path.name) for path in (output / "checkpoints").iterdir())  # noqa: E731
    options = options | dict(steps=20, learning_rate=0.3, warmup_steps=2, checkpoint_every=1000, eval_every=1)
    lines = run(options, output, stop_after=6, checkpoint_minutes=1e-6, keep_checkpoints=5)
    assert kept() == [2, 3, 4, 5, 6]  # one at each step
    best = min(lines, key=lambda line: line["val_loss"])["step"]
    assert 2 <= best < 6  # later steps at this rate make the loss worse
    assert [path.name for path in (output / "best").iterdir()] == [str(best)]
    ours, theirs = (OPTForCausalLM.from_pretrained(output / name) for name in ("best", f"checkpoints/{best}"))
    assert ours.config.dropout == 0.1
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, other)
    assert OPTTokenizer.from_pretrained(output / "tokenizer").bos_token_id == 2
    # As if killed between a checkpoint and its copy in `best`: the next start copies it.
    for path in (output / "checkpoints").iterdir():
        if int(path.name) > best:
            shutil.rmtree(path)
    shutil.rmtree(output / "best" / str(best))
    run(options, output, stop_after=9 - best, checkpoint_minutes=1000.0, keep_checkpoints=1, keep_every=4)
    assert [path.name for path in (output / "best").iterdir()] == [str(best)]
    assert kept() == [4, 8, 9]


def test_the_best_model_is_not_one_that_an_earlier_start_found_later(tmp_path):
    """This happens after --fall-back or a kill, with another --eval-every."""
    model: Any = {"w": jnp.arange(8.0)}
    state = TrainState(jnp.int32(3), model, {"m": jnp.ones(5)}, jnp.bool(False))
    for step in (9, 6, 6):
        with Checkpoints(tmp_path / "best", keep=1) as best:
            best.save_model(step, state)
        assert [path.name for path in (tmp_path / "best").iterdir()] == [str(step)]
    (ours := tmp_path / "best" / "6" / "eval.json").touch()
    with Checkpoints(tmp_path / "best", keep=1) as best:
        with pytest.raises(FileExistsError, match=f"{ours} is no file of a checkpoint"):
            best.save_model(3, state)
    assert ours.exists()


def test_a_checkpoint_is_what_was_saved_though_training_goes_on(tmp_path):
    """The state is donated to the next step while it is being written."""
    model: Any = {"w": jnp.arange(5e6)}
    make = jax.jit(lambda: TrainState(jnp.int32(3), model, {"m": jnp.ones(5)}, jnp.bool(False)))
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    state = make()
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        for number in (3, 4):
            checkpoints.save(number, state)
            state = step(state)
    shardings = jax.tree.map(lambda x: x.sharding, make())
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        for number, scale in ((3, 1), (4, 0)):
            restored = checkpoints.restore(number, jax.eval_shape(make), shardings)
            jax.tree.map(np.testing.assert_array_equal, restored, jax.tree.map(lambda x, s=scale: x * s, make()))


def test_training_does_not_wait_for_a_checkpoint(tmp_path, monkeypatch):
    """A step ends while the earlier checkpoint cannot be renamed, so it does not exist yet."""
    allowed, rename = threading.Event(), os.rename

    def hold_back(source, target, **kwargs):
        if Path(target) == tmp_path / "checkpoints" / "3":
            allowed.wait(timeout=20)
        rename(source, target, **kwargs)

    monkeypatch.setattr(os, "rename", hold_back)
    state = TrainState(jnp.int32(3), {"w": jnp.arange(8.0)}, {"m": jnp.ones(5)}, jnp.bool(False))
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(3, state)
        jax.block_until_ready(step(state))
        assert not (tmp_path / "checkpoints" / "3").exists()
        allowed.set()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_a_damaged_checkpoint_is_said_and_fallen_back_from(options, tmp_path, capsys):
    output = tmp_path / "run"
    before = run(options, output, stop_after=10)
    damaged = output / "checkpoints" / "10" / "params" / "manifest.ocdbt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=f"^checkpoint {output}/checkpoints/10 is damaged: .*--fall-back .*, 5$"):
        run(options, output)
    assert metrics(output) == before
    same(run(options, output, stop_after=5, fall_back=True), before)
    assert "checkpoints/10 is damaged: " in capsys.readouterr().err
    same(run(options, output, stop_after=1)[:10], before)  # the new checkpoint 10 is intact


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_with_deterministic_a_gpu_goes_on_bitwise(options, tmp_path):
    def start(name, **changes):
        command = command_line(options | dict(mesh="data=1", deterministic=True) | changes, tmp_path / name)
        memory = environment(XLA_PYTHON_CLIENT_PREALLOCATE="false")  # because this process uses the GPU too
        done = subprocess.run(command, env=memory, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return metrics(tmp_path / name)

    in_one_piece = start("whole")
    assert len(start("run", stop_after=7)) == 7
    same(start("run"), in_one_piece)


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
def test_stops_as_asked_and_resumes_on_another_mesh(options, uninterrupted, tmp_path, capsys):
    run(options, tmp_path / "run", stop_after=7)
    assert f"stopped after step 7 of {STEPS}" in capsys.readouterr().out
    assert not (tmp_path / "run" / "model").exists()
    changes = dict(mesh="data=2,fsdp=2,tensor=2", accumulate=2, checkpoint_every=1000, keep_checkpoints=1)
    lines = run(options, tmp_path / "run", stop_after=9, **changes)
    assert f"steps 7 to {STEPS}" in capsys.readouterr().out
    for name in ("loss", "lr", "grad_norm"):
        ours, theirs = ([line[name] for line in part] for part in (lines, metrics(uninterrupted[0])[:16]))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5 if name == "loss" else 1e-4, err_msg=name)


def test_a_wait_for_data_counts_from_the_end_of_the_step_before(options, uninterrupted, tmp_path, monkeypatch):
    """On a disk that reads a batch only while the loop waits for it, every step waits, and the losses are the same."""
    reads, events = threading.Semaphore(0), []
    read, block, spend = Tokens.read, jax.block_until_ready, goodput.spend

    def read_when_asked(tokens, start, length):
        if threading.current_thread().name.startswith("read-ahead"):
            assert reads.acquire(timeout=60)
        return read(tokens, start, length)

    def note_end(pending):
        events.append(pending and pending[0])
        return block(pending)

    def note_wait(activity):
        if activity == "data":
            events.append("data")
            reads.release(8)
        return spend(activity)

    monkeypatch.setattr(windows, "_THREADS", 1)  # reads in order
    monkeypatch.setattr(Tokens, "read", read_when_asked)
    monkeypatch.setattr(jax, "block_until_ready", note_end)
    monkeypatch.setattr(goodput, "spend", note_wait)
    lines = run(options, tmp_path / "run", stop_after=3)
    assert events == [None, "data", 1, "data", 2, "data"]
    assert ["data_seconds" in line for line in lines] == [True, True, False]  # a line is written after the next wait
    same(lines, metrics(uninterrupted[0])[:3])


def test_arrays_and_texts_in_a_mixture_go_on_with_other_workers(options, uninterrupted, tmp_path):
    """With all kinds of data and with reading threads, the losses are those of a run in one piece."""
    text, tokenizer = options["data"][0], str(uninterrupted[0])
    words = ["tokenize", text, "--output", str(tmp_path / "a.npy"), "--tokenizer", tokenizer]
    assert main(words) == 0
    mixed = options | dict(
        data=(str(tmp_path / "a.npy"), text), mixture=(0.25, 0.75), pack="segments", tokenizer=tokenizer
    )
    in_one_piece = run(mixed, tmp_path / "whole", stop_after=6)
    run(mixed, tmp_path / "run", stop_after=3, data_workers=2)
    state = json.loads(next((tmp_path / "run" / "checkpoints" / "3" / "data").iterdir()).read_text())
    assert state["step"] == 3 and state["weights"] == [0.25, 0.75] and state["segments"] is True
    same(run(mixed, tmp_path / "run", stop_after=3), in_one_piece)
    other = run(mixed | dict(pack="concat"), tmp_path / "concat", stop_after=1)
    assert other[0]["loss"] != in_one_piece[0]["loss"]
    with pytest.raises(ValueError, match="mixture was"):
        run(mixed | dict(mixture=(0.5, 0.5)), tmp_path / "run")


def test_a_changed_run_is_refused_with_the_difference(options, uninterrupted, tmp_path):
    output = uninterrupted[0]
    with pytest.raises(ValueError, match=r"(?s)started differently:\n  options: seed was 0, is now 1\n.*--output"):
        run(options, output, seed=1)
    config = json.loads(Path(options["model"]).read_text())
    Path(tmp_path / "config.json").write_text(json.dumps(config | {"ffn_dim": 64}))
    with pytest.raises(ValueError, match=r"model: ffn_dim was 32, is now 64"):
        run(options, output, model=str(tmp_path / "config.json"))
    # The same paths with other text: first the training data, then the held-out data.
    (tmp_path / "text.jsonl").write_text(Path(options["data"][0]).read_text())
    (tmp_path / "valid.txt").write_text("def return self x " * 99)
    changed = options | dict(data=(str(tmp_path / "text.jsonl"),), validation_data=(str(tmp_path / "valid.txt"),))
    run(changed, tmp_path / "run", stop_after=1)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for name, more, message in (
        ("text.jsonl", '{"text": "def more"}\n', r"  data: fingerprint was"),
        ("valid.txt", "more", r"started differently:\n  held-out data: fingerprint was"),
    ):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text + more)
        with pytest.raises(ValueError, match=message):
            run(changed, tmp_path / "run")
        (tmp_path / name).write_text(text)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    # The run.json of an older train.py may lack entries. An option counts as its default, others are not compared.
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    del record["held-out data"], record["options"]["weight_decay"]
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="weight_decay was 0.1, is now 0.2"):
        run(changed, tmp_path / "run", weight_decay=0.2)
    assert len(run(changed, tmp_path / "run", stop_after=1)) == 2


def test_the_shortest_sequences_end_in_a_sample(options, tmp_path, capsys):
    run(options, tmp_path / "run", seq_len=1, steps=1)
    assert "a sample: " in capsys.readouterr().out


def test_starts_from_a_checkpoint_with_its_tokenizer(options, uninterrupted, tmp_path):
    start = str(uninterrupted[0])
    lines = run(options, tmp_path / "run", model=start, dropout=0.0, stop_after=2)
    assert lines[0]["loss"] < metrics(start)[0]["loss"] - 0.05  # the weights are the checkpoint's
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "run" / "tokenizer" / name).read_text() == (Path(start) / "tokenizer" / name).read_text()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["model"]["dropout"] == 0.0

    assert convert(["to-hf", f"{start}/model", str(tmp_path / "hf")]) == 0
    same(run(options, tmp_path / "from hf", model=str(tmp_path / "hf"), dropout=0.0, stop_after=2), lines)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(steps=0), "--steps 0: must be at least 1"),
        (dict(learning_rate=0.0), "--learning-rate 0.0: must be above 0"),
        (dict(learning_rate=float("inf")), "--learning-rate inf: must be a finite number, and one that float32 holds"),
        (dict(weight_decay=float("nan")), "--weight-decay nan: must be a finite number"),
        (dict(warmup_steps=-1), "--warmup-steps -1: must not be negative"),
        (dict(seed=-1), "--seed -1: must not be negative"),
        (dict(seed=2**32 + 5), "--seed 4294967301: must be below 2\\*\\*32"),
        (dict(wandb=""), "--wandb '': the value is empty; leave the option out"),
        (dict(data=("",)), "--data '': the value is empty; leave the option out"),
        (dict(learning_rate=1e39), "--learning-rate 1e\\+39: must be a finite number, and one that float32 holds"),
        (dict(weight_decay=1e-50), "--weight-decay 1e-50: must be a finite number, and one that float32 holds"),
        (dict(clip_norm=1e39), "--clip-norm 1e\\+39: must be"),
        (dict(checkpoint_minutes=float("nan")), "--checkpoint-minutes nan: must be"),
        (dict(betas=(0.9, 1 - 1e-12)), "--betas 0.9 0.999999999999: must be at least 0 and below 1"),
        (dict(hang_minutes=5), "--hang-minutes 5 without effect: this process waits for no other"),
        (dict(heartbeat_seconds=7), "--heartbeat-seconds 7 without effect: this process waits for no other"),
        (dict(data=("a", "b"), mixture=(float("inf"), 1.0)), "--mixture inf: must be a finite number"),
        (dict(seq_len=64), "--seq-len 64: the model has 32 positions"),
        (dict(batch_size=6, mesh="data=-1"), "--batch-size 6 does not divide over the mesh's data x fsdp = 8"),
        (dict(mesh="tensor=8"), "2 attention heads do not divide over mesh axis tensor=8"),
        (dict(mesh="data=-1,tensor=2", seq_len=31), "31 tokens per sequence do not divide over mesh axis tensor=2"),
        (dict(final_lr=1.5), "--final-lr 1.5: must be a share of the peak, from 0 to 1"),
        (dict(betas=(0.9, 1.0)), "--betas 0.9 1.0: must be at least 0 and below 1"),
        (dict(profile="13:10"), "--profile 13:10: needs the first and the last step to trace, as in 10:13"),
        (dict(profile="0:3"), "--profile 0:3: needs"),
        (dict(profile="90:91"), "--profile 90:91 without effect: the run ends with step"),
        (dict(final_lr=0.5, warmup_steps=90), "--final-lr 0.5 without effect: all .* belong to the warm-up of 90"),
        (dict(grad_dtype="bfloat16", mesh="data=-1"), "--grad-dtype bfloat16 without effect: the mesh has fsdp=1"),
        (dict(mesh="rows=2"), "unknown axis 'rows'"),
        (dict(dropout=1.5), "dropout=1.5 must be a probability"),
        (dict(vocab_size=100), "a vocabulary of 100 does not hold"),
        (dict(vocab_size=305), "the tokenizer has 305 entries, but the model's vocabulary ends at 304"),
        (dict(vocab_size=300, tokenizer="x"), "--vocab-size is for a tokenizer trained on the data"),
        (dict(model="no-such-dir/config.json"), "no OPT configuration at no-such-dir/config.json"),
        (dict(data=("no-such-file",)), "no-such-file: no such file or directory"),
        (dict(validation_data=("SHORT",)), "--validation-data: too short for one sequence of 32 tokens: take more"),
        (dict(lora_rank=2), "--lora-rank adapts a checkpoint, but the weights of --model .*config.json are new"),
        (dict(mixture=(0.5, 0.5)), "--mixture 0.5 0.5: needs one weight above 0 for each of the 1 of --data"),
    ],
)
def test_bad_options_are_one_clear_error(options, tmp_path, changes, message):
    if "mesh" in changes and len(jax.devices()) < 8:
        pytest.skip("needs eight devices")
    if changes.get("vocab_size") == 305:  # needs text with that many tokens
        (tmp_path / "text.txt").write_text("".join(f"variable_{i} = {i}\n" for i in range(2000)))
        changes = changes | dict(data=(str(tmp_path / "text.txt"),))
    if "validation_data" in changes:
        (tmp_path / "short.txt").write_text("def x")
        changes = dict(validation_data=(str(tmp_path / "short.txt"),))
    with pytest.raises((ValueError, OSError), match=message):
        run(options, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_unknown_options_are_errors_and_help_lists_all(capsys):
    for words, code, text in ((["--sede", "3"], 2, "--sede"), (["--help"], 0, "--learning-rate")):
        with pytest.raises(SystemExit) as ended:
            train.parse_options(words)
        assert ended.value.code == code and text in "".join(capsys.readouterr())


def test_errors_reach_the_shell_as_one_line(options, tmp_path):
    command = command_line(options | dict(data=("no-such-file",)), tmp_path / "run")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "train.py: error: no-such-file: no such file or directory\n"
