"""Training: data order, recipe, initialisation, the step on one device and on meshes, checkpoints, metrics."""

import dataclasses
import json
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import exhaustive
from support.hlo import Program

from opt_jax import OPTConfig, OPTTokenizer
from opt_jax.config import _SIZES
from opt_jax.data.corpus import split_documents
from opt_jax.data.documents import read_documents
from opt_jax.data.files import find_files, stdlib_files
from opt_jax.data.tokenizers import save_tokenizer, train_tokenizer
from opt_jax.data.tokens import tokenize
from opt_jax.data.windows import Windows
from opt_jax.parallel.mesh import make_mesh, use_mesh
from opt_jax.parallel.rules import named_leaves
from opt_jax.training.checkpoints import Checkpoints
from opt_jax.training.metrics import cut_back
from opt_jax.training.optimizer import make_optimizer, make_schedule
from opt_jax.training.step import (
    batch_loss,
    make_gradients,
    make_train_step,
    new_model,
    new_state,
    place_batch,
    state_shardings,
)

CONFIG = OPTConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    ffn_dim=64,
    num_attention_heads=8,
    max_position_embeddings=16,
    dropout=0.1,
    attention_dropout=0.1,
    init_std=0.05,
)
BATCH, SEQ_LEN = 8, 16
WINDOWS = Windows(np.random.default_rng(0).integers(0, 64, 2000).astype(np.int32), SEQ_LEN, BATCH)


ONE = "data=1"


@cache
def programs(spec, config, seed):
    """(mesh, abstract state, shardings, compiled initialisation, compiled step), as train.py builds them."""
    mesh = make_mesh(spec, devices=jax.devices()[:1] if spec == ONE else None)
    schedule = make_schedule(peak=6e-4, warmup_steps=5, steps=30)
    optimizer = make_optimizer(schedule)
    begin = lambda: new_state(new_model(config, seed, "float32"), optimizer)  # noqa: E731
    abstract = jax.eval_shape(begin)
    shardings = state_shardings(abstract, mesh)
    step = make_train_step(optimizer, schedule, config, seed, shardings, mesh)
    return mesh, abstract, shardings, jax.jit(begin, out_shardings=shardings), step


class Run:
    def __init__(self, spec=ONE, config=CONFIG, seed=0):
        self.mesh, self.abstract, self.shardings, begin, self.step = programs(spec, config, seed)
        self.state = begin()

    def batch(self, step, accumulate=1):
        return place_batch(partial(WINDOWS.batch, step), BATCH, accumulate, self.mesh)

    def losses(self, first, last):
        losses = []
        with use_mesh(self.mesh), jax.transfer_guard("disallow"):
            for step in range(first, last):
                self.state, metrics = self.step(self.state, self.batch(step))
                losses.append(jax.device_get(metrics["loss"]))
        return np.array(losses)


# Data -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1001, 1003])
def test_an_epoch_predicts_every_token_once_in_a_new_order_each_time(length):
    tokens = np.arange(length, dtype=np.int32)
    windows = Windows(tokens, seq_len=10, batch_size=4, seed=1)
    assert windows.count == 100
    epochs = [np.concatenate([windows.rows(step) for step in range(25 * e, 25 * (e + 1))]) for e in range(2)]
    for rows in epochs:
        assert rows.shape == (100, 11) and rows.dtype == np.int32
        assert (np.diff(rows, axis=1) == 1).all()  # contiguous
        targets = np.sort(rows[:, 1:].reshape(-1))
        assert (np.diff(targets) == 1).all() and len(targets) == 1000
    assert not (epochs[0] == epochs[1]).all()
    assert not (np.sort(epochs[0][:, 0]) == epochs[0][:, 0]).all()


def test_a_batch_depends_on_seed_and_step_alone():
    tokens = np.arange(1000, dtype=np.int32)
    make = lambda seed: Windows(tokens, seq_len=7, batch_size=12, seed=seed)  # noqa: E731
    straight, jumping = make(3), make(3)
    batches = [straight.rows(step) for step in range(40)]  # more than three epochs
    for step in (39, 0, 11, 12, 5):
        np.testing.assert_array_equal(jumping.rows(step), batches[step])
        np.testing.assert_array_equal(jumping.rows(step, slice(4, 9)), batches[step][4:9])  # the rows of one host
    assert not (make(4).rows(0) == batches[0]).all()


def test_too_little_text_for_one_window():
    with pytest.raises(
        ValueError, match="10 tokens do not fill one sequence .*, 11: take more data, or a smaller --seq-len"
    ):
        Windows(np.arange(10), seq_len=10, batch_size=1)


def test_documents_from_files_and_directories(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("text\nof two lines\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": 1}\n\n{"text": "two\\u2028lines"}\n{"text": "  "}\n')
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    files = find_files([str(tmp_path)])
    assert files == [tmp_path / "a.jsonl", tmp_path / "sub" / "b.txt"]
    assert read_documents(files) == ["one", "two\u2028lines", "text\nof two lines\n"]
    assert find_files([tmp_path / "c.png"]) == [tmp_path / "c.png"]  # a file that is named is taken whatever its ending


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n["x"]\n', r'a\.jsonl:2: expected an object with a string under "text"'),
        ("a.jsonl", b'{"txt": "x"}', r"a\.jsonl:1: expected an object"),
        ("a.jsonl", b'{"text": "x"}\n' + b"[" * 100_000, r"a\.jsonl:2: not JSON that can be read"),
        ("a.jsonl", b'{"id": ' + b"1" * 5000 + b"}", r"a\.jsonl:1: not JSON that can be read"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "cut \\ud83d"}\n', r"a\.jsonl:2: half of a surrogate pair"),
        ("a.txt", b"fine\n\xff", r"a\.txt:2: not UTF-8 text"),
        ("a.txt", b" \n", r"a\.txt:1: an empty file"),
        ("a.txt", b"\xef\xbb\xbf\r\n", r"a\.txt:1: an empty file"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents([tmp_path / name])


def test_files_of_windows_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"text": "na\u00efve"}\r\n{"text": "two"}\r\n'.encode())
    (tmp_path / "b.txt").write_bytes("\ufeffone\r\ntwo \U0001f600\r\n".encode())
    assert read_documents(find_files([tmp_path])) == ["na\u00efve", "two", "one\ntwo \U0001f600\n"]


def test_missing_paths_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or directory"):
        find_files([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="no text files below this directory"):
        find_files([tmp_path])


def test_documents_are_held_out_whole_or_else_their_ends():
    documents = [f"document {i}" for i in range(100)]
    training, held_out = split_documents(documents)
    assert len(held_out) == 5 and sorted(training + held_out) == sorted(documents)
    assert split_documents(documents) == (training, held_out)
    assert split_documents(["x" * 95 + "y" * 5]) == (["x" * 95], ["y" * 5])


def test_trained_tokenizer_and_token_stream(tmp_path):
    documents = ["def f(x):\n    return x\n" * 20, "naïve \N{SNOWMAN}\r\n" * 5]
    save_tokenizer(train_tokenizer(documents, 300), tmp_path / "tokenizer")
    tokenizer = OPTTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert 260 < len(tokenizer) <= 300
    assert tokenizer.backend_tokenizer.encode("<s><pad></s><unk>", add_special_tokens=False).ids == [0, 1, 2, 3]
    stream = tokenize(documents, tokenizer)
    assert stream.dtype == np.int32 and (stream == 2).sum() == 3 and stream[0] == stream[-1] == 2
    assert tokenizer.decode(stream).split("</s>") == ["", *documents, ""]
    with pytest.raises(ValueError, match="does not hold 4 special tokens and 256 bytes"):
        train_tokenizer(documents, 259)


def test_the_standard_library_is_there_without_its_tests():
    names = {str(path) for path in stdlib_files()}
    assert any(name.endswith("argparse.py") for name in names)
    assert not any("/test/" in name or "site-packages" in name for name in names)


# Recipe ---------------------------------------------------------------------------------------------------------------


def test_schedule_warms_up_and_decays_to_a_tenth():
    schedule = make_schedule(peak=2.0, warmup_steps=4, steps=14)
    np.testing.assert_allclose([schedule(i) for i in range(4)], [0.5, 1.0, 1.5, 2.0])
    np.testing.assert_allclose([schedule(8), schedule(13)], [2.0 * 0.55, 0.2], rtol=1e-6)
    np.testing.assert_allclose(make_schedule(peak=2.0, warmup_steps=0, steps=2)(0), 1.1)


def test_optimizer_is_clipped_adamw_that_decays_everything():
    rng = np.random.default_rng(0)
    params = {
        name: rng.normal(size=shape).astype(np.float32) for name, shape in {"kernel": (3, 2), "bias": (2,)}.items()
    }
    optimizer = make_optimizer(lambda step: jnp.float32(0.01), weight_decay=0.3, clip_norm=0.5)
    state, ours, reference = optimizer.init(params), params, params
    m, v = ({name: np.zeros_like(value) for name, value in params.items()} for _ in range(2))
    for t in range(1, 4):
        # Small at first, because Adam shows clipping only if some gradients are clipped and others are not.
        scale = (0.01, 1.0, 3.0)[t - 1]
        grads = {name: scale * rng.normal(size=value.shape).astype(np.float32) for name, value in params.items()}
        updates, state = optimizer.update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for name, g in grads.items():
            g = g * min(1, 0.5 / norm)
            m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.95 * v[name] + 0.05 * g**2
            adam = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-8)
            reference = reference | {name: reference[name] - 0.01 * (adam + 0.3 * reference[name])}
    for name in params:
        np.testing.assert_allclose(ours[name], reference[name], rtol=1e-5)  # type: ignore[reportArgumentType]


def test_initialisation_is_the_papers():
    config = OPTConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=8, ffn_dim=256, num_attention_heads=4, init_std=0.006
    )
    params = {name: np.asarray(leaf) for name, leaf in named_leaves(new_model(config, 0, "float32")).items()}
    for name, value in params.items():
        if name.endswith("bias"):
            assert (value == 0).all(), name
        elif name.endswith("scale"):
            assert (value == 1).all(), name
        else:
            std = 0.006 / 4 if "out_proj" in name or "fc2" in name else 0.006  # sqrt(2 * 8) = 4
            np.testing.assert_allclose(value.std(), std, rtol=0.02, err_msg=name)
    assert (params["model.decoder.embed_tokens.embedding"][1] == 0).all()
    assert (params["model.decoder.embed_positions.embedding"][1] == 0).all()
    kernel = params["model.decoder.layers.fc1.kernel"]
    assert kernel.shape == (8, 64, 256) and not (kernel[0] == kernel[1]).any()  # layers differ


# The step -------------------------------------------------------------------------------------------------------------


def test_loss_is_of_every_next_token():
    model = new_model(CONFIG, 0, "float32")
    ids, batch = WINDOWS.rows(0), {name: jnp.asarray(rows) for name, rows in WINDOWS.batch(0).items()}
    logits = np.asarray(model(ids[:, :-1]).logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, ids[:, 1:, None], -1).mean()
    loss, count = batch_loss(model, batch)
    assert count == BATCH * SEQ_LEN
    np.testing.assert_allclose(loss / int(count), expected, rtol=1e-6)


@pytest.mark.slow
def test_the_step_donates_its_state_and_reports():
    run = Run()
    before = run.state
    with use_mesh(run.mesh):
        run.state, metrics = run.step(before, run.batch(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert set(metrics) == {"loss", "grad_norm", "lr", "skipped"} and not metrics["skipped"]
    assert all(metrics[name].dtype == jnp.float32 for name in ("loss", "grad_norm", "lr"))
    np.testing.assert_allclose(metrics["loss"], np.log(64), atol=0.1)
    np.testing.assert_allclose(metrics["lr"], 6e-4 / 5, rtol=1e-6)
    assert int(run.state.step) == 1


@pytest.mark.slow
def test_moments_are_updated_in_place():
    run: Any = Run()
    with use_mesh(run.mesh):
        program = Program.compiled(run.step.lower(run.state, run.batch(0)))
    copied = {i.arrays[0][0] for i in program.written_out(program.entry) if i.op == "copy"}
    assert copied.isdisjoint({"f32[2,32,64]", "f32[2,64,32]", "f32[64,32]"})  # fc1, fc2, the embedding


@pytest.mark.slow
def test_dropout_is_a_function_of_seed_and_step():
    def first_loss(step, seed=0, config=CONFIG):
        run = Run(ONE, config, seed)
        model = Run(ONE, config).state.model  # the same weights in all cases
        state = dataclasses.replace(run.state, step=jnp.int32(step), model=model)
        with use_mesh(run.mesh):
            return float(run.step(state, run.batch(0))[1]["loss"])

    assert first_loss(0) == first_loss(0)
    assert len({first_loss(0), first_loss(1), first_loss(0, seed=1)}) == 3
    without = OPTConfig.from_hf(CONFIG.to_hf() | {"dropout": 0.0, "attention_dropout": 0.0})
    assert first_loss(0, config=without) == first_loss(1, config=without)


@pytest.fixture(scope="module")
def reference():
    """(gradients at step 0, losses of 20 steps) on one device, dropout on."""
    run = Run()
    return step_0_gradients(run), run.losses(0, 20)


def step_0_gradients(run):
    with use_mesh(run.mesh):
        gradients = jax.jit(make_gradients(CONFIG, run.shardings.model, run.mesh))
        _, grads = gradients(run.state.model, run.batch(0), jax.random.key(0))
    return {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(grads).items()}


@pytest.mark.slow
@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
@pytest.mark.parametrize("mesh", [*map(exhaustive, ("data=8", "fsdp=8", "tensor=8")), "data=2,fsdp=2,tensor=2"])
def test_a_mesh_computes_what_one_device_does(mesh, reference):
    run = Run(mesh)
    kernel = named_leaves(run.state)["model.model.decoder.layers.fc1.kernel"]
    assert (kernel.sharding.shard_shape(kernel.shape) != kernel.shape) == (mesh != "data=8")  # it is sharded
    moment = named_leaves(run.state)["opt_state.1.mu.model.decoder.layers.fc1.kernel"]
    assert moment.sharding == kernel.sharding

    expected_grads, expected_losses = reference
    assert expected_losses[-1] < expected_losses[0]
    grads = step_0_gradients(run)
    total = np.sqrt(sum((g**2).sum() for g in expected_grads.values()))
    for name, expected in expected_grads.items():
        # The gradient of k_proj's bias is rounding noise, so its limit depends on the norm of all gradients.
        error = np.linalg.norm(grads[name] - expected)
        assert error <= 1e-5 * max(np.linalg.norm(expected), 1e-3 * total), name
    np.testing.assert_allclose(run.losses(0, 20), expected_losses, rtol=1e-5)


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
@pytest.mark.parametrize("name", _SIZES)
def test_moments_lie_where_their_parameters_do(name):
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    optimizer = make_optimizer(make_schedule(peak=6e-4, warmup_steps=5, steps=30))
    state = jax.eval_shape(lambda: new_state(new_model(OPTConfig.preset(name), 0, "bfloat16"), optimizer))
    specs = {name: sharding.spec for name, sharding in named_leaves(state_shardings(state, mesh)).items()}
    parameters = {name: spec for name, spec in specs.items() if name.startswith("model.")}
    assert len(parameters) > 10 and all(any(spec) for name, spec in parameters.items() if name.endswith("kernel"))
    for moment in ("mu", "nu"):
        assert {k: specs[f"opt_state.1.{moment}.{k.removeprefix('model.')}"] for k in parameters} == parameters


@pytest.mark.slow
@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=4,tensor=2"])
def test_a_device_begins_with_its_own_shards(mesh):
    """No array in the program that initialises the state is larger than a device's shard of a parameter."""
    _, abstract, shardings, begin, _ = programs(mesh, CONFIG, 0)
    text = begin.lower().compile().as_text()
    assert text is not None
    sizes = [size for c in Program(text).computations.values() for i in c.values() for _, size in i.arrays]
    leaves = zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True)
    assert max(sizes) <= max(4 * int(np.prod(s.shard_shape(x.shape))) for x, s in leaves)


# Checkpoints and metrics ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_checkpoint_continues_bitwise_and_on_another_mesh(tmp_path, reference):
    run = Run()
    run.losses(0, 8)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    assert checkpoints.latest_step() is None
    checkpoints.save(7, run.state)  # removed when 8 is saved
    checkpoints.save(8, run.state)
    checkpoints.close()

    resumed = Run()
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    assert checkpoints.latest_step() == 8
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["8"]
    resumed.state = checkpoints.restore(8, resumed.abstract, resumed.shardings)
    before = jax.tree.leaves(resumed.state)
    assert all(
        leaf.is_fully_addressable and leaf.dtype == kept.dtype
        for leaf, kept in zip(before, jax.tree.leaves(run.state), strict=True)
    )
    addresses = {leaf.unsafe_buffer_pointer() for leaf in before if leaf.size > 100}
    np.testing.assert_array_equal(resumed.losses(8, 9), reference[1][8:9])
    # Restored arrays are donatable: the first resumed step has put its results where they were.
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(resumed.state) if leaf.size > 100} == addresses
    np.testing.assert_array_equal(resumed.losses(9, 20), reference[1][9:])

    if len(jax.devices()) >= 8:
        moved = Run("data=2,fsdp=4")
        moved.state = checkpoints.restore(8, moved.abstract, moved.shardings)
        assert [x.sharding for x in jax.tree.leaves(moved.state)] == jax.tree.leaves(moved.shardings)
        np.testing.assert_allclose(moved.losses(8, 20), reference[1][8:], rtol=1e-5)
    checkpoints.close()


def test_metrics_are_cut_back_to_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    said = []
    cut_back(path, 0, said.append)  # there is no file, so there is nothing to cut
    assert not path.exists()
    lines = [json.dumps({"step": step}) + "\n" for step in range(1, 6)]
    path.write_text("".join(lines) + '{"step": 6, "lo')
    cut_back(path, 5, said.append)
    assert path.read_text() == "".join(lines)
    cut_back(path, 3, said.append)
    assert path.read_text() == "".join(lines[:3])
    cut_back(path, 0, said.append)
    assert path.read_text() == "" and not said
