"""Memory of a training step: the loss in chunks, rematerialisation, accumulation."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opt_jax import OPTConfig
from opt_jax.model.outputs import cross_entropy
from opt_jax.parallel.mesh import make_mesh, use_mesh
from opt_jax.parallel.rules import named_leaves
from opt_jax.training.loss import next_token_loss
from opt_jax.training.step import make_gradients, new_model, state_shardings

pytestmark = pytest.mark.slow

CONFIG = OPTConfig(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=3,
    ffn_dim=64,
    num_attention_heads=4,
    max_position_embeddings=16,
    dropout=0.0,
    init_std=0.05,
)


def test_a_loss_in_chunks_is_the_loss():
    x, table = jax.random.normal(jax.random.key(0), (2, 7, 8)), jax.random.normal(jax.random.key(1), (20, 8))
    labels = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, 7))).at[0, :3].set(-100)

    def plain(x, table):
        return cross_entropy(jnp.einsum("btp,vp->btv", x, table), labels) * (labels != -100).sum()

    expected = jax.jit(jax.value_and_grad(plain, (0, 1)))(x, table)
    for rows in (14, 4, 1):
        chunked = lambda x, table, rows=rows: next_token_loss(x, table, labels, chunk_bytes=4 * 20 * rows)  # noqa: E731
        got = jax.jit(jax.value_and_grad(chunked, (0, 1)))(x, table)
        np.testing.assert_allclose(jax.jit(chunked)(x, table), expected[0], rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def gradients(batch, mesh="data=1", devices=1, config=CONFIG, key=None, **options):
    mesh = make_mesh(mesh, jax.devices()[:devices])
    model = new_model(config, 0, "float32", **options)
    shardings = state_shardings(model, mesh)
    with use_mesh(mesh):
        model = jax.device_put(model, shardings)
        compiled = jax.jit(make_gradients(config, shardings, mesh)).lower(model, batch, key).compile()
        loss, grads = compiled(model, batch, key)
    return compiled, float(loss), {name: np.asarray(leaf) for name, leaf in named_leaves(grads).items()}


def assert_same(got, expected):
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-6)
    for name, value in expected[2].items():
        np.testing.assert_allclose(got[2][name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def ids(shape):
    return jnp.asarray(np.random.default_rng(0).integers(4, 96, shape).astype(np.int32))


def test_remat_keeps_less_and_computes_the_same():
    batch = {"input_ids": ids((1, 8, 16)), "labels": ids((1, 8, 16))}
    results = {remat: gradients(batch, remat=remat) for remat in ("none", "dots", "names", "full")}
    for remat in ("dots", "names", "full"):
        assert_same(results[remat], results["none"])
    # What the forward loop keeps for the backward loop: arrays with an axis of layers and one of rows.
    kept = {}
    for remat, (compiled, *_) in results.items():
        loops = [line for line in (compiled.as_text() or "").splitlines() if re.search(r"\) while\(", line)]
        handed = [re.findall(r"f32\[3,8,([\d,]+)\]", loop.split("while(")[0]) for loop in loops]
        shapes = next(filter(None, handed))  # other loops may come first
        kept[remat] = sum(int(np.prod([int(n) for n in dims.split(",")])) for dims in shapes)
    assert kept["none"] > kept["dots"] > kept["names"] > kept["full"] == 16 * 32
    assert kept["names"] == 3 * kept["full"] and kept["dots"] == 8 * kept["full"]


@pytest.mark.parametrize("mesh", ["data=1", "fsdp=2,tensor=2"])
def test_a_layer_in_parts_of_rows_computes_the_same(mesh, monkeypatch):
    devices = 1 if mesh == "data=1" else 4
    if jax.device_count() < devices:
        pytest.skip("needs eight devices")
    batch = {"input_ids": ids((1, 8, 16)), "labels": ids((1, 8, 16))}
    batch["segment_ids"] = jnp.asarray(np.random.default_rng(1).integers(0, 3, (1, 8, 16)).cumsum(-1))
    config = dataclasses.replace(CONFIG, dropout=0.1, attention_dropout=0.1)  # drawn for each row
    key = jax.random.key(1)
    expected = gradients(batch, mesh, devices, config=config, key=key, remat="full")
    monkeypatch.setattr("opt_jax.model.remat.PART_BYTES", 2 * 4 * 16 * 32)  # two rows
    got = gradients(batch, mesh, devices, config=config, key=key, remat="full")
    assert_same(got, expected)
    rows, heads = (8, 4) if devices == 1 else (4, 2)
    scores = [f"f32[{n},{heads},16,16]" in (result[0].as_text() or "") for result in (expected, got) for n in (rows, 2)]
    assert scores == [True, False, False, True]  # scores of all rows of a device, or of two


@pytest.mark.parametrize("mesh", ["data=1", "data=2,fsdp=2,tensor=2"])
def test_micro_batches_weigh_every_label_the_same(mesh):
    devices = 1 if mesh == "data=1" else 8
    if jax.device_count() < devices:
        pytest.skip("needs eight devices")
    one_batch = {"input_ids": ids((1, 16, 16)), "labels": ids((1, 16, 16)).at[0, :5].set(-100).at[0, 8, 3:].set(-100)}
    parts = {name: value.reshape(4, 4, 16) for name, value in one_batch.items()}
    options: dict[str, Any] = dict(
        config=dataclasses.replace(CONFIG, dropout=0.1, attention_dropout=0.1), key=jax.random.key(1)
    )
    expected = gradients(one_batch, **options)
    assert_same(gradients(parts, mesh, devices, **options), expected)  # with the same dropout
    if devices == 1:
        assert_same(gradients(parts), gradients(one_batch))
    else:
        assert_same(gradients(one_batch, mesh, devices, **options), expected)


def test_sizes_that_do_not_divide_over_tensor_are_refused():
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    batch = {"input_ids": ids((1, 8, 15)), "labels": ids((1, 8, 15))}
    with pytest.raises(ValueError, match="15 tokens per sequence do not divide over mesh axis tensor=2"):
        gradients(batch, "data=4,tensor=2", 8)
    with pytest.raises(ValueError, match="4 attention heads do not divide over mesh axis tensor=8"):
        gradients(batch, "tensor=8", 8)
