"""Hook points and interventions. PyTorch's: parity/test_hooks_parity.py."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import exhaustive
from jax import lax
from reference import draw, our_model, values
from support.hooked_models import DEPTH, IDS, INPUTS, MASK, OTHER, RESID, VECTOR, assert_near, edited, separate, stacked
from support.small_models import on_mesh

import opt_jax
from opt_jax import Add, Project, Replace, Scale, Zero, point_names, stack_layers
from opt_jax.generation import loop
from opt_jax.model import hook_points, hooks, interventions
from opt_jax.parallel.mesh import make_mesh, use_mesh


@pytest.fixture
def model():
    return separate()


def edited_in_jit(model, hooks):
    return model.forward(IDS, MASK, hooks=hooks).logits


# Without hooks --------------------------------------------------------------------------------------------------------


def programs():
    """The lowered programs of calls without hooks."""
    text = lambda f, *args: jax.jit(f).lower(*args).as_text()  # noqa: E731
    for model in (separate(2), stacked(2)):
        yield text(lambda model: model.forward(IDS, MASK).logits, model)
        yield text(lambda model: jax.grad(lambda m: m.forward(IDS, MASK, labels=IDS).loss)(model), model)
    model = separate(1)
    cached = model.init_cache(3, 9)
    yield text(lambda model, cache: model.forward(IDS, MASK, cache=cache), model, cached)
    yield text(
        lambda model, cache: model.forward(IDS, MASK, cache=dataclasses.replace(cache, fresh=False)), model, cached
    )
    for name in ("begin", "advance"):
        given = []
        original = getattr(loop, name)

        def record(*args, given=given, original=original, **kwargs):
            given.append((args, kwargs))
            return original(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, name, record)
            model.generate(IDS, MASK, max_new_tokens=2)
        args, kwargs = given[0]
        statics = {key: value for key, value in kwargs.items() if isinstance(value, (bool, int, str)) or value is None}
        traced = {key: value for key, value in kwargs.items() if key not in statics}
        args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x, args)
        yield text(partial(original.__wrapped__, **statics), *args, **traced)


def test_off_costs_nothing(monkeypatch):
    """The lowered programs are those without hook points."""
    before = list(programs())
    assert len(before) == 8
    monkeypatch.setattr(hooks, "point", lambda name, value, *_: value)
    monkeypatch.setattr(hooks, "wanted", lambda name: False)
    monkeypatch.setattr(hooks, "in_layer", lambda layer, number, wrap: wrap(layer))
    monkeypatch.setattr(hooks, "scan", lambda body, wrap, carry, layers: lax.scan(wrap(body), carry, layers))
    assert before == list(programs())
    monkeypatch.setattr(hooks, "point", lambda name, value, *_: value + 1)
    assert all(a != b for a, b in zip(before, programs(), strict=True))  # the comparison sees a point


# Names and mistakes ---------------------------------------------------------------------------------------------------


def test_names(model):
    every = point_names(model.config)
    assert len(every) == len(set(every)) == 2 + DEPTH * 19 - DEPTH + 2
    find = partial(hook_points.find_points, model.config)
    assert find("blocks.*.hook_resid_post") == [f"blocks.{i}.hook_resid_post" for i in range(DEPTH)]
    assert find("blocks.[12].mlp.*") == [f"blocks.{i}.mlp.hook_{x}" for i in (1, 2) for x in ("pre", "post")]
    assert find(["ln_final.*", "hook_embed", "hook_embed"]) == ["hook_embed", *every[-2:]]
    assert find(lambda name: name.endswith("hook_z")) == [f"blocks.{i}.attn.hook_z" for i in range(DEPTH)]
    assert find("*") == every
    _, acts = model.run_with_cache(IDS, MASK)
    assert [*acts] == [name for name in every if not name.endswith("hook_result")]
    bad = {
        "blocks.1.hook_resid_pots": "no hook point is named 'blocks.1.hook_resid_pots'; did you mean blocks.1.hook_",
        "blocks.3.hook_resid_post": "did you mean blocks.",
        "hook_project_in": "no hook point is named",  # of the 350M
        "xyz": "point_names.* lists all",
    }
    for name, words in bad.items():
        for call in (lambda name: model.run_with_cache(IDS, names=name), lambda name: edited(model, {name: Zero()})):
            with pytest.raises(ValueError, match=words):
                call(name)
    with pytest.raises(ValueError, match="no hook point"):
        model.run_with_cache(IDS, names=["hook_embed", 3])
    with pytest.raises(ValueError, match="true for no point"):
        model.run_with_cache(IDS, names=lambda name: False)
    with pytest.raises(ValueError, match="names is empty"):
        model.run_with_cache(IDS, names=[])


@pytest.mark.parametrize(
    ("hooks", "words"),
    [
        ({RESID: Zero(heads=[1])}, r"hook_resid_post has no heads; its axes are \[B, T, D\]"),
        ({"blocks.*.attn.*": Zero(heads=[1], neurons=3)}, "has no neurons"),
        ({"hook_embed": Zero(layers=[1])}, "layers= without effect, hook_embed is in no layer"),
        ({"blocks.0.attn.hook_z": Zero(heads=3)}, "heads=3: there are 3"),
        ({"blocks.0.mlp.hook_pre": Zero(neurons=[2, -41])}, "neurons=.* there are 40"),
        ({RESID: Zero(layers=range(4))}, "layers=.* there are 3"),
        ({RESID: Zero(layers=[1, -1])}, r"layers=\[2\] without effect"),
        ({RESID: Zero}, "<class .*Zero'> is no intervention"),
        ({RESID: Zero(rows=np.array([True, False, True]))}, "rows must be integers, not bool"),
        ({RESID: Zero(positions=np.array(1.0))}, "positions must be integers, not float64"),
        ({RESID: Zero(positions=slice(0, 2))}, "positions must be a number, .* integers, not a slice"),  # type: ignore[reportArgumentType]
        ({RESID: Zero(heads=0)}, "^blocks.1.hook_resid_post has no heads"),
        ({"blocks.*.hook_resid_post": Zero(heads=0)}, r"^blocks.\*.hook_resid_post: blocks.0.hook_resid_post has no"),
        ({RESID: Add(np.ones(23))}, r"Add of shape \(23,\) does not broadcast to blocks.1.hook_resid_post, which is"),
        ({RESID: Replace(np.ones((2, 3, 6, 24)))}, r"Replace of shape \(2, 3, 6, 24\) does not broadcast"),
        ({RESID: Project(np.ones((2, 23)))}, r"directions of shape \(2, 23\) must be \[N, 24\] at blocks.1"),
        ({RESID: lambda value, hook: None}, "the function at blocks.1.hook_resid_post returned None"),
        ({RESID: lambda value, hook: value[:, :2]}, "the result of the function of shape"),
        ({RESID: 3}, "3 is no intervention"),
        ({3: Zero()}, "no hook point is named 3"),
        ({RESID: Add(1j * np.ones(24))}, "Add at blocks.1.hook_resid_post is complex"),
        ({RESID: (Zero(), "x")}, "'x' is no intervention"),
        ([RESID], "hooks must be a dict"),
    ],
)
def test_mistakes(model, hooks, words):
    with pytest.raises(ValueError, match=words):
        model.run_with_hooks(IDS, MASK, hooks=hooks)
    with pytest.raises(ValueError, match=words):
        model.forward(IDS, MASK, hooks=hooks)


def test_an_argument_of_transformer_lens_has_another_name(model):
    with pytest.raises(ValueError, match="names_filter .* is names= here"):
        model.run_with_cache(IDS, names_filter=lambda name: name == RESID)
    for name, words in {"fwd_hooks": "is hooks={name: function} here", "bwd_hooks": "is jax.grad of an Add"}.items():
        with pytest.raises(ValueError, match=f"{name} of TransformerLens {words}"):
            model.run_with_hooks(IDS, **{name: [(RESID, lambda value, hook: value)]})


def test_indices_that_are_known_too_late_give_nan(model):
    assert np.isnan(edited(model, {RESID: Add(VECTOR, rows=len(IDS))})).all()
    head = jax.jit(lambda head: edited_in_jit(model, {"blocks.0.attn.hook_z": Zero(heads=head)}))
    assert not np.isnan(head(-1)).any() and np.isnan(head(99)).all() and np.isnan(head(-99)).all()


def test_flash_attention_refuses_what_it_never_holds():
    for name in ("splash", "cudnn"):
        model = our_model("opt-125m", num_hidden_layers=1)
        model.model.decoder.implementation = name
        for point in ("attn_scores", "pattern"):
            with pytest.raises(ValueError, match=f"attn.hook_{point} needs attn_implementation='xla': '{name}' never"):
                model.run_with_cache(IDS, names=f"blocks.0.attn.hook_{point}")
            with pytest.raises(ValueError, match=f"attn.hook_{point} needs"):
                edited(model, {f"blocks.0.attn.hook_{point}": Zero()})


# Compilation and memory -----------------------------------------------------------------------------------------------


def test_new_values_compile_nothing(model, compiled):
    def run(number, function):
        return {
            RESID: Add(np.float32(number) * VECTOR, scale=jnp.float32(number), positions=[number, -number]),
            "blocks.*.attn.hook_z": Replace(np.full(8, number, np.float32), heads=[number], layers=[number, 0]),
            "blocks.0.mlp.hook_post": (Zero(neurons=number, rows=[number]), Scale(jnp.float32(number))),
            "hook_embed": function,
        }

    first = edited(model, run(1, half))
    assert "jit(_call)" in compiled
    compiled.clear()
    second = edited(model, run(2, half))
    edited(model, run(2, half))
    assert "jit(_call)" not in compiled and (first != second).any()
    other = lambda value, hook: value / 3  # noqa: E731
    edited(model, run(2, other))
    edited(model, run(1, other))
    assert compiled.count("jit(_call)") == 1
    del compiled[:]
    score = partial(model.score, IDS, MASK)
    score(hooks=run(1, half))
    scored = len(compiled)
    score(hooks=run(2, half))
    assert scored and len(compiled) == scored


def half(value, hook):
    return value / 2


def loops(jaxpr):
    """The `scan` operations of a jaxpr."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from loops(inner)


@pytest.mark.parametrize("build", [separate, stacked])
def test_other_points_are_not_kept(build):
    """The compiled program returns what was asked for, and a scan carries buffers of these layers only."""

    def kept(names):
        def call(model):
            return interventions.run_with_cache(model, IDS, MASK, names=names)[1]

        memory: Any = jax.jit(call).lower(build()).compile().memory_analysis()
        (scan,) = loops(jax.make_jaxpr(call)(build()).jaxpr) if build is stacked else [None]
        return memory.output_size_in_bytes, 0 if scan is None else sum(v.aval.size for v in scan.outvars)

    stream = 3 * 6 * 24
    one, none = kept(RESID), kept("hook_embed")
    two = kept(["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"])
    assert one[0] - 8 <= 4 * stream <= one[0] and two[0] - 16 <= 8 * stream <= two[0]
    if build is stacked:
        assert one[1] - none[1] == stream and two[1] - none[1] == 2 * stream


# Positions, and generation --------------------------------------------------------------------------------------------


def test_positions_count_real_tokens():
    """With padding on both sides of one row, gaps included; negative ones count from the last real token."""
    mask = np.array([[0, 1, 1, 1, 1, 0], [1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]])
    cases = {
        "hook_embed": (0, [[1], [0], [0]]),
        "blocks.0.attn.hook_q": ([1, 3], [[2, 4], [2, 5], [1, 3]]),
        "blocks.1.attn.hook_pattern": ([-1, 2], [[4, 3], [5, 3], [5, 2]]),
        "blocks.1.hook_mlp_out": (np.int32(-4), [[1], [0], [2]]),
        "blocks.2.hook_resid_post": (jnp.array([-5, 4, 77]), [[], [], [1, 4]]),
    }
    edits = {point: Replace(7.0, positions=positions) for point, (positions, _) in cases.items()}
    for model in (separate(), stacked()):
        _, acts = model.run_with_cache(IDS, mask, names=[*cases], hooks=edits)
        for point, (_, columns) in cases.items():
            where = np.zeros((3, 6), bool)
            for row, each in enumerate(columns):
                where[row, each] = True
            seven = np.asarray(acts[point]) == 7
            axes = tuple(i for i in range(1, seven.ndim) if i != (2 if point.endswith("pattern") else 1))
            assert (seven.all(axes) == where).all() and (seven.any(axes) == where).all(), point


def test_position_embeddings_of_all_rows(model):
    """They are one row in a call without a mask, but not at their hook point."""
    edits = {"hook_pos_embed": Replace(7.0, rows=1)}
    _, acts = model.run_with_cache(IDS, names="hook_pos_embed", hooks=edits)
    assert ((np.asarray(acts["hook_pos_embed"]) == 7).all((1, 2)) == [False, True, False]).all()


def test_positions_with_a_cache(model):
    """They count over the whole sequence; -1 is the last real token of each call."""
    ids, mask = IDS, INPUTS["left"]["attention_mask"]
    edits = {"blocks.0.hook_resid_mid": Add(VECTOR, positions=[1, 4])}
    expected, cache, got = edited(model, edits), model.init_cache(3, 6), []
    for begin, end in ((0, 4), (4, 6)):
        out = model.run_with_hooks(ids[:, begin:end], mask[:, begin:end], hooks=edits, cache=cache)
        cache = out.cache
        got.append(out.logits)
    assert_near(np.concatenate(got, axis=1)[mask == 1], expected[mask == 1])
    out = model(ids[:, :4], mask[:, :4], cache=model.init_cache(3, 6))
    last = {"blocks.0.hook_resid_mid": Replace(7.0, positions=-1)}
    _, acts = model.run_with_cache(ids[:, 4:], cache=out.cache, hooks=last, names="blocks.0.hook_resid_mid")
    assert ((np.asarray(acts["blocks.0.hook_resid_mid"]) == 7).all(-1) == [False, True]).all()


# JAX's transformations, forms of the model, dtypes --------------------------------------------------------------------

EVERY_KIND = {
    "blocks.*.hook_resid_mid": Add(VECTOR, layers=[0, 2], positions=[1, -1]),
    "blocks.[12].attn.hook_z": (Scale(0.5, heads=[0]), Zero(heads=-1, layers=2)),
    "blocks.*.mlp.hook_post": lambda value, hook: value * (1 + jnp.asarray(hook.layer, jnp.float32)),
    "blocks.*.attn.hook_result": Project(draw("other.kernel", (2, 24)), layers=1),
    "blocks.0.ln2.hook_scale": Scale(2.0),
    "blocks.2.attn.hook_pattern": Replace(0.25, rows=[1]),
    "ln_final.hook_normalized": Add(VECTOR),
}


@pytest.mark.parametrize("remat", ["none", "full", exhaustive("dots"), exhaustive("names")])
def test_stacked_layers_equal_separate_ones(remat):
    """Activations, edits, functions, and gradients with respect to parameters and values."""
    names = ["blocks.*.hook_resid_post", "blocks.1.attn.*", "blocks.[02].ln1.hook_scale", "hook_embed", "ln_final.*"]
    function = EVERY_KIND["blocks.*.mlp.hook_post"]
    edits = {key: edit for key, edit in EVERY_KIND.items() if edit is not function}
    results = []
    for build in (separate, stacked):
        model = jax.tree.map(lambda x: x, build())
        model.model.decoder.remat = remat

        def loss(model, edits):
            hooks = edits | {"blocks.*.mlp.hook_post": function}
            out, acts = interventions.run_with_cache(model, IDS, MASK, labels=IDS, hooks=hooks, names=names)
            return out.loss, (out.logits, acts)

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True, allow_int=True))
        (_, aux), (gradients, of_values) = run(model, edits)
        gradients = opt_jax.unstack_layers(gradients)
        floats = [x for x in jax.tree.leaves(of_values) if jnp.issubdtype(x.dtype, jnp.floating)]
        results.append((aux, values(gradients), floats))
    # The gradient of a bias of the keys is zero in theory.
    jax.tree.map(partial(assert_near, tolerance=2e-6, least=0.05), results[1], results[0])
    assert len(results[0][2]) == 8 and all(np.abs(x).max() > 0 for x in results[0][2])
    assert [*results[0][0][1]] == [*results[1][0][1]]
    with pytest.raises(AssertionError):
        assert_near(results[0][0][0], separate()(IDS, MASK).logits, 0.1)


def test_a_causal_trace_is_one_program(compiled):
    """`vmap` over layers and positions patches every cell; the values are those of a loop."""
    for model in (separate(), stacked()):
        _, clean = model.run_with_cache(IDS[:1], names="blocks.*.hook_resid_post")
        clean = jnp.stack([*clean.values()])
        corrupt = jnp.asarray(IDS[1:2])

        def cell(layer, position, model=model, clean=clean, corrupt=corrupt):
            patch = Replace(clean[layer], layers=layer, positions=position)
            return model.forward(corrupt, hooks={"blocks.*.hook_resid_post": patch}).logits[0, -1]

        layers, positions = jnp.arange(DEPTH), jnp.arange(6)
        trace = jax.jit(jax.vmap(jax.vmap(cell, (None, 0)), (0, None)))
        del compiled[:]
        got = trace(layers, positions)
        assert [name for name in compiled if "cell" in name] == ["jit(cell)"]
        one = jax.jit(cell)
        expected = [[one(layer, position) for position in positions] for layer in layers]
        assert_near(got, np.array(expected))
        assert_near(got[-1, -1], model(IDS[:1]).logits[0, -1])


def test_derivatives(model):
    """jvp and vjp of a value, a scale and a factor agree with each other and with finite differences."""

    def f(value, scale, factor):
        edits = {RESID: Add(value, scale=scale, positions=-1), "blocks.0.attn.hook_z": Scale(factor, heads=1)}
        return (model(IDS, MASK, hooks=edits).logits[:, -1] ** 2).mean()

    at = (jnp.asarray(VECTOR), jnp.float32(2), jnp.float32(0.5))
    direction = (jnp.asarray(VECTOR[::-1]), jnp.float32(0.3), jnp.float32(-0.7))
    _, slope = jax.jvp(f, at, direction)
    _, pull = jax.vjp(f, *at)
    assert_near(sum(jnp.vdot(a, b) for a, b in zip(pull(jnp.float32(1)), direction, strict=True)), slope, 1e-5)
    near = [f(*(a + h * b for a, b in zip(at, direction, strict=True))) for h in (-1e-2, 1e-2)]
    assert_near((near[1] - near[0]) / 2e-2, slope, 1e-2)


def test_own_activations_change_nothing(model):
    """In float32 within 1e-6 of the program without hooks, and bit for bit between two calls."""
    plain = model(IDS, MASK).logits
    _, acts = model.run_with_cache(IDS, MASK, names=point_names(model.config))
    edits = {name: Replace(value) for name, value in acts.items()}
    got = edited(model, edits)
    assert_near(got, plain)
    np.testing.assert_array_equal(got, edited(model, edits))
    by_function = {name: lambda value, hook: value for name in acts}
    assert_near(edited(model, by_function), plain)


def test_bfloat16():
    for model in (our_model("opt-350m", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, num_hidden_layers=2),):
        every = point_names(model.config)
        vector = {
            "blocks.1.hook_resid_mid": Add(VECTOR, scale=np.float64(2)),
            "hook_project_out": Project(np.eye(1, 16)),
        }
        for form in (model, stack_layers(model)):
            _, acts = form.run_with_cache(IDS, MASK, names=every, hooks=vector)
            float32 = {name for name, value in acts.items() if value.dtype == jnp.float32}
            assert float32 == {name for name in every if name.endswith(("hook_scale", "attn_scores"))}
            assert {value.dtype for name, value in acts.items() if name not in float32} == {jnp.bfloat16.dtype}
            assert not np.asarray(acts["hook_project_out"], np.float32)[..., 0].any()


def test_inputs_embeds(model):
    _, acts = model.run_with_cache(IDS, MASK, names="hook_embed")
    edits = {"hook_embed": Add(VECTOR, positions=0), RESID: Zero(positions=[-2], rows=0)}
    got = edited(model, edits, None, inputs_embeds=np.asarray(acts["hook_embed"]))
    np.testing.assert_array_equal(got, edited(model, edits))


def test_int8_cache(model):
    """Hooks see and change keys and values before they are rounded."""
    pytest.importorskip("qwix", reason="the extra int8")
    edits = {"blocks.0.attn.hook_k": Scale(2.0, heads=1), "blocks.1.attn.hook_pattern": Zero(heads=0, positions=-1)}
    exact, int8 = (edited(model, edits, cache=model.init_cache(3, 6, dtype)) for dtype in (None, "int8"))
    assert_near(int8, exact, 0.02)
    with pytest.raises(AssertionError):
        assert_near(model(IDS, MASK, cache=model.init_cache(3, 6, "int8")).logits, exact, 0.05)


def test_heads_of_int8_weights(model):
    pytest.importorskip("qwix", reason="the extra int8")
    name = "blocks.1.attn.hook_result"
    quantized: Any = opt_jax.quantize(model)
    out, acts = quantized.run_with_cache(IDS, MASK, names=[name, "blocks.1.hook_attn_out"])
    assert_near(out.logits, quantized(IDS, MASK).logits, 1e-3)
    layers: Any = quantized.model.decoder.layers
    assert_near(
        acts[name].sum(axis=2) + layers[1].self_attn.out_proj.bias.get_value(), acts["blocks.1.hook_attn_out"], 1e-5
    )


@pytest.mark.parametrize("directions", [0 * VECTOR, [VECTOR, 1e3 * VECTOR], [VECTOR, OTHER, VECTOR + OTHER]])
def test_directions_that_depend_on_each_other_give_nan(model, directions):
    assert np.isnan(edited(model, {RESID: Project(np.asarray(directions))})).all()
    assert np.isfinite(edited(model, {RESID: Project(np.stack([1e-9 * VECTOR, OTHER]))})).all()


@pytest.mark.parametrize("edit", [Scale(2.0), Zero(), Scale(-1.0), Add(-1e38)])
def test_hidden_scores_stay_hidden(model, edit):
    """Else a row with pads would be NaN, or a token would see pads and later tokens."""
    edits = {"blocks.1.attn.hook_attn_scores": edit}
    padded, real = edited(model, edits), np.asarray(MASK, bool)
    for row in range(3):
        ids = IDS[row, real[row]]
        alone = edited(model, edits, ids[None], None)
        assert_near(padded[row, real[row]], alone[0], 1e-5)
        assert_near(edited(model, edits, ids[None, :2], None), alone[:, :2], 1e-5)


def test_calls_within_calls_do_not_mix(model):
    """A function at a point may call a model, with hooks of its own or none."""
    inner = {"blocks.0.hook_resid_pre": Zero()}

    def other(value, hook):
        plain, changed = model.forward(IDS, MASK), model.forward(IDS, MASK, hooks=inner)
        seen.append((hook.name, plain.activations, changed.activations))
        return value + changed.logits[..., :24] + plain.logits[..., :24]

    seen = []
    _, acts = model.run_with_cache(
        IDS, MASK, names=["blocks.*.hook_resid_pre"], hooks={"blocks.1.hook_resid_mid": other}
    )
    assert seen == [("blocks.1.hook_resid_mid", None, None)]
    _, mid = model.run_with_cache(IDS, MASK, names=["blocks.0.hook_resid_pre", "blocks.1.hook_resid_mid"])
    np.testing.assert_array_equal(acts["blocks.0.hook_resid_pre"], mid["blocks.0.hook_resid_pre"])
    added = model(IDS, MASK).logits + edited(model, inner)
    expected = edited(model, {"blocks.1.hook_resid_mid": Add(added[..., :24])})
    assert_near(edited(model, {"blocks.1.hook_resid_mid": other}), expected)
    with pytest.raises(ZeroDivisionError):
        edited(model, {RESID: lambda value, hook: 1 / 0})
    assert hooks.active.get() is None


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("build", [separate, stacked])
def test_mesh(build):
    """Values are those of one device, and the kept activations are spread as the computation spreads them."""
    sizes: Any = dict(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=2, word_embed_proj_dim=32, vocab_size=100
    )
    model = our_model("opt-125m", **sizes)
    model = stack_layers(model) if build is stacked else model
    ids = np.resize(INPUTS["none"]["input_ids"], (4, 6))
    vector = np.resize(VECTOR, 32)
    edits = {
        "blocks.*.hook_resid_post": Add(vector, layers=0, positions=[1, -1], rows=[0, 3]),
        "blocks.1.attn.hook_z": Replace(np.ones((4, 6, 4, 8), np.float32), heads=[1]),
        "blocks.0.mlp.hook_post": Scale(3.0, neurons=[0, 39]),
    }
    names = [f"blocks.*.{name}" for name in ("hook_resid_post", "attn.hook_z", "mlp.hook_post", "attn.hook_pattern")]
    names.append("blocks.*.attn.hook_result")
    expected = model.run_with_cache(ids, names=names, hooks=edits)
    mesh = make_mesh("fsdp=4,tensor=2", jax.devices()[:8])
    meshed = on_mesh(model, mesh)
    with use_mesh(mesh):
        got = meshed.run_with_cache(ids, names=names, hooks=edits)
    jax.tree.map(partial(assert_near, tolerance=2e-6), got, expected)
    for name, value in got[1].items():
        axes = {"hook_z": 2, "hook_result": 2, "hook_post": 2, "hook_pattern": 1, "hook_resid_post": 1}
        tensor = axes[name.rpartition(".")[2]]
        shape = [size // (4 if axis == 0 else 2 if axis == tensor else 1) for axis, size in enumerate(value.shape)]
        assert value.sharding.shard_shape(value.shape) == tuple(shape), name
