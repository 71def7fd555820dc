"""Activations on disk: as `run_with_cache` at real tokens; resumed byte for byte; refused if an input changes."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import CONFIGS, our_model
from support.small_models import on_mesh

from opt_jax import OPTForCausalLM, named_parameters
from opt_jax.parallel.mesh import make_mesh
from opt_jax.research import collect
from opt_jax.research.collect import load_activations

NAMES = ["blocks.0.hook_resid_post", "blocks.*.attn.hook_z", "hook_pos_embed"]


@pytest.fixture(scope="module")
def model():
    return our_model("opt-125m")


def data(seed=0, count=3):
    draw = np.random.RandomState(seed)
    batches = []
    for i in range(count):
        ids = draw.randint(4, 99, (2, 6)).astype(np.int32)
        mask = np.ones((2, 6), bool)
        mask[1, : i + 1] = False  # left
        mask[0, 6 - i :] = False  # right
        batches.append((ids, mask))
    return batches


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_values_are_those_of_run_with_cache_at_real_tokens(model, tmp_path):
    calls = []
    stored = collect(model, data(), tmp_path / "a", names=NAMES, progress=lambda *done: calls.append(done))
    expected = {}
    for ids, mask in data():
        _, kept = model.run_with_cache(ids, mask, names=NAMES)
        for name, value in kept.items():
            value = np.broadcast_to(value, ids.shape + value.shape[2:])
            expected.setdefault(name, []).append(value[mask])
        expected.setdefault("input_ids", []).append(ids[mask])
    rows = [2 * i + row for i, (_, mask) in enumerate(data()) for row in (0, 1) for _ in range(mask[row].sum())]
    assert stored.keys() == {*expected, "rows"} and len(stored) == 7
    for name, parts in expected.items():
        np.testing.assert_allclose(stored[name], np.concatenate(parts), rtol=1e-5, atol=1e-6)
    assert stored["rows"].tolist() == rows
    assert stored["blocks.1.attn.hook_z"].shape == (len(rows), 3, 8)
    assert isinstance(stored["rows"], np.memmap) and np.load(tmp_path / "a" / "hook_pos_embed.npy").shape[1] == 24
    assert calls == [(1, 11), (2, 20), (3, 27)]


@pytest.mark.parametrize("form", ["dict", "ids", "lists"])
def test_forms_of_a_batch(model, tmp_path, form):
    ids, _ = data()[0]
    batch = {"dict": {"input_ids": ids, "attention_mask": np.ones((2, 6))}, "ids": ids, "lists": ids.tolist()}[form]
    stored = collect(model, [batch], tmp_path / "a", names="blocks.0.mlp.hook_post")
    assert stored["blocks.0.mlp.hook_post"].shape == (12, 40) and stored["input_ids"].tolist() == ids.ravel().tolist()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("batches_before", [0, 1, 2, 3])
@pytest.mark.parametrize("seconds", [0, 10])
def test_killed_and_resumed_is_byte_identical(model, tmp_path, monkeypatch, batches_before, seconds):
    """As after a kill: no `finally` of ours does more than close the files. Half a row lies behind what is certain."""
    module = sys.modules["opt_jax.research.collect"]
    monkeypatch.setattr(module, "SECONDS", seconds)
    collect(model, data(), tmp_path / "whole", names=NAMES)

    def killed():
        yield from data()[:batches_before]
        raise Killed

    with pytest.raises(Killed):
        collect(model, killed(), tmp_path / "part", names=NAMES)
    with pytest.raises(FileNotFoundError, match="no complete activations"):
        load_activations(tmp_path / "part")
    for path in (tmp_path / "part").glob("*.npy"):
        with path.open("ab") as file:
            file.write(b"half")
    computed = []
    collect(model, data(), tmp_path / "part", names=NAMES, progress=lambda *done: computed.append(done[0]))
    assert computed == list(range(1 + (batches_before if seconds == 0 else 0), 4))
    assert content(tmp_path / "part") == content(tmp_path / "whole")


def test_a_complete_directory_is_only_compared(model, tmp_path):
    collect(model, data(), tmp_path / "a", names=NAMES)
    before, calls = content(tmp_path / "a"), []
    stored = collect(model, iter(data()), tmp_path / "a", names=NAMES, progress=lambda *done: calls.append(done))
    assert content(tmp_path / "a") == before and calls == [] and len(stored["rows"]) == 27


def changed(model):
    other = nnx.clone(model)
    param = named_parameters(other)["model.decoder.layers.2.fc2.kernel"]
    value = np.array(param.get_value())
    value[0, [0, 1]] = value[0, [1, 0]]  # the same numbers in another order
    param.set_value(jnp.asarray(value))
    return other


def test_another_model_names_or_data_are_refused(model, tmp_path):
    collect(model, data(), tmp_path / "a", names=NAMES)
    before = content(tmp_path / "a")
    config = OPTForCausalLM(dataclasses.replace(CONFIGS["opt-125m"], dropout=0.3), rngs=nnx.Rngs(0))
    other_ids, other_mask = data(), data()
    other_ids[1][0][0, 3] += 1
    other_mask[2][1][1, 4] = False
    for words, arguments in {
        "another model": dict(model=changed(model)),
        "another  model": dict(model=config),
        "other names": dict(names=NAMES[:2]),
        "other data": dict(batches=other_ids),
        "other  data": dict(batches=other_mask),
        "only 2 now": dict(batches=data()[:2]),
        "there are more now": dict(batches=data(count=4)),
    }.items():
        given = dict(model=model, batches=data(), names=NAMES) | arguments
        with pytest.raises(ValueError, match=words.replace("  ", " ")):
            collect(directory=tmp_path / "a", **given)
    assert content(tmp_path / "a") == before


def test_what_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"blocks.0.attn.hook_pattern has the axes \[B, H, T, S\]"):
        collect(model, data(), tmp_path / "a", names="blocks.*.attn.hook_pattern")
    with pytest.raises(ValueError, match="did you mean blocks.0.hook_resid_pre"):
        collect(model, data(), tmp_path / "a", names="blocks.0.hook_resid")
    with pytest.raises(ValueError, match="no tokens"):
        collect(model, [], tmp_path / "a", names="hook_embed")
    with pytest.raises(ValueError, match="a batch must be"):
        collect(model, data()[0][0], tmp_path / "a", names="hook_embed")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="thesis.tex"):
        collect(model, data(), tmp_path / "mine", names="hook_embed")


def test_a_file_that_lost_its_end_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["opt_jax.research.collect"], "SECONDS", 0)

    def killed():
        yield from data()[:2]
        raise Killed

    with pytest.raises(Killed):
        collect(model, killed(), tmp_path / "a", names="hook_embed")
    path = tmp_path / "a" / "hook_embed.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="hook_embed.npy is shorter"):
        collect(model, data(), tmp_path / "a", names="hook_embed")


def test_bfloat16_keeps_its_bits(tmp_path):
    model = our_model("opt-125m", dtype=jnp.bfloat16)
    stored = collect(model, data(), tmp_path / "a", names="blocks.1.hook_resid_mid")["blocks.1.hook_resid_mid"]
    ids, mask = data()[0]
    _, kept = model.run_with_cache(ids, mask, names="blocks.1.hook_resid_mid")
    assert stored.dtype == jnp.bfloat16 and stored.shape == (27, 24)
    assert (stored[:11] == np.asarray(kept["blocks.1.hook_resid_mid"])[mask]).all()


def test_a_mesh_gives_the_same_values_and_may_go_on(model, tmp_path):
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    sharded = on_mesh(model, make_mesh("data=2,fsdp=2", devices=jax.devices()[:4]))
    one = collect(model, data(), tmp_path / "a", names=NAMES)
    four = collect(sharded, data(), tmp_path / "b", names=NAMES)
    for name, value in one.items():
        np.testing.assert_allclose(four[name], value, rtol=1e-5, atol=1e-6)
    collect(sharded, data(), tmp_path / "a", names=NAMES)  # compared: the same parameters, wherever they lie
