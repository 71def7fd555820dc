"""Updates against PyTorch's: AdamW and clipping on equal gradients, and training steps on equal batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from limits import assert_close, within
from oracle import canonical, make_exact_pair, run, torch
from reference import CONFIGS

from opt_jax.parallel.mesh import make_mesh, use_mesh
from opt_jax.parallel.rules import named_leaves
from opt_jax.training.optimizer import make_optimizer, make_schedule
from opt_jax.training.step import make_train_step, new_state, place_batch, state_shardings

STEPS, BATCH, LENGTH, CLIP = 5, 4, 24, 1.0
SCHEDULE = make_schedule(peak=6e-4, warmup_steps=2, steps=STEPS)


def torch_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def torch_backward(model, batch):
    """Run PyTorch's backward pass. Returns the loss."""
    model.zero_grad(set_to_none=True)
    logits = run(model, {"input_ids": batch["input_ids"]}, use_cache=False).logits
    labels = torch.from_numpy(batch["labels"]).long()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())  # ignores -100
    loss.backward()
    return loss.item()


def torch_update(model, optimizer, step, clip_norm=CLIP):
    """Update PyTorch's parameters. Returns the norm of the gradients."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.param_groups[0]["lr"] = float(SCHEDULE(step))
    optimizer.step()
    return norm.item()


def parameters(model):
    """{path: array} of the PyTorch model. Copies, because PyTorch updates in place."""
    return {path: value.copy() for path, value in canonical(dict(model.named_parameters())).items()}


def our_parameters(model):
    """{path: array} of our stacked model."""
    params = {}
    for path, leaf in named_leaves(model).items():
        before, layers, behind = path.partition(".layers.")
        parts = np.asarray(leaf) if layers else [np.asarray(leaf)]
        params |= {f"{before}.layers.{i}.{behind}" if layers else path: part for i, part in enumerate(parts)}
    return params


def gradients(model):
    return {path: g.copy() for path, g in canonical({n: p.grad for n, p in model.named_parameters()}).items()}


def as_float32(arrays):
    return {path: jnp.asarray(value, jnp.float32) for path, value in arrays.items()}


def batches(name, count):
    random = np.random.RandomState(1)
    for _ in range(count):
        ids = random.randint(4, CONFIGS[name].vocab_size, (BATCH, LENGTH + 1)).astype(np.int32)
        batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:].copy()}
        batch["labels"][0, 5:9] = -100
        yield batch


@pytest.mark.parametrize("clip_norm", [0.1, 1e9], ids=["clipped", "not-clipped"])
def test_fed_pytorchs_gradients_an_update_is_pytorchs(clip_norm):
    """Fed its parameters too. Updates are compared, because adding them to parameters of order one rounds them."""
    hf, _ = make_exact_pair("opt-125m", dropout=0.0, num_hidden_layers=1)
    theirs = torch_optimizer(hf)
    ours = make_optimizer(SCHEDULE, weight_decay=0.1, clip_norm=clip_norm)
    before = parameters(hf)
    state = ours.init(as_float32(before))
    update = jax.jit(ours.update)
    for step, batch in enumerate(batches("opt-125m", STEPS)):
        torch_backward(hf, batch)
        updates, state = update(as_float32(gradients(hf)), state, as_float32(before))
        norm = torch_update(hf, theirs, step, clip_norm)
        assert (norm > clip_norm) == (clip_norm < 1)
        after = parameters(hf)
        limit = 1e-5 * float(SCHEDULE(step))
        for path, value in after.items():
            assert_close(updates[path], value - before[path], limit, what=f"{path}, update {step}")
        before = after


@pytest.mark.parametrize(("name", "accumulate"), [("opt-125m", 1), ("opt-350m", 2)])
def test_training_steps_are_pytorchs(name, accumulate):
    """All parameters are random, and PyTorch computes in float64.

    A bias of the keys does not change the softmax. Its gradient is rounding noise, which Adam amplifies.
    """
    hf, model = make_exact_pair(name, dropout=0.0, scan_layers=True, num_hidden_layers=2)
    theirs, ours = torch_optimizer(hf), make_optimizer(SCHEDULE, weight_decay=0.1, clip_norm=CLIP)
    mesh = make_mesh("data=1", devices=jax.devices()[:1])
    state = new_state(model, ours)
    shardings = state_shardings(state, mesh)
    state = jax.device_put(state, shardings)
    train_step = make_train_step(ours, SCHEDULE, model.config, 0, shardings, mesh)
    for step, batch in enumerate(batches(name, STEPS)):
        with use_mesh(mesh):
            placed = place_batch(lambda rows, b=batch: {k: v[rows] for k, v in b.items()}, BATCH, accumulate, mesh)
            state, measured = train_step(state, placed)
        loss = torch_backward(hf, batch)
        grads = {path: np.linalg.norm(g) for path, g in gradients(hf).items()}
        for path in grads:
            if path.endswith("k_proj.bias"):
                assert grads[path] < 1e-13 * grads[path.replace("k_proj", "q_proj")], path
        norm = torch_update(hf, theirs, step)
        assert_close([measured["loss"], measured["grad_norm"]], [loss, norm], rtol=1e-5, what="loss and norm")
        mine = our_parameters(state.model)
        expected = parameters(hf)
        assert mine.keys() == expected.keys()
        for path, value in expected.items():
            away = np.abs(mine[path] - value).max()
            limit = 2 * 6e-4 * (step + 1) if path.endswith("k_proj.bias") else 1e-5
            within(away, limit, f"{path}, update {step}")
