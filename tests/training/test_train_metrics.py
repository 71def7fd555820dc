"""Recipes, the metrics of a run and the loggers that get them, and numbers that are not finite."""

import dataclasses
import errno
import importlib.util
import json
import logging
import math
import os
import struct
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.processes import largest_file
from support.training_runs import metrics
from test_train_script import one_device, options, run, same
from test_training import BATCH, CONFIG, ONE, WINDOWS, Run

from opt_jax import OPTConfig, OPTForCausalLM, OPTTokenizer
from opt_jax.data.corpus import split_documents
from opt_jax.data.documents import read_documents
from opt_jax.data.tokenizers import train_tokenizer
from opt_jax.data.tokens import tokenize
from opt_jax.parallel.mesh import use_mesh
from opt_jax.parallel.processes import last_words
from opt_jax.parallel.rules import named_leaves
from opt_jax.training.flops import flops_per_token, peak_flops
from opt_jax.training.loggers import TensorBoard, WandB
from opt_jax.training.metrics import MOST_SKIPS_IN_A_ROW, SPIKE_AFTER, Metrics, cut_back
from opt_jax.training.nonfinite import NonFiniteError
from opt_jax.training.optimizer import make_optimizer, make_schedule
from opt_jax.training.option_checks import check_options
from opt_jax.training.options import Options, model_config, parse_options
from opt_jax.training.recipes import RECIPES
from opt_jax.training.step import make_train_step, place_batch

assert options and one_device  # fixtures

# Recipes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, batch_size, peak, steps, warmup",
    [  # written out from Table 1 of the paper: 0.5M = 2^19 tokens are 256 rows of 2048
        ("opt-125m", 256, 6e-4, 572204, 715),
        ("opt-350m", 256, 3e-4, 572204, 715),
        ("opt-1.3b", 512, 2e-4, 286102, 357),
        ("opt-2.7b", 512, 1.6e-4, 286102, 357),
        ("opt-6.7b", 1024, 1.2e-4, 143051, 178),
        ("opt-13b", 2048, 1e-4, 71525, 89),
        ("opt-30b", 2048, 1e-4, 71525, 89),
        ("opt-66b", 1024, 8e-5, 143051, 178),
        ("opt-175b", 1024, 1.2e-4, 143051, 2000),
    ],
)
def test_recipes_are_the_papers(name, batch_size, peak, steps, warmup):
    options = parse_options(["--recipe", name])
    check_options(options)
    assert (options.batch_size, options.learning_rate, options.steps, options.warmup_steps) == (
        batch_size,
        peak,
        steps,
        warmup,
    )
    assert (options.weight_decay, options.betas, options.clip_norm, options.seq_len) == (0.1, (0.9, 0.95), 1.0, 2048)
    config, start = model_config(options)
    size = name.removeprefix("opt-")
    assert config == OPTConfig.preset(size, dropout=0.1, attention_dropout=0.0, init_std=0.006) and start is None
    schedule = make_schedule(peak=peak, warmup_steps=warmup, steps=steps, final=options.final_lr)
    np.testing.assert_allclose([schedule(warmup - 1), schedule(steps - 1)], [peak, 0.1 * peak], rtol=1e-5)


def test_there_are_nine_recipes_and_what_is_given_wins():
    assert len(RECIPES) == 9
    given = parse_options(["--batch-size", "8", "--recipe=opt-1.3b", "--betas", "0.9", "0.99", "--output", "x"])
    recipe = parse_options(["--recipe", "opt-1.3b"])
    assert given == dataclasses.replace(recipe, batch_size=8, betas=(0.9, 0.99), output="x")
    assert recipe.recipe == "opt-1.3b" and recipe.output == "runs/opt-1.3b"
    assert parse_options([]) == Options()
    with pytest.raises(ValueError, match="--recipe opt-1b: unknown; the recipes are opt-125m, opt-350m, .*, opt-175b"):
        parse_options(["--recipe", "opt-1b"])


# The numbers -------------------------------------------------------------------------------------------------------


def test_flops_are_palms():
    config = OPTConfig.preset("175b")
    # 6N + 12 L H Q T with N = 175e9, L = 96, H = 96, Q = 128, T = 2048
    assert flops_per_token(config, 175_000_000_000, 2048) == 6 * 175e9 + 12 * 96 * 96 * 128 * 2048


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A10G", None),
        ("TPU v4 lite", None),
        ("cpu", None),
    ],
)
def test_peaks_by_device_kind(kind, peak):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == peak


def step_result(loss=1.0, grad_norm=0.5, skipped=None):
    bad = not (math.isfinite(loss) and math.isfinite(grad_norm))
    return dict(loss=loss, grad_norm=grad_norm, lr=1e-3, skipped=bad if skipped is None else skipped)


def make_metrics(path, start=0, **kwargs):
    return Metrics(path, start=start, steps=1000, tokens_per_step=64, log_every=1000, **kwargs)


def test_lines_have_speed_utilisation_and_memory(tmp_path, capsys):
    devices = [SimpleNamespace(memory_stats=lambda n=n: n and dict(peak_bytes_in_use=n)) for n in (None, 5, 7)]
    with make_metrics(tmp_path / "m.jsonl", flops_per_step=1e6, peak_flops=1e9, memory_of=devices) as m:
        m.record(1, step_result(), val_loss=lambda: 2.0)
    (line,) = metrics_of(tmp_path / "m.jsonl")
    assert line["tokens"] == 64 and line["memory_bytes"] == 7
    assert line["val_loss"] == 2.0 and line["val_perplexity"] == math.exp(2)
    np.testing.assert_allclose(line["tokens_per_s"], 64 / line["step_seconds"])
    np.testing.assert_allclose(line["mfu"], 1e-3 / line["step_seconds"])
    out = capsys.readouterr().out
    assert "MFU" in out and "val 2.0000 (perplexity 7.39)" in out
    with make_metrics(tmp_path / "other.jsonl", flops_per_step=1e6, peak_flops=None, memory_of=devices[:1]) as m:
        m.record(1, step_result())
    assert not {"mfu", "memory_bytes"} & set(metrics_of(tmp_path / "other.jsonl")[0])


def metrics_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_spikes_are_logged_and_resumed_runs_see_the_same(tmp_path, capsys):
    rng = np.random.default_rng(0)
    losses = 3 + 0.05 * rng.standard_normal(60)
    losses[5] = losses[40] = losses[50] = 4.5  # the first one comes too early to count as a spike
    for stops in ([60], [30, 45, 60]):
        path, start = tmp_path / f"{len(stops)}.jsonl", 0
        for stop in stops:
            cut_back(path, start, pytest.fail)
            with make_metrics(path, start) as m:
                for step in range(start + 1, stop + 1):
                    m.record(step, step_result(float(losses[step - 1])))
            start = stop
    uninterrupted, parts = (metrics_of(tmp_path / f"{n}.jsonl") for n in (1, 3))
    same(parts, uninterrupted)
    assert [line["step"] for line in uninterrupted if "spike" in line] == [41, 51] and SPIKE_AFTER < 40
    median = np.median(losses[:40])
    deviation = 1.4826 * np.median(abs(losses[:40] - median))
    np.testing.assert_allclose(uninterrupted[40]["spike"], (4.5 - median) / deviation)
    printed = capsys.readouterr().out
    assert "step 41: loss 4.5000 spikes, " in printed and "gradient norm 0.5" in printed and "step 6:" not in printed


# Not finite -----------------------------------------------------------------------------------------------------------


def test_a_number_that_is_not_finite_ends_the_run_on_every_process(tmp_path):
    where = lambda step: np.arange(10) + step  # noqa: E731
    for path in (tmp_path / "m.jsonl", None):
        with make_metrics(path, batch_rows=where) as m:
            m.record(1, step_result())
            with pytest.raises(NonFiniteError, match=r"step 2: loss 1.0, gradient norm inf; .* 2, 3, .*9, \.\.\. of"):
                m.record(2, step_result(grad_norm=math.inf))
    good, bad = metrics_of(tmp_path / "m.jsonl")
    assert "skipped" not in good and bad["skipped"] == 1 and bad["grad_norm"] is None
    assert bad["batch"] == list(range(2, 12))


def test_skips_are_counted_over_starts_and_too_many_in_a_row_end_the_run(tmp_path, capsys):
    with make_metrics(tmp_path / "m.jsonl", skip_nonfinite=True) as m:
        for step in range(1, 6):
            m.record(step, step_result(math.nan if step in (2, 3) else 1.0))
    with make_metrics(tmp_path / "m.jsonl", start=5, skip_nonfinite=True) as m:
        for step in range(6, 5 + MOST_SKIPS_IN_A_ROW):
            m.record(step, step_result(math.nan))
        with pytest.raises(ValueError, match=f"the {MOST_SKIPS_IN_A_ROW}th update in a row"):
            m.record(5 + MOST_SKIPS_IN_A_ROW, step_result(math.nan))
    lines = metrics_of(tmp_path / "m.jsonl")
    assert [line.get("skipped", 0) for line in lines[:7]] == [0, 1, 2, 2, 2, 3, 4]
    assert lines[-1]["skipped"] == 2 + MOST_SKIPS_IN_A_ROW and lines[1]["loss"] is None
    assert "step 3: loss nan, gradient norm 0.5: skipped, 2 so far" in capsys.readouterr().out


POISON = 63  # a token whose embedding is NaN, and with it all that is computed from it


@pytest.mark.slow
@pytest.mark.parametrize("skip", [False, True])
def test_the_step_leaves_the_state_as_it_was(skip):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=False)
    run = Run(ONE, config)
    embedding = run.state.model.model.decoder.embed_tokens.embedding
    embedding.set_value(embedding.get_value().at[POISON].set(jnp.nan))
    schedule = make_schedule(peak=6e-4, warmup_steps=5, steps=30)
    step = make_train_step(make_optimizer(schedule), schedule, config, 0, run.shardings, run.mesh, skip)
    states, results = [], []
    for i in range(3):  # the middle one is not finite
        batch = {name: rows % POISON for name, rows in WINDOWS.batch(i).items()}
        batch["input_ids"][0, 3] = POISON if i == 1 else 0
        rows = lambda rows, batch=batch: {name: ids[rows] for name, ids in batch.items()}  # noqa: E731
        with use_mesh(run.mesh):
            run.state, measured = step(run.state, place_batch(rows, BATCH, 1, run.mesh))
        states.append({name: np.asarray(leaf).copy() for name, leaf in named_leaves(run.state).items()})
        results.append({name: float(value) for name, value in measured.items()})
    assert [r["skipped"] for r in results] == [False, True, not skip]
    assert [math.isfinite(r["loss"]) for r in results] == [True, False, True]
    assert [bool(s["halted"]) for s in states] == [False, not skip, not skip]
    assert [int(s["step"]) for s in states] == ([1, 1, 2] if skip else [1, 1, 1])
    for name in states[0].keys() - {"halted"}:
        np.testing.assert_array_equal(states[0][name], states[1][name], err_msg=name)
        assert np.array_equal(states[1][name], states[2][name], equal_nan=True) != skip, name


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory, options):
    """Options of a run from a checkpoint with such a token, which one of its documents contains."""
    directory = tmp_path_factory.mktemp("poisoned")
    config = OPTConfig.from_hf(options["model"])
    lines = [json.loads(line)["text"] for line in Path(options["data"][0]).read_text().splitlines()]
    lines[7] = lines[7][:80] + " ~" + lines[7][80:]
    tokenizer = train_tokenizer(lines, 300)
    bad = tokenizer("~", add_special_tokens=False, return_tensors=None).input_ids
    assert len(bad) == 1
    model = OPTForCausalLM(dataclasses.replace(config, tie_word_embeddings=False), rngs=nnx.Rngs(0))
    embedding = model.model.decoder.embed_tokens.embedding
    embedding.set_value(embedding.get_value().at[bad[0]].set(jnp.nan))
    model.save_pretrained(directory / "model", tokenizer=tokenizer)
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    changes = dict(data=(str(directory / "text.jsonl"),), model=str(directory / "model"), steps=20, eval_every=100)
    return options | changes


@pytest.mark.slow
def test_a_run_stops_before_the_bad_update_and_can_skip_it(poisoned, tmp_path, capsys):
    run(poisoned, tmp_path / "skipping", skip_nonfinite=True)
    uninterrupted = metrics(tmp_path / "skipping")
    bad = [line["step"] for line in uninterrupted if line["loss"] is None]
    assert bad and uninterrupted[-1]["skipped"] == len(bad) and bad[0] % poisoned["checkpoint_every"] > 1
    assert f"step {bad[0]}: loss nan, gradient norm nan; " in capsys.readouterr().out
    windows = [tuple(line["batch"]) for line in uninterrupted if "batch" in line]
    documents = split_documents(read_documents([Path(poisoned["data"][0])]))[0]
    tokenizer = OPTTokenizer.from_pretrained(tmp_path / "skipping" / "tokenizer")
    tokens = tokenize(documents, tokenizer)
    (where,) = np.flatnonzero(tokens == tokenizer("~", add_special_tokens=False, return_tensors=None).input_ids[0])
    assert all(len(starts) == 8 and any(s <= where < s + 32 for s in starts) for starts in windows)

    message = f"step {bad[0]}: loss nan.* at {windows[0][0]}, .*checkpoint {bad[0] - 1} is the state before it"
    with pytest.raises(ValueError, match="(?s)" + message):
        run(poisoned, tmp_path / "stopping")
    assert max(int(p.name) for p in (tmp_path / "stopping" / "checkpoints").iterdir()) == bad[0] - 1
    same(run(poisoned, tmp_path / "stopping", skip_nonfinite=True), uninterrupted)
    assert f"steps {bad[0] - 1} to 20" in capsys.readouterr().out  # it goes on from that checkpoint


@pytest.mark.slow
def test_an_absurd_learning_rate_ends_as_an_error_of_the_program(options, tmp_path):
    # JAX's own search for NaN cannot run within a step.
    with pytest.raises(SystemExit) as ended, last_words("train.py"), jax.debug_nans(True):
        run(options, tmp_path / "run", learning_rate=1e30)
    message = str(ended.value.code)
    assert message.startswith("train.py: error: step 2: loss nan") and "checkpoint 1 is the state before" in message
    assert not (tmp_path / "run" / "model").exists()


# Loggers ---------------------------------------------------------------------------------------------------------


def events(directory):
    """{tag: {step: value}} as TensorBoard shows it: a start replaces what earlier ones wrote from its step on."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[reportAttributeAccessIssue]

    history: dict[str, dict[int, float]] = {}
    for path in sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content, at = path.read_bytes(), 0
        while at < len(content):  # TFRecords: length, its checksum, data, its checksum
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            if event.session_log.status == SessionLog.START:
                history = {tag: {s: v for s, v in h.items() if s < event.step} for tag, h in history.items()}
            for value in event.summary.value:
                history.setdefault(value.tag, {})[event.step] = value.simple_value
    return history


def test_tensorboard_has_one_history_after_a_resume(tmp_path):
    pytest.importorskip("tensorboardX")
    for start, stop, shift in ((0, 9, 0.5), (5, 12, 0.0)):  # the second start replaces steps 6 to 9
        writer = TensorBoard(tmp_path / "tensorboard", start)
        for step in range(start + 1, stop + 1):
            writer.write({"step": step, "loss": step + shift * (step > 5), "grad_norm": None, "batch": [1, 2]})
        writer.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert events(tmp_path / "tensorboard") == {"loss": {step: float(step) for step in range(1, 13)}}


def test_a_full_disk_ends_tensorboard_also_while_it_is_behind(tmp_path):
    pytest.importorskip("tensorboardX")
    ended = []

    def write() -> None:
        try:
            for step in range(1, 5000):
                writer.write({"step": step} | {f"number {i}": float(i) for i in range(8)})
        except OSError as error:
            ended.append(str(error))

    writer = TensorBoard(tmp_path / "tensorboard", 0)
    with largest_file(1 << 12):
        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        thread.join(timeout=20)
    writer.close()
    assert len(ended) == 1 and "File too large" in ended[0]


@pytest.mark.slow
def test_weights_and_biases_goes_on_with_its_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for start in (0, 5):
        run = WandB("a-project", tmp_path, {"options": {"seed": 0}})
        for step in range(start + 1, start + 9):
            run.write({"step": step, "loss": 1 / step, "grad_norm": None, "batch": [1, 2]})
        run.close()
    identity = (tmp_path / "wandb-id").read_text().strip()
    assert identity and len(list(tmp_path.glob(f"wandb/offline-run-*/run-{identity}.wandb"))) == 2


@pytest.mark.slow
def test_a_run_writes_all_of_them_and_a_trace(options, tmp_path, capsys):
    pytest.importorskip("tensorboardX")
    changes = dict(tensorboard=True, profile="3:4")
    lines = run(options, tmp_path / "run", stop_after=4, **changes)
    assert "traced: steps 3 to 4 are in " in capsys.readouterr().out
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    lines = run(options, tmp_path / "run", stop_after=6, **changes)
    assert "nothing to trace: this start does steps 5 to 10" in capsys.readouterr().out
    history = events(tmp_path / "run" / "tensorboard")
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "step_seconds", "val_loss"} <= history.keys()
    for name in ("loss", "val_loss"):
        ours = {line["step"]: line[name] for line in lines if name in line}
        assert history[name] == {step: pytest.approx(value, rel=1e-6) for step, value in ours.items()}


@pytest.mark.parametrize("changes, package", [(dict(tensorboard=True), "tensorboardX"), (dict(wandb="x"), "wandb")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, changes, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    (option,) = changes
    message = rf"--{option} needs the package {package}: pip install {package}"
    with pytest.raises(ValueError, match=message):
        check_options(Options(**changes))


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_full_disk_under_wandb_names_its_directory(tmp_path, monkeypatch, capsys, fails):
    """wandb's errors have no file name. (A disk that is really full at these moments would need root.)"""

    def full(*_: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def call(name: str) -> None:
        stream: Any = SimpleNamespace(write=full)
        logging.StreamHandler(stream).emit(logging.makeLogRecord({}))  # as wandb's own log
        if name == fails:
            full()

    monkeypatch.setattr(logging, "raiseExceptions", True)
    run = SimpleNamespace(log=lambda *_, **__: call("log"), finish=lambda: call("finish"))
    module = SimpleNamespace(Error=RuntimeError, init=lambda **_: call("init") or run)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(OSError, match=f"No space left on device .* are free.*: make room.*{tmp_path}/wandb"):
        logger = WandB("project", tmp_path, {})
        logger.write({"step": 1, "loss": 2.0})
        logger.close()
    assert capsys.readouterr().err == ""
