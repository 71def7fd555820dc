"""Hook points and interventions against PyTorch's forward hooks on `transformers`' OPT, with the same random weights.

Ours compute in float32, PyTorch's in float64. At real tokens, activations agree within 1e-5 of their norm, gradients
with respect to the values of interventions within 1e-4.
"""

from contextlib import ExitStack, contextmanager
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from limits import within
from oracle import make_exact_pair, to_numpy, torch
from reference import CONFIGS, PADDINGS, SMALL, batch

from opt_jax import Add, Project, Replace, Scale, Zero, point_names
from opt_jax.model.hook_points import POINTS

DEPTH = 2


@cache
def pair(name: str, **config):
    return make_exact_pair(name, num_hidden_layers=DEPTH, **config)


class Softmax(torch.overrides.TorchFunctionMode):
    """Reads and changes the input (scores) and the output (pattern) of the softmax in attention."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.softmax:
            return func(*args, **(kwargs or {}))
        scores = self.at("attn.hook_attn_scores", args[0])
        return self.at("attn.hook_pattern", func(scores, *args[1:], **(kwargs or {})))


@contextmanager
def torch_hooks(hf, edits=None):
    """Yields {point: value}, which a call fills by PyTorch's hooks. `edits`: {point: function of a tensor}."""
    edits, seen, config = edits or {}, {}, hf.config
    decoder, heads = hf.get_decoder(), config.num_attention_heads
    layer, shape = [0], [(0, 0)]  # the layer at hand; [B, T] of the call

    def at(name, value):
        name = name if name.startswith(("hook_embed", "hook_p", "ln_final")) else f"blocks.{layer[0]}.{name}"
        if name in edits:
            value = edits[name](value)
        seen[name] = value
        return value

    def flat(name):  # the feed-forward block has [B * T, D]
        return lambda x: at(name, x.reshape(*shape[0], -1)).reshape(x.shape)

    def in_heads(name):
        return lambda x: at(name, x.reshape(*x.shape[:2], heads, -1)).reshape(x.shape)

    def after(module, change):
        return module.register_forward_hook(lambda module, inputs, output: change(output))

    def before(module, change):
        return module.register_forward_pre_hook(lambda module, inputs: (change(inputs[0]), *inputs[1:]))

    def norm(module, name, reshaped=False):
        def normalized(module, inputs, output):
            x = inputs[0].reshape(*shape[0], -1)
            scale = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            y = at(
                f"{name}.hook_normalized",
                _affine(module, (x - x.mean(-1, keepdim=True)) / at(f"{name}.hook_scale", scale)),
            )
            return y.reshape(output.shape)

        return module.register_forward_hook(normalized)

    def result(module, inputs, output):
        z = inputs[0].reshape(*inputs[0].shape[:2], heads, -1)
        weight = module.weight.reshape(module.out_features, heads, -1)
        each = at("attn.hook_result", torch.einsum("bthk,dhk->bthd", z, weight)).sum(2)
        return each if module.bias is None else each + module.bias

    def entered(i):
        def enter(module, args, kwargs):
            layer[0] = i
            x = args[0] if args else kwargs["hidden_states"]
            shape[0] = tuple(x.shape[:2])
            x = at("hook_resid_pre", x)
            module.stream = x
            return ((x, *args[1:]), kwargs) if args else (args, kwargs | dict(hidden_states=x))

        return enter

    def attended(block):
        def add(module, inputs, output):  # the sum is no module's output; with pre-norm it has two readers
            out = at("hook_attn_out", output[0])
            return (at("hook_resid_mid", block.stream + out) - block.stream, *output[1:])

        return add

    with ExitStack() as stack:
        stack.enter_context(Softmax(at))
        hooks = [after(decoder.embed_tokens, lambda x: at("hook_embed", x))]
        hooks.append(after(decoder.embed_positions, lambda x: at("hook_pos_embed", x)))
        for name in ("project_in", "project_out"):
            if getattr(decoder, name) is not None:
                hooks.append(after(getattr(decoder, name), lambda x, name=name: at(f"hook_{name}", x)))
        for i, block in enumerate(decoder.layers):
            attention = block.self_attn
            hooks += [
                block.register_forward_pre_hook(entered(i), with_kwargs=True),
                norm(block.self_attn_layer_norm, "ln1"),
                *(after(getattr(attention, f"{x}_proj"), in_heads(f"attn.hook_{x}")) for x in "qkv"),
                before(attention.out_proj, in_heads("attn.hook_z")),
                attention.out_proj.register_forward_hook(result),
                attention.register_forward_hook(attended(block)),
                after(block.fc1, flat("mlp.hook_pre")),
                before(block.fc2, flat("mlp.hook_post")),
                after(block.fc2, flat("hook_mlp_out")),
            ]
            if config.do_layer_norm_before:
                hooks.append(norm(block.final_layer_norm, "ln2"))
                hooks.append(after(block, lambda x: at("hook_resid_post", x)))
            else:
                hooks.append(before(block.final_layer_norm, lambda x: at("hook_resid_post", x)))
                hooks.append(norm(block.final_layer_norm, "ln2"))
        if decoder.final_layer_norm is not None:
            hooks.append(norm(decoder.final_layer_norm, "ln_final"))
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()


def _affine(norm, x):
    return x if norm.weight is None else x * norm.weight + norm.bias


def inputs_of(name, padding):
    inputs = batch(name, padding, length=7)
    return inputs["input_ids"], inputs["attention_mask"]


def visible(mask, columns=None):
    """Where a query at a real token of the last `columns` may attend to a key: [B, 1, T, S]."""
    length = mask.shape[1]
    queries = np.arange(length)[length - (columns or length) :]
    seen = (np.arange(length)[None] <= queries[:, None]) & (mask[:, None] == 1) & (mask[:, queries, None] == 1)
    return seen[:, None]


def assert_equal(got, expected, tokens, seen, tolerance=1e-5):
    """Assert that activations agree at real tokens (`tokens` [B, T]) and at keys that are seen."""
    for name, value in got.items():
        theirs = to_numpy(expected[name])
        ours = np.asarray(value)[..., : theirs.shape[-1]]  # a cache has columns that are still empty
        assert ours.shape[1:] == theirs.shape[1:], name
        by_keys = name.endswith(("attn_scores", "pattern"))
        where = np.broadcast_to(seen, theirs.shape) if by_keys else np.broadcast_to(tokens == 1, theirs.shape[:2])
        ours, theirs = (np.broadcast_to(x, theirs.shape)[where] for x in (ours, theirs))
        within(np.linalg.norm(ours - theirs), tolerance * np.linalg.norm(theirs), name)


@pytest.mark.combinations
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", SMALL)
def test_every_point(name, padding):
    hf, model = pair(name)
    ids, mask = inputs_of(name, padding)
    with torch_hooks(hf) as expected:
        logits = oracle.run(hf, dict(input_ids=ids, attention_mask=mask)).logits
    out, got = model.run_with_cache(ids, mask, names=point_names(model.config))
    assert [*got] == point_names(model.config) and got.keys() == expected.keys()
    assert_equal(got, expected, mask, visible(mask))
    assert_equal({"logits": out.logits}, {"logits": logits}, mask, None)
    assert out.activations is None


@pytest.mark.parametrize(("name", "padding"), [("opt-125m", "left"), ("opt-350m", "none"), ("galactica", "right")])
def test_every_point_with_a_cache(name, padding):
    """The prefill, and then a step of two tokens and a step of one."""
    hf, model = pair(name)
    ids, mask = inputs_of(name, padding)
    names, cache, theirs = point_names(model.config), model.init_cache(3, 9), None
    for begin, end in ((0, 4), (4, 6), (6, 7)):
        with torch_hooks(hf) as expected:
            inputs = dict(input_ids=ids[:, begin:end], attention_mask=mask[:, :end])
            theirs = oracle.run(hf, inputs, cache=theirs, use_cache=True).cache
        out, got = model.run_with_cache(ids[:, begin:end], mask[:, begin:end], cache=cache, names=names)
        cache = out.cache
        assert_equal(got, expected, mask[:, begin:end], visible(mask[:, :end], end - begin))


def compare_edits(name, padding, ours, theirs, values):
    """Assert that logits, and gradients with respect to the values, are the same with our edits and PyTorch's.

    Args:
      name, padding: of the model and its inputs.
      ours: values -> hooks.
      theirs: (tensors of the values, mask) -> {point: function of a tensor}.
      values: {name: array}.
    """
    hf, model = pair(name)
    ids, mask = inputs_of(name, padding)
    weights = np.random.RandomState(5).standard_normal((*mask.shape, 99)) * mask[..., None]

    def loss(values):
        logits = model(ids, mask, hooks=ours(values)).logits
        return (logits * weights.astype(np.float32)).sum(), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(jax.tree.map(jnp.asarray, values))
    tensors = {key: torch.from_numpy(value).double().requires_grad_() for key, value in values.items()}
    with torch_hooks(hf, theirs(tensors, mask)):
        expected = oracle.run(hf, dict(input_ids=ids, attention_mask=mask)).logits
    (expected * torch.from_numpy(weights)).sum().backward()
    assert_equal({"logits": logits}, {"logits": expected}, mask, None)
    for key, gradient in gradients.items():
        theirs_of_key = to_numpy(tensors[key].grad)
        assert np.linalg.norm(theirs_of_key) > 0, f"{key} has no effect"
        within(np.linalg.norm(gradient - theirs_of_key), 1e-4 * np.linalg.norm(theirs_of_key), key)


def drawn(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", SMALL)
def test_a_change_at_every_point(name):
    """One call adds something at each point; the gradient says whether each arrives where PyTorch's does."""
    sizes = dict(B=3, T=7, S=7, D=24, P=CONFIGS[name].embed_dim, H=3, K=8, F=40) | {"1": 1}
    points = point_names(pair(name)[1].config)
    values = {}
    for i, point in enumerate(points):
        axes = POINTS[point.split(".", 2)[2] if point.startswith("blocks") else point][0]
        values[point] = np.float32(0.1) * drawn(*(sizes[axis] for axis in axes), seed=i)
        if axes == "BT1":
            values[point] = np.abs(values[point])  # a scale stays away from zero

    def theirs(tensors, mask):
        return {point: lambda x, v=v: x + v for point, v in tensors.items()}

    compare_edits(name, "none", lambda v: {point: Add(x) for point, x in v.items()}, theirs, values)


def chosen(mask, positions, rows=None):
    """Where a token is at one of the positions, which count the real tokens of its row: bool [B, T, 1]."""
    where = np.zeros(mask.shape, bool)
    for row in range(len(mask)) if rows is None else rows:
        real = np.flatnonzero(mask[row])
        for position in positions:
            if -len(real) <= position < len(real):
                where[row, real[position]] = True
    return torch.from_numpy(where)[..., None]


def spread(where, size, indices):
    """Which of `size` entries the indices name, as a bool tensor of shape `where`, -1 being their axis."""
    entries = torch.zeros(size, dtype=torch.bool)
    entries[[*indices]] = True
    return entries.reshape(where)


@pytest.mark.parametrize(("name", "padding"), [("opt-125m", "left"), ("opt-350m", "right"), ("galactica", "none")])
def test_interventions(name, padding):
    """Each kind of intervention with rows, positions, heads and neurons, in one call."""
    values = {
        "add": drawn(24),
        "scale": drawn(),
        "replace": drawn(3, 8),
        "mean": drawn(24, seed=1),
        "factor": drawn(40),
        "directions": drawn(2, 24),
        "last": drawn(16 if name == "opt-350m" else 24, seed=2),
    }

    def ours(v):
        return {
            "blocks.0.hook_resid_post": Add(v["add"], scale=v["scale"], rows=[0, -1], positions=[-1, 1]),
            "blocks.0.attn.hook_z": Replace(v["replace"], heads=[2, -3], positions=[0, -2]),
            "blocks.0.hook_mlp_out": (lambda x, hook: jnp.tanh(x) * (hook.layer + 2), Replace(v["mean"], rows=1)),
            "blocks.1.mlp.hook_post": Scale(v["factor"], neurons=[5, -1, 7]),
            "blocks.1.attn.hook_k": Zero(heads=1),
            "blocks.1.attn.hook_pattern": Scale(0.5, heads=[0], positions=[2, -1], rows=0),
            "blocks.1.hook_resid_mid": Project(v["directions"], positions=jnp.arange(2, 5)),
            "blocks.1.hook_resid_pre": (Scale(2.0), Add(v["add"])),
            "hook_embed": Add(v["last"]),
        }

    def theirs(v, mask):
        heads = lambda *indices: spread((1, 1, 3, 1), 3, indices)  # noqa: E731
        neurons = spread((1, 1, 40), 40, [5, 39, 7])
        row = lambda *indices: spread((3, 1, 1), 3, indices)  # noqa: E731
        query = (chosen(mask, [2, -1], [0])[:, None]) & spread((1, 3, 1, 1), 3, [0])

        def project(x):
            d = v["directions"]
            return x - x @ d.T @ torch.linalg.inv(d @ d.T) @ d

        where = torch.where
        return {
            "blocks.0.hook_resid_post": lambda x: where(chosen(mask, [-1, 1], [0, 2]), x + v["scale"] * v["add"], x),
            "blocks.0.attn.hook_z": lambda x: where(chosen(mask, [0, -2])[..., None] & heads(2, 0), v["replace"], x),
            "blocks.0.hook_mlp_out": lambda x: where(row(1), v["mean"], torch.tanh(x) * 2),
            "blocks.1.mlp.hook_post": lambda x: where(neurons, x * v["factor"], x),
            "blocks.1.attn.hook_k": lambda x: where(heads(1), torch.zeros_like(x), x),
            "blocks.1.attn.hook_pattern": lambda x: where(query, x / 2, x),
            "blocks.1.hook_resid_mid": lambda x: where(chosen(mask, range(2, 5)), project(x), x),
            "blocks.1.hook_resid_pre": lambda x: x * 2 + v["add"],
            "hook_embed": lambda x: x + v["last"],
        }

    compare_edits(name, padding, ours, theirs, values)


@pytest.mark.filterwarnings("ignore")  # those of another library
def test_transformer_lens(tmp_path):
    """Its own cache has the same values under the same names.

    TransformerLens 4 differs in two: its `hook_normalized` is before scale and bias, and its scores are the pattern.
    """
    lens = pytest.importorskip("transformer_lens.model_bridge", reason="TransformerLens 4 is not installed")
    hf, model = oracle.make_pair("opt-125m", num_hidden_layers=DEPTH)
    hf.save_pretrained(tmp_path)
    ids, mask = inputs_of("opt-125m", "none")
    bridge = lens.TransformerBridge.boot_transformers(str(tmp_path), hf_model=hf)
    with torch.no_grad():
        _, expected = bridge.run_with_cache(torch.from_numpy(ids).long())
    _, got = model.run_with_cache(ids)
    got = {name: value for name, value in got.items() if not name.endswith("attn_scores")}
    theirs = {name: expected[name.replace("hook_normalized", "hook_out")] for name in got}
    theirs = {name: value.reshape(got[name].shape) for name, value in theirs.items()}
    assert_equal(got, theirs, mask, visible(mask))
