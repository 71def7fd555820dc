"""Tools that look at modules see each of them, or there is an error: `nnx.capture`, `nnx.tabulate`, qwix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import our_model
from support.hooked_models import IDS, MASK, assert_near, separate, stacked

import opt_jax
from opt_jax import OPTForCausalLM


@pytest.fixture
def model():
    return separate()


@pytest.fixture
def own_methods(model):
    """Modules without the inherited methods that nnx.tabulate leaves in their classes: nnx.capture would wrap `sow`."""
    for cls in {type(module) for _, module in nnx.iter_modules(model)}:
        for name, value in list(vars(cls).items()):
            if callable(value) and any(vars(base).get(name) is value for base in cls.__mro__[1:]):
                delattr(cls, name)


class Sowing(OPTForCausalLM):
    """A user's subclass."""

    def logits(self, x):
        self.sow(nnx.Intermediate, "stream", x)
        return super().logits(self.perturb("nudge", x))


def sowing(model):
    copy = jax.tree.map(lambda x: x, model)
    copy.__class__ = Sowing
    return copy


@pytest.mark.usefixtures("own_methods")
def test_capture(model):
    """`nnx.capture` sees a call as it sees those of other modules: outputs of methods, `sow`, `perturb`."""
    model = our_model("opt-125m", num_hidden_layers=2)
    out, state = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)(IDS, MASK)
    state = nnx.to_pure_dict(state)
    layer = state["model"]["decoder"]["layers"][1]
    _, acts = model.run_with_cache(IDS, MASK, names=["blocks.1.mlp.*", "blocks.1.ln1.hook_normalized"])
    assert_near(layer["fc1"]["__call__"][0], acts["blocks.1.mlp.hook_pre"])
    assert_near(layer["self_attn_layer_norm"]["__call__"][0], acts["blocks.1.ln1.hook_normalized"])
    assert_near(out.logits, model(IDS, MASK).logits)

    user = sowing(model)
    _, state = nnx.capture(user, nnx.Intermediate)(IDS, MASK)
    assert_near(state["stream"].get_value()[0], user.model(IDS, MASK).last_hidden_state)
    _, nudges = nnx.capture(user, nnx.Perturbation)(IDS, MASK)
    assert nudges["nudge"].get_value().shape == (3, 6, 24)

    def loss(model, nudges):
        out, _ = nnx.capture(model, nnx.Intermediate, init=nudges)(IDS, MASK)
        return out.logits[:, -1, 5].sum()

    slope = nnx.grad(loss, argnums=1)(user, nudges)["nudge"].get_value()
    expected = np.zeros((3, 6, 24))
    expected[:, -1] = model.model.decoder.embed_tokens.embedding.get_value()[5]
    assert_near(slope, expected)


@pytest.mark.usefixtures("own_methods")
def test_no_tool_gives_an_empty_answer_in_silence():
    """A tool that looks at modules sees each of them, or there is an error."""
    for form in (jax.tree.map(lambda x: x, build(2)) for build in (separate, stacked)):
        linear = {path for path, module in nnx.iter_modules(form) if isinstance(module, nnx.Linear)}
        watch = nnx.capture(form, nnx.Intermediate, method_outputs=nnx.Intermediate)
        if isinstance(form.model.decoder.layers, nnx.List):
            state = nnx.to_flat_state(watch(IDS, MASK)[1])
            assert linear <= {path[:-1] for path, _ in state}
        else:
            with pytest.raises(ValueError, match=r"sees nothing of stacked layers: use opt_jax.unstack_layers\(model"):
                watch(IDS, MASK)
            opt_jax.unstack_layers(form)  # what the message says works, and the model is as before
            assert nnx.to_flat_state(watch(IDS, MASK)[1])
            assert_near(form(IDS, MASK).logits, separate(2)(IDS, MASK).logits)
    form = separate(2)
    table = nnx.tabulate(form, jnp.asarray(IDS), console_kwargs=dict(width=250, color_system=None))
    linear = {path for path, module in nnx.iter_modules(form) if isinstance(module, nnx.Linear)}
    assert all("/".join(map(str, path)) in table for path in linear if 1 not in path)  # Flax shows equal layers once


@pytest.mark.filterwarnings("ignore:'.value' setter is now deprecated:DeprecationWarning")  # by qwix 0.1.8
def test_calibration_by_qwix():
    qwix = pytest.importorskip("qwix", reason="the extra int8")
    gptq = pytest.importorskip("qwix.contrib.gptq")
    provider = gptq.GptqCalibrationProvider([gptq.GptqRule(module_path=".*", weight_qtype=jnp.int8)])
    model = qwix.quantize_model(separate(1), provider, jnp.asarray(IDS))
    model(jnp.asarray(IDS))
    statistics = {path[-2] for path, _ in nnx.iter_graph(model) if path and str(path[-1]) == "kernel_gptq"}
    assert statistics == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    only_fc1 = gptq.GptqCalibrationProvider([gptq.GptqRule(module_path=".*fc1", weight_qtype=jnp.int8)])
    with pytest.raises(ValueError, match=r"collects nothing from stacked layers: use opt_jax.unstack_layers\(model"):
        qwix.quantize_model(stacked(1), only_fc1, jnp.asarray(IDS))
    trained = qwix.QtProvider([qwix.QtRule(module_path=".*", weight_qtype=jnp.int4)])  # needs no statistics
    logits = [
        qwix.quantize_model(form(1), trained, jnp.asarray(IDS))(jnp.asarray(IDS)).logits for form in (separate, stacked)
    ]
    assert_near(*logits)
