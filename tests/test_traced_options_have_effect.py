"""Arguments of models, a training step, the optimizer and LoRA change the traced program, or are refused.

Nothing is compiled. The fields of OPTConfig are in test_model.py, which looks at the numbers that each of them changes.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import our_model
from test_options_have_effect import CONFIG, Because, Refused, check_all, names

import opt_jax
from opt_jax.model.decoder import DecoderInputs
from opt_jax.model.heads import OPTPreTrainedModel
from opt_jax.model.lora import LoRA
from opt_jax.parallel.mesh import make_mesh, use_mesh
from opt_jax.training.optimizer import make_optimizer, make_schedule
from opt_jax.training.step import make_gradients, new_model, state_shardings

IDS = jax.ShapeDtypeStruct((2, 8), jnp.int32)


def equations(jaxpr: Any) -> Iterator[tuple]:
    """The operations of a traced program, with shapes and literals, without the names of variables."""
    for eqn in jaxpr.eqns:
        literals = tuple(str(v) for v in eqn.invars if hasattr(v, "val"))
        yield eqn.primitive.name, tuple(str(v.aval) for v in eqn.outvars), literals
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def program(function: Callable, *arguments: Any) -> list[tuple]:
    return list(equations(jax.make_jaxpr(function)(*arguments).jaxpr))


def test_arguments_of_models():
    def gradients(config=CONFIG, **options):
        build = lambda: opt_jax.OPTForCausalLM(config, rngs=nnx.Rngs(0), **options)  # noqa: E731
        loss = lambda model, ids: model.forward(ids, labels=ids).loss  # noqa: E731
        return program(jax.grad(loss), nnx.eval_shape(build), IDS)

    entries = {
        "config": dataclasses.replace(CONFIG, ffn_dim=48),
        "rngs": Because("other values, not another program: test_model.test_initial_values_are_hf_s"),
        "dtype": "bfloat16",
        "param_dtype": "bfloat16",
        "scan_layers": True,
        "attn_implementation": Because("below"),
        "remat": "full",
        "grad_dtype": Refused("grad_dtype=bfloat16 without effect: pass scan_layers=True", grad_dtype="bfloat16"),
    }
    check_all(names(OPTPreTrainedModel.__init__), entries, gradients)
    for name in ("OPTModel", "OPTForCausalLM", "OPTForSequenceClassification", "OPTForQuestionAnswering"):
        assert "__init__" not in vars(getattr(opt_jax, name))  # all classes have the same arguments

    def forward(**options):
        model = nnx.eval_shape(lambda: opt_jax.OPTForCausalLM(CONFIG, rngs=nnx.Rngs(0), **options))
        return program(lambda model, ids: model.forward(ids).logits, model, IDS)

    assert forward(attn_implementation="splash") != forward()


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_options_of_a_training_step():
    mesh = make_mesh("fsdp=2", jax.devices()[:2])

    def step(**options):
        model = jax.eval_shape(lambda: new_model(CONFIG, 0, "float32", **options))
        batch = {"input_ids": (ids := jax.ShapeDtypeStruct((1, 2, 8), jnp.int32)), "labels": ids}
        with use_mesh(mesh):
            return program(make_gradients(CONFIG, state_shardings(model, mesh), mesh), model, batch)

    for changed in (dict(grad_dtype="bfloat16"), dict(remat="full")):
        assert step(**changed) != step(), changed


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("OPTModel", ()),
        ("OPTForCausalLM", ("labels", "logits_to_keep")),
        ("OPTForSequenceClassification", ("labels",)),
        ("OPTForQuestionAnswering", ("start_positions", "end_positions")),
    ],
)
def test_inputs_of_models(name, labels):
    cls = getattr(opt_jax, name)
    model = nnx.eval_shape(lambda: cls(CONFIG, rngs=nnx.Rngs(0)))
    row, static = jax.ShapeDtypeStruct((2,), jnp.int32), {"output_hidden_states", "output_attentions", "logits_to_keep"}

    def call(**inputs):
        fixed = {name: inputs.pop(name) for name in static & set(inputs)}
        forward = lambda model, inputs: jax.tree.leaves(model.forward(**inputs, **fixed))  # noqa: E731
        closed = jax.make_jaxpr(forward)(model, inputs)
        return len(closed.jaxpr.outvars), list(equations(closed.jaxpr))

    key = jax.eval_shape(lambda: jax.random.key(0))
    embeds = jax.ShapeDtypeStruct((2, 8, CONFIG.embed_dim), jnp.float32)
    answers = dict(start_positions=row, end_positions=row)
    entries = {
        "input_ids": dict(input_ids=None, inputs_embeds=embeds),
        "inputs_embeds": dict(input_ids=None, inputs_embeds=embeds),
        "attention_mask": IDS,
        "position_ids": IDS,
        "segment_ids": IDS,
        "labels": IDS if name == "OPTForCausalLM" else row,
        "logits_to_keep": 1,
        "start_positions": answers,
        "end_positions": answers,
        "cache": nnx.eval_shape(lambda: our_model("opt-125m", num_hidden_layers=1).init_cache(2, 16)),
        "output_hidden_states": True,
        "output_attentions": True,
        "dropout_key": key,
        "hooks": dict(hooks={"hook_embed": opt_jax.Zero()}),
    }
    others = {"labels", "logits_to_keep", "start_positions", "end_positions"} - {*labels}
    entries = {name: entry for name, entry in entries.items() if name not in others}
    inputs = dict.fromkeys([*names(cls.forward), *(field.name for field in dataclasses.fields(DecoderInputs))])
    check_all(inputs, entries, call, dict(input_ids=IDS))
    if len(labels) == 2 and name == "OPTForQuestionAnswering":
        with pytest.raises(ValueError, match="start_positions alone gives no loss"):
            our_model("opt-125m", name, num_hidden_layers=1)(np.ones((2, 8), np.int32), start_positions=[1, 2])


def test_options_of_the_optimizer():
    tree = {"x": jnp.ones(4)}

    def update(**options):
        optimizer = make_optimizer(lambda step: 1e-3 * (step + 1), **options)
        return program(optimizer.update, tree, optimizer.init(tree), tree)

    entries = {"schedule": Because("the next check"), "weight_decay": 0.3, "clip_norm": 0.5, "betas": (0.8, 0.9)}
    check_all(names(make_optimizer), entries, update)

    def rates(**options):
        schedule = make_schedule(**options)
        return [float(schedule(step)) for step in (0, 3, 9)]

    changed = dict(peak=2.0, warmup_steps=4, steps=20, final=0.5)
    check_all(names(make_schedule), changed, rates, dict(peak=1.0, warmup_steps=2, steps=10))


def test_options_of_lora():
    pytest.importorskip("qwix")
    plain = nnx.eval_shape(lambda: opt_jax.OPTForCausalLM(CONFIG, rngs=nnx.Rngs(0), scan_layers=True, remat="full"))

    def adapted(rank=2, alpha=4.0, targets=("q_proj",)):
        model = LoRA(rank, alpha, targets).adapt(plain)
        assert model.model.decoder.remat == "full"
        return program(lambda model, ids: model.forward(ids).logits, model, IDS)

    check_all([f.name for f in dataclasses.fields(LoRA)], dict(rank=4, alpha=2.0, targets=("fc1",)), adapted)
