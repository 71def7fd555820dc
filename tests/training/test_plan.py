"""`train.py --plan`: what is counted in traced and compiled programs, and plans for TPUs that are not there."""

import dataclasses
import json
import os
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import train
from opt_jax import OPTConfig
from opt_jax.parallel.hlo import COLLECTIVES, Program, collective_bytes
from opt_jax.parallel.mesh import batch_sharding, make_mesh, use_mesh
from opt_jax.parallel.topologies import HBM, topology_devices
from opt_jax.training.options import PLANNED, Options
from opt_jax.training.plan import floor_bytes, hardware_flops, largest_that_fits, make_plan
from opt_jax.training.step import make_gradients, new_model, state_shardings

LIBTPU = Path(sys.prefix) / "libtpu"
needs_libtpu = pytest.mark.skipif(
    not (LIBTPU / "libtpu").is_dir(), reason=f"no libtpu in {LIBTPU}: `make test` installs it (Linux)"
)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    ("collective", "kind", "sent"),
    [  # bytes that a ring of 8 devices sends, each with 256 bytes: float32 [16, 4]
        (lambda x: lax.all_gather(x, "fsdp"), "all-gather", 256 * 7),
        (lambda x: lax.psum_scatter(x, "fsdp", tiled=True), "reduce-scatter", 256 / 8 * 7),
        (lambda x: lax.psum(x, "fsdp"), "all-reduce", 256 * 2 * 7 / 8),
        (lambda x: lax.ppermute(x, "fsdp", [(i, (i + 1) % 8) for i in range(8)]), "collective-permute", 256),
    ],
)
def test_collectives_are_counted_as_often_as_they_run(collective, kind, sent):
    mesh = make_mesh("fsdp=8", jax.devices()[:8])

    def loop(x):  # a loop whose collective depends on the iteration, and whose result is used
        return lax.fori_loop(0, 5, lambda i, x: x + jnp.sum(jnp.sin(collective(x * i))), x)

    mapped = jax.shard_map(loop, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False)
    text = jax.jit(mapped).lower(jnp.ones((128, 4))).compile().as_text()
    assert text is not None
    program = Program(text)
    assert {k: v for k, v in collective_bytes(program).items() if v} == {kind: 5 * sent}


def test_flops_count_loops_and_what_is_recomputed():
    def layer(x, w):
        return x + jnp.dot(jnp.tanh(jnp.dot(x, w[0])), w[1])

    def loss(ws, x, remat):
        body = jax.checkpoint(layer) if remat else layer
        return lax.scan(lambda x, w: (body(x, w), None), x, ws)[0].sum()

    def products(remat):  # number of products
        traced = jax.jit(jax.grad(partial(loss, remat=remat))).trace(jnp.ones((5, 2, 16, 16)), jnp.ones((4, 16)))
        return hardware_flops(traced.jaxpr.jaxpr) / (5 * 2 * 4 * 16 * 16)

    assert products(remat=False) == 2 + 4
    assert products(remat=True) == 2 + 1 + 4  # only the first product of a layer is computed again


@pytest.mark.parametrize(("limit", "largest"), [(0, None), (1, 1), (5, 4), (100, 16)])
def test_the_largest_that_fits(limit, largest):
    asked = []
    assert largest_that_fits([1, 2, 4, 8, 16], lambda n: asked.append(n) or n <= limit) == largest
    assert len(asked) <= 3


@pytest.fixture
def libtpu():
    """Restores the environment, which `topology_devices` changes."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_unknown_topologies_are_errors():
    with pytest.raises(ValueError, match="--topology v5p8: expected a generation"):
        topology_devices("v5p8")
    with pytest.raises(ValueError, match="--topology v5p:512x512x512: 134217728 chips, a pod of v5p has 8960: choose"):
        topology_devices("v5p:512x512x512")


@needs_libtpu
def test_a_shape_that_libtpu_refuses_is_an_error(libtpu):
    with pytest.raises(ValueError, match=r"v5e:3x3: libtpu knows no such slice \(.*\): choose one of 2x2, "):
        topology_devices("v5e:3x3")
    assert len(topology_devices("v5e:2x2")) == 4


def plan(directory, *words):
    """The JSON of `train.py --plan` for one small layer and short sequences.

    For two layers of width 256 and sequences of 2048, libtpu takes four times as long.
    """
    config = OPTConfig(
        vocab_size=512,
        hidden_size=128,
        num_hidden_layers=1,
        ffn_dim=256,
        num_attention_heads=2,
        max_position_embeddings=256,
        dropout=0.0,
    )
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    named = ["--model", str(directory / "config.json"), "--plan", "--plan-output", str(directory / "plan.json")]
    train.main(train.parse_options([*named, "--seq-len=256", *words]))
    return json.loads((directory / "plan.json").read_text())


@pytest.mark.slow
@needs_libtpu
def test_a_plan_for_a_slice(tmp_path, libtpu, capsys):
    # This mesh splits an axis of the torus.
    words = "--topology v5e:4x4 --mesh fsdp=8,tensor=2 --batch-size 32".split()
    report = plan(tmp_path, *words)
    printed, said = capsys.readouterr()
    assert "compiling the step with 4 sequences at a time, on 16 chips" in said and " GB a chip" in said
    assert report["fits"] and report["largest_micro_batch"] == 4
    assert report["mesh"] == {"data": 1, "fsdp": 8, "tensor": 2} and report["micro_batch"] == 4
    assert report["hbm_capacity_bytes"] == int(15.75 * 2**30)
    on_chip = report["parameter_bytes_per_chip"]
    assert report["parameters"] * 4 / 16 < on_chip < report["parameters"] * 4 / 12  # float32; positions split 8 ways
    assert report["optimizer_bytes_per_chip"] == pytest.approx(2 * on_chip, rel=1e-3)
    assert report["hbm_bytes_per_chip"] > 3 * on_chip + 0.9 * report["temporary_bytes"]
    assert report["model_flops"] == 32 * 256 * (6 * report["parameters"] + 12 * 128 * 256)
    assert report["compile_seconds"] > 0
    assert sum(report["collective_bytes"].values()) > 0.5 * report["floor_bytes"]
    assert report["collective_bytes"]["all-gather"] > 0 and report["collective_bytes"]["reduce-scatter"] > 0
    for words in ("HBM", "all-gather", "largest micro-batch", "v5e:4x4"):
        assert words in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "plan.json"]  # no run was begun


@pytest.mark.slow
@needs_libtpu
def test_a_plan_that_does_not_fit_says_what_would(tmp_path, libtpu, capsys):
    # Each chip has a prime number of sequences, so 1 is the only other micro-batch. A chip of a v4 is one device.
    report = plan(tmp_path, "--topology", "v4:2x2x1", "--batch-size", str(4 * 32843))
    printed = capsys.readouterr().out
    assert report["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1} and report["hbm_capacity_bytes"] == int(30.75 * 2**30)
    assert not report["fits"] and report["hbm_bytes_per_chip"] > report["hbm_capacity_bytes"]
    assert report["largest_micro_batch"] == 1
    assert "DOES NOT FIT" in printed and "--accumulate 32843" in printed


def test_a_plan_is_of_the_runs_own_batches(monkeypatch):
    config = OPTConfig.preset("125m", num_hidden_layers=2)
    mesh = make_mesh("data=1", jax.devices()[:1])
    batches, fitting = [], set()

    def compile_step(step, state, batch, capacity):
        batches.append({name: ids.shape for name, ids in batch.items()})
        return dict(fits=len(batches) in fitting, hbm_bytes_per_chip=1, compile_seconds=0.0)

    monkeypatch.setattr("opt_jax.training.plan.compile_step", compile_step)
    monkeypatch.setitem(HBM, mesh.devices.flat[0].device_kind, 1)
    model = jax.eval_shape(lambda: new_model(config, 0, "float32"))
    state = SimpleNamespace(model=model, opt_state=model)
    shardings = state_shardings(model, mesh)
    shardings = SimpleNamespace(model=shardings, opt_state=shardings)
    concat, segments = Options(batch_size=4, accumulate=2), Options(batch_size=4, accumulate=2, pack="segments")
    for options, names in ((concat, ["input_ids", "labels"]), (segments, ["input_ids", "labels", "segment_ids"])):
        report = make_plan(None, state, shardings, mesh, config, options, 64)
        assert batches == [dict.fromkeys(names, (2, 2, 64)), dict.fromkeys(names, (4, 1, 64))]
        assert report["largest_micro_batch"] is None and report["advice"].startswith("not even one fits: more chips, ")
        batches.clear()
    # If the given micro-batch fits, larger ones are tried.
    for fits, largest in (({1}, 2), ({1, 2}, 4)):
        fitting.update(fits)
        report = make_plan(None, state, shardings, mesh, config, concat, 64)
        assert [batch["labels"] for batch in batches] == [(2, 2, 64), (1, 4, 64)]
        assert report["largest_micro_batch"] == largest
        assert report["advice"].endswith(f"--accumulate {4 // largest}")
        batches.clear()


def small_config(vocab: int, layers: int, width: int, length: int) -> OPTConfig:
    return OPTConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        ffn_dim=4 * width,
        num_attention_heads=2,
        max_position_embeddings=length,
        dropout=0.0,
    )


@pytest.mark.slow
@needs_libtpu
def test_what_a_layer_sends(libtpu, monkeypatch):
    layers, parts, rows, length, width, vocab = 3, 2, 4, 1024, 256, 50272
    monkeypatch.setattr("opt_jax.model.remat.PART_BYTES", 2 * rows // parts * length * width)
    config = small_config(vocab, layers, width, length)
    mesh = make_mesh("fsdp=4,tensor=2", topology_devices("v5p:2x2x2"))
    model = jax.eval_shape(
        lambda: new_model(config, 0, "bfloat16", attn_implementation="splash", remat="full", grad_dtype="bfloat16")
    )
    shardings = state_shardings(model, mesh)
    ids = jax.ShapeDtypeStruct((1, 4 * rows, length), jnp.int32)
    with use_mesh(mesh):
        where = (shardings, batch_sharding(mesh, leading=1))
        step = jax.jit(make_gradients(config, shardings, mesh), in_shardings=where)
        text = step.lower(model, {"input_ids": ids, "labels": ids}).compile().as_text()
    assert text is not None
    program, activations, weights, largest = Program(text), Counter(), Counter(), 0
    for name, instruction, times in program.executed():
        for array, size in instruction.arrays:
            if array.startswith("f32") and str(vocab // 2) in array:
                largest = max(largest, size)
        kind = instruction.op.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        kind = "reduce-scatter" if "all-reduce-scatter" in name else kind
        passed = "backward" if re.search(r"transpose\(|rematted", instruction.attributes) else "forward"
        if instruction.group_size == 2 and times == layers * parts:
            activations[passed] += 1
        if times == layers:
            weights[kind, instruction.group_size] += len(instruction.operands)  # one may send more than one array
    assert activations == {"forward": 4, "backward": 7}  # rematerialisation skips the last sum of a layer
    # q, k, v, out_proj, fc1 and fc2 are gathered for each of two passes, along one side of 2 x 2 chips and then along
    # the other; their gradients are reduce-scattered in the same way.
    assert weights == {("all-gather", 2): 24, ("reduce-scatter", 2): 12}
    assert 0 < largest < 4 * rows * length * vocab // 2  # no float32 logits of all tokens of a device


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "spec", "rows", "width"),
    [
        ("v5p:2x2x2", "fsdp=4,tensor=2", 2, 256),  # in parts of one row
        ("v5e:4x4", "fsdp=16", 1, 256),  # two equal sides
        ("v5p:4x4x4", "fsdp=64", 1, 512),  # there the compiler all-reduces gathered weights, too
    ],
)
def test_small_slices_gather_and_scatter_what_they_could_all_reduce(libtpu, monkeypatch, topology, spec, rows, width):
    layers, length = 4, 128 * rows
    monkeypatch.setattr("opt_jax.model.remat.PART_BYTES", 2 * length * width)
    config = small_config(512, layers, width, length)
    mesh = make_mesh(spec, topology_devices(topology))
    model = jax.eval_shape(lambda: new_model(config, 0, "bfloat16", remat="full", grad_dtype="bfloat16"))
    shardings = state_shardings(model, mesh)
    ids = jax.ShapeDtypeStruct((1, rows * mesh.shape["fsdp"], length), jnp.int32)
    with use_mesh(mesh):
        step = jax.jit(make_gradients(config, shardings, mesh), in_shardings=(shardings, batch_sharding(mesh, 1)))
        text = step.lower(model, {"input_ids": ids, "labels": ids}).compile().as_text()
    assert text is not None
    sent, parameters = collective_bytes(Program(text)), sum(x.size for x in jax.tree.leaves(model))
    floor = floor_bytes(config, parameters, mesh, 1, rows, length)
    assert sent["reduce-scatter"] > 0.3 * floor and sent["all-gather"] > 0.3 * floor
    assert sent["all-reduce"] < 0.03 * floor
    assert sum(sent.values()) <= 1.1 * floor


def test_gradients_are_sent_in_their_dtype():
    config = OPTConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        ffn_dim=16,
        num_attention_heads=2,
        max_position_embeddings=16,
        dropout=0.0,
    )
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    mesh = make_mesh("fsdp=4", jax.devices()[:4])

    def sent(dtype, grad_dtype):
        model = jax.eval_shape(lambda: new_model(config, 0, dtype, grad_dtype=grad_dtype))
        ids = jax.ShapeDtypeStruct((1, 4, 16), jnp.int32)
        with use_mesh(mesh):
            step = make_gradients(config, state_shardings(model, mesh), mesh)
            text = str(jax.make_jaxpr(step)(model, {"input_ids": ids, "labels": ids}))
        return set(re.findall(r":(\w+)\[[\d,]*\] = reduce_scatter", text))

    assert sent("bfloat16", "bfloat16") == {"bf16"}
    assert sent("bfloat16", "float32") == {"f32"}
    assert sent("float32", "bfloat16") == {"bf16"}
    assert sent("float32", "float32") == {"f32"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--plan", "--plan needs --topology"),
        ("--topology v5e:2x4", "--topology is for --plan"),
        ("--plan-output x.json", "--plan-output is for --plan"),
        (
            "--plan --topology v5e:2x4 --tensorboard --profile 1:2 --fall-back",
            "--plan compiles a pretraining step and runs nothing: leave out --fall-back, --tensorboard, --profile$",
        ),
        ("--recipe opt-125m --plan --topology v5e:2x4 --output x", "leave out --output$"),
        ("--plan --topology v5e:2x4 --plan-output no/x.json", "--plan-output no/x.json: there is no such directory"),
    ],
)
def test_contradictions_are_errors(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        train.main(train.parse_options(words.split()))
    assert not list(tmp_path.iterdir())
    assert PLANNED <= {field.name for field in dataclasses.fields(Options)}
