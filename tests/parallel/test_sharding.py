"""Meshes, the table from parameter path to mesh axes, and a model on eight (fake) devices against one device."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import PartitionSpec as P
from reference import CLASSES, SMALL, batch, our_model

import opt_jax
from opt_jax import OPTConfig, named_parameters
from opt_jax.config import _SIZES
from opt_jax.model.lora import TARGETS, LoRA
from opt_jax.parallel.collectives import gather_parameters
from opt_jax.parallel.mesh import batch_sharding, fsdp_stages, make_mesh, per_device, use_mesh
from opt_jax.parallel.rules import PARAMETER_AXES, constrain, param_sharding, param_spec

eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


@eight
@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        (None, (1, 8, 1)),
        ("", (1, 8, 1)),
        ("data=2,fsdp=4", (2, 4, 1)),
        ("data=2, fsdp=2, tensor=2", (2, 2, 2)),
        ("tensor=2,data=-1", (4, 1, 2)),
        ({"fsdp": -1}, (1, 8, 1)),
    ],
)
def test_make_mesh(spec, sizes):
    mesh = make_mesh(spec, jax.devices()[:8])
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), sizes, strict=True))


@eight
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("fsdp=4", "data=1, fsdp=4, tensor=1: sizes multiply to 4, but there are 8 devices"),
        ("data=3,fsdp=-1", "multiply to 3, but there are 8"),
        ("data=-1,fsdp=-1", "at most one may be -1"),
        ("data=0", "must be positive"),
        ("data=-2", "must be positive"),
        ("model=8", "unknown axis 'model'; the axes are data, fsdp, tensor"),
        ("data", "'data' needs a size"),
        ("data=x", "'data' needs a size"),
        ("data=2,data=4", "names an axis twice"),
    ],
)
def test_bad_meshes_are_refused_with_the_numbers(spec, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make_mesh(spec, jax.devices()[:8])


@pytest.fixture
def compilation_cache_dir(tmp_path):
    """A directory in which JAX caches all programs during a test."""
    settings = dict(jax_compilation_cache_dir=str(tmp_path), jax_persistent_cache_min_compile_time_secs=0)
    before = {name: getattr(jax.config, name) for name in (*settings, "jax_enable_compilation_cache")}
    for name, value in (settings | dict(jax_enable_compilation_cache=True)).items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@eight
def test_programs_for_several_cpus_are_not_cached(compilation_cache_dir):
    """A program from the cache can hang there; see `turn_cache_off`."""
    cached = lambda: [path.name for path in compilation_cache_dir.iterdir() if "jit_" in path.name]  # noqa: E731
    make_mesh(None, jax.devices()[:1])
    jax.jit(lambda x: x + 1)(1.0)
    assert len(cached()) == 1
    with pytest.warns(UserWarning, match="compilation cache .* is not used from now on: a program from it can hang"):
        mesh = make_mesh(None, jax.devices()[:8])
    with use_mesh(make_mesh(None, jax.devices()[:8])):  # it has been said
        jax.jit(lambda x: x + 2, out_shardings=batch_sharding(mesh))(np.zeros(8))
    assert len(cached()) == 1

    def once_more():  # with a mesh that is older than the setting, as another library's may be
        jax.config.update("jax_enable_compilation_cache", True)
        return pytest.warns(UserWarning, match="is not used from now on")

    with once_more(), use_mesh(mesh):
        pass
    with once_more():
        model = opt_jax.OPTForCausalLM.from_pretrained("tiny", mesh=mesh)
    with once_more():
        model.generate([[5, 6]], max_new_tokens=1)


def abstract(cls: str, config: OPTConfig, scan_layers: bool = False):
    return nnx.eval_shape(lambda: getattr(opt_jax, cls)(config, rngs=nnx.Rngs(0), scan_layers=scan_layers))


@pytest.mark.slow
def test_every_parameter_has_exactly_one_row_and_every_row_a_parameter(pytestconfig):
    used = set()
    # These variants have all kinds of parameters. The other sizes are only larger.
    small: dict[str, Any] = dict(num_hidden_layers=2)
    configs = [OPTConfig.preset(name, **small) for name in ("125m", "350m")]
    configs += [OPTConfig.preset("125m", **small, tie_word_embeddings=False, word_embed_proj_dim=512)]
    models = [(abstract(cls, config, form), form) for config in configs for cls in CLASSES for form in (True, False)]
    if pytestconfig.getoption("--exhaustive"):
        models += [(abstract(cls, OPTConfig.preset(name), True), True) for name in _SIZES for cls in CLASSES]
    models += [(abstract("OPTForCausalLM", OPTConfig.preset("125m")), False)]  # layer numbers of two digits
    models += [(LoRA(8, 8.0, TARGETS).adapt(abstract("OPTForCausalLM", configs[0], True)), True)]
    for model, scan_layers in models:
        for path, param in named_parameters(model).items():
            rows = [row for row in PARAMETER_AXES if re.fullmatch(_pattern(row), path)]
            assert len(rows) == 1, (path, rows)
            stacked = scan_layers and ".layers." in path
            assert len(PARAMETER_AXES[rows[0]]) + stacked == len(param.get_value().shape)
            used.update(rows)
    assert used == set(PARAMETER_AXES)


def _pattern(row: str) -> str:
    return re.escape(row).replace(r"\.layers\.\*\.", r"\.layers\.(\d+\.)?")


@eight
def test_param_spec_refuses_what_does_not_divide_and_what_it_does_not_know():
    mesh = make_mesh("fsdp=4,tensor=2", jax.devices()[:8])
    kernel = "model.decoder.layers.3.fc1.kernel"
    assert param_spec(kernel, (8, 6), mesh) == jax.P("fsdp", "tensor")
    assert param_spec("model.decoder.layers.fc1.kernel", (12, 8, 6), mesh) == jax.P(None, "fsdp", "tensor")
    with pytest.raises(ValueError, match=r"layers.3.fc1.kernel: dimension 6 does not divide over mesh axis fsdp=4"):
        param_spec(kernel, (6, 6), mesh)
    with pytest.raises(KeyError, match="fc3"):
        param_spec("model.decoder.layers.3.fc3.kernel", (8, 8), mesh)


def test_constrain_is_a_no_op_without_a_mesh():
    x = jnp.ones((2, 3, 4))
    assert constrain(x, "residual") is x
    with pytest.raises(KeyError):
        with use_mesh(make_mesh("data=1", jax.devices()[:1])):
            constrain(x, "residue")


@eight
def test_a_caller_may_map_over_devices_of_a_mesh_of_its_own():
    """`jax.pmap`, as scripts for the old Flax port have it, and `jax.shard_map` over axes that are not ours."""
    model = our_model("opt-125m", num_hidden_layers=1)
    ids = np.arange(24).reshape(8, 1, 3) + 5
    expected = np.stack([model(row).logits for row in ids])
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(lambda rows: model(rows).logits, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    for logits in (jax.pmap(lambda row: model(row).logits)(ids), mapped(ids[:, 0])[:, None]):
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@eight
def test_constrain_pins_the_layout():
    mesh = make_mesh("data=2,fsdp=2,tensor=2", jax.devices()[:8])
    with use_mesh(mesh):
        x = jax.jit(lambda x: constrain(x, "residual"))(jnp.ones((4, 6, 8)))
        one_token = jax.jit(lambda x: constrain(x, "residual"))(jnp.ones((4, 1, 8)))
    assert x.sharding.spec == jax.P(("data", "fsdp"), "tensor")
    assert one_token.sharding.spec == jax.P(("data", "fsdp"))


def loss_and_logits(model, inputs):
    out = model(**inputs)
    return out.loss, out.logits


@eight
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "spec"),
    [("opt-125m", "data=8"), ("opt-125m", "fsdp=8"), *((name, "data=2,fsdp=2,tensor=2") for name in SMALL)],
)
def test_a_mesh_computes_what_one_device_computes(name, spec):
    shape: dict[str, Any] = dict(num_hidden_layers=1, num_attention_heads=4, hidden_size=32, ffn_dim=64, vocab_size=104)
    inputs = batch(name, "left", rows=8)
    model = our_model(name, **shape)
    (loss, logits), gradients = jax.value_and_grad(loss_and_logits, has_aux=True)(model, inputs)
    expected = {path: np.asarray(p.get_value()) for path, p in named_parameters(gradients).items()}
    mesh = make_mesh(spec, jax.devices()[:8])
    for path, param in named_parameters(model).items():
        value = param.get_value()
        param.set_value(jax.device_put(value, param_sharding(path, value.shape, mesh)))
    placed = jax.device_put(inputs, batch_sharding(mesh))
    with use_mesh(mesh):
        (got_loss, got), gradients = jax.value_and_grad(loss_and_logits, has_aux=True)(model, placed)
    np.testing.assert_allclose(got_loss, loss, rtol=1e-5)
    mask = inputs["attention_mask"] == 1
    np.testing.assert_allclose(np.asarray(got)[mask], np.asarray(logits)[mask], atol=1e-5 * np.abs(logits).max())
    total = np.sqrt(sum(np.square(g).sum() for g in expected.values()))
    for path, param in named_parameters(gradients).items():
        error = np.linalg.norm(np.asarray(param.get_value()) - expected[path])
        assert error <= 1e-5 * max(np.linalg.norm(expected[path]), 1e-2 * total), path


SLICES = """
from jax.experimental import topologies
from opt_jax.parallel.mesh import make_mesh
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4", num_slices=2).devices
def slices(spec, dcn=None):
    mesh = make_mesh(spec, devices, dcn)
    return [list(mesh.shape.values()), [{d.slice_index for d in part.flat} for part in mesh.devices]]
assert slices(None) == slices("data=2,fsdp=-1") == [[2, 8, 1], [{0}, {1}]]  # by default slices are on `data`
assert slices("data=4,tensor=4") == [[4, 1, 4], [{0}, {0}, {1}, {1}]]
assert slices("fsdp=16", "fsdp=2") == [[1, 16, 1], [{0, 1}]]
for spec, dcn in (("fsdp=16", None), ("data=2,fsdp=8", "data=3")):
    try:
        make_mesh(spec, devices, dcn)
    except ValueError as error:
        print(error)
"""


def tpus(*coords):
    return [SimpleNamespace(platform="tpu", coords=place) for place in coords]


@eight
@pytest.mark.parametrize("sides", [(8,), (2, 4), (4, 2), (2, 2, 2)])
def test_parameters_and_gradients_are_sent_along_one_side_of_the_torus_after_the_other(monkeypatch, sides):
    stages = fsdp_stages(tpus(*np.ndindex(sides)))
    assert tuple(len(groups[0]) for groups in stages) == sides
    monkeypatch.setattr("opt_jax.parallel.mesh.fsdp_stages", lambda devices: stages)

    def gradient(part, weights):  # of the kernel's first axis each device has a part, and its weights [1, 16, 3]
        def weighted(part):
            kernel = gather_parameters({"lm_head": {"kernel": part}}, jnp.float32, jnp.float32)["lm_head"]["kernel"]
            return (kernel * weights[0]).sum(), kernel[None]

        return jax.grad(weighted, has_aux=True)(part)

    mapped = per_device(gradient, make_mesh("fsdp=8", jax.devices()[:8]), (P("fsdp"), P("fsdp")), P("fsdp"))
    kernel = np.arange(48, dtype=np.float32).reshape(16, 3)
    weights = np.random.default_rng(0).integers(-99, 99, (8, 16, 3)).astype(np.float32)
    gradient_of_all, gathered = jax.jit(mapped)(kernel, weights)
    np.testing.assert_array_equal(gradient_of_all, weights.sum(0))
    np.testing.assert_array_equal(gathered, np.broadcast_to(kernel, (8, 16, 3)))  # on each device


def test_devices_without_a_torus_scatter_in_one_stage():
    everyone = ((0, 1, 2, 3),)
    assert fsdp_stages(jax.devices()[:1] * 4) == (everyone,)
    square = tpus((0, 0), (0, 1), (1, 0), (1, 1))
    assert [len(groups[0]) for groups in fsdp_stages(square)] == [2, 2]
    for i, device in enumerate(square):
        device.slice_index = i // 2
    assert fsdp_stages(square) == (everyone,)
    snake = tpus((0, 0), (0, 1), (0, 2), (1, 2), (1, 1), (1, 0))
    assert [len(groups[0]) for groups in fsdp_stages(snake)] == [2, 3]
    assert fsdp_stages(tpus((0, 0, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1))) == (everyone,)  # distances 3, 2 and 1


@pytest.mark.slow
@pytest.mark.skipif(not (Path(sys.prefix) / "libtpu" / "libtpu").is_dir(), reason="no libtpu: `make test` installs it")
def test_slices_lie_along_the_axes_that_are_asked_for():
    tpu = dict(TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-8", TPU_WORKER_HOSTNAMES="localhost")
    root = Path(opt_jax.__file__).parents[1]
    path = os.pathsep.join([str(Path(sys.prefix) / "libtpu"), str(root)])
    done = subprocess.run(
        [sys.executable, "-c", SLICES],
        env=os.environ | tpu | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("mesh data=1 does not divide over data=2 of the 2 slices: ")
    assert second == "dcn-mesh data=3, fsdp=1, tensor=1: sizes multiply to 3, but there are 2 slices"
