"""Under JAX's global settings, which notebooks switch on, results are those without them.

`make test-settings` runs the fast part of the suite under each.
"""

import contextlib
import inspect
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import our_model

from opt_jax import OPTConfig, OPTForCausalLM, named_parameters, quantize, stack_layers, use_relu_sparsity
from opt_jax.generation import beams, loop
from opt_jax.generation import generate as generation
from opt_jax.generation.generate import stream
from opt_jax.generation.request import check_request
from opt_jax.generation.scoring import _score
from opt_jax.model import flash
from opt_jax.model.heads import OPTForQuestionAnswering, OPTForSequenceClassification
from opt_jax.model.lora import LoRA, is_trained
from opt_jax.parallel.mesh import make_mesh, use_mesh
from opt_jax.parallel.rules import named_leaves
from opt_jax.training.optimizer import make_optimizer, make_schedule
from opt_jax.training.option_checks import check_options
from opt_jax.training.options import Options
from opt_jax.training.step import (
    batch_loss,
    make_eval_step,
    make_train_step,
    new_model,
    new_state,
    place_batch,
    state_shardings,
)
from opt_jax.training.tasks.common import make_predict_step, task_loss

pytestmark = [pytest.mark.slow, pytest.mark.default_settings("switches settings on by itself")]
STRICT = {"jax_enable_x64": True, "jax_numpy_rank_promotion": "raise", "jax_numpy_dtype_promotion": "strict"}
SAME_NUMBERS = STRICT | {"jax_debug_nans": True, "jax_default_matmul_precision": "highest"}
OTHER_DRAWS = {"jax_threefry_partitionable": False}  # True is the default
NO_JIT = {"jax_disable_jit": True}
IDS = np.array([[1, 1, 7, 8, 9, 7, 8], [2, 10, 11, 12, 13, 10, 11]], np.int32)
NEW: dict[str, Any] = dict(max_new_tokens=3, eos_token_id=[], pad_token_id=1)


@contextlib.contextmanager
def settings(values):
    before = {name: getattr(jax.config, name) for name in values}
    try:
        for name, value in values.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


# The sample: arrays and numbers by name ---------------------------------------------------------------------------


@cache
def model(seed=0):
    return our_model("opt-125m", seed=seed, num_hidden_layers=1, dropout=0.1)


def rows(output):
    return {name: value for name, value in vars(output).items() if isinstance(value, np.ndarray)}


def forward(_):
    outputs = model()(IDS, IDS != 1, labels=IDS, output_hidden_states=True)
    return dict(loss=outputs.loss, logits=outputs.logits, states=outputs.hidden_states)


def greedy(_):
    output, streamed = model().generate(IDS, **NEW), stream(model(), IDS, **NEW)
    np.testing.assert_array_equal(output[:, IDS.shape[1] :], np.stack(list(streamed), axis=1))
    return rows(output)


def continuous(_):
    return rows(model().generate(IDS, batch_size=1, do_sample=True, top_p=0.9, logprobs=1, **NEW))


def beam_search(_):
    return rows(model().generate(IDS, num_beams=2, **NEW))


def lookup(_):
    return rows(model().generate(IDS, prompt_lookup_num_tokens=2, do_sample=True, seed=3, **NEW))


def assistant(_):
    return rows(model().generate(IDS, assistant_model=model(seed=1), num_assistant_tokens=2, **NEW))


def score(_):
    return dict(logprobs=model().score(IDS))


def saved(path):
    model().save_pretrained(path)
    loaded = OPTForCausalLM.from_pretrained(path)
    return {name: param.get_value() for name, param in named_parameters(loaded).items()}


SCHEDULE = make_schedule(peak=1e-2, warmup_steps=1, steps=3)


@cache
def beginning():
    """A new training state, on the host."""
    return jax.device_get(new_state(stack_layers(our_model("opt-125m", num_hidden_layers=1)), make_optimizer(SCHEDULE)))


def train(_):
    # Without jit one device, because single operations are slow on two.
    devices = jax.devices()[: 1 if jax.config.jax_disable_jit else 2]  # type: ignore[reportAttributeAccessIssue]
    mesh, state = make_mesh("fsdp=-1", devices=devices), beginning()
    shardings = state_shardings(state, mesh)
    step = make_train_step(make_optimizer(SCHEDULE), SCHEDULE, model().config, 0, shardings, mesh)
    arrays = lambda rows: dict(input_ids=IDS[rows], labels=np.where(IDS == 1, -100, IDS)[rows])  # noqa: E731
    with use_mesh(mesh):
        state, metrics = step(jax.device_put(state, shardings), place_batch(arrays, 2, 1, mesh))
    leaves = named_leaves(state) | metrics
    # The gradient of this bias is rounding noise, which Adam amplifies.
    return {name: leaf for name, leaf in leaves.items() if not name.endswith("k_proj.bias")}


PARTS = (forward, greedy, continuous, beam_search, lookup, assistant, score, saved, train)
DRAWN = (continuous, lookup, train)


def pytest_generate_tests(metafunc):
    """By default, settings that change no number are on together, and slow parts are left out without jit.

    With --exhaustive they are on one by one too, and no part is left out.
    """
    if "part" not in metafunc.fixturenames:
        return
    cases = [(SAME_NUMBERS, part) for part in PARTS]
    if metafunc.config.getoption("--exhaustive"):
        cases += [({name: value}, part) for name, value in SAME_NUMBERS.items() for part in PARTS]
        cases += [(NO_JIT, part) for part in PARTS] + [(OTHER_DRAWS, part) for part in DRAWN]
    else:
        cases += [(NO_JIT, part) for part in (forward, greedy, lookup, saved)] + [(OTHER_DRAWS, continuous)]
    names = [f"{part.__name__}-{'-'.join(name.removeprefix('jax_') for name in values)}" for values, part in cases]
    metafunc.parametrize("values, part", cases, ids=names)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return cache(lambda part: jax.device_get(part(tmp_path_factory.mktemp("plain") / "model")))


def test_results_are_those_without_the_setting(values, part, plain, tmp_path):
    expected = plain(part)
    with settings(values):
        actual = jax.device_get(part(tmp_path / "model"))
        if values is OTHER_DRAWS:  # the draws are the same each time
            expected = jax.device_get(part(tmp_path / "again"))
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


# Programs that are only traced, because x64 and strict promotion act while tracing ----------------------

CONFIG = OPTConfig(
    vocab_size=48,
    hidden_size=16,
    num_hidden_layers=1,
    ffn_dim=32,
    num_attention_heads=2,
    max_position_embeddings=64,
    word_embed_proj_dim=8,
    tie_word_embeddings=False,
    num_labels=3,
    dropout=0.1,
    attention_dropout=0.1,
    layerdrop=0.1,
)
PROCESSORS = dict(
    do_sample=True,
    top_k=5,
    top_p=0.9,
    min_p=0.1,
    typical_p=0.9,
    repetition_penalty=1.2,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    no_repeat_ngram_size=2,
    bad_words_ids=[[3, 4], [5]],
    suppress_tokens=[7],
    begin_suppress_tokens=[8],
    forced_bos_token_id=9,
    forced_eos_token_id=2,
    min_new_tokens=2,
)
LABELS: dict[type, Any] = {
    OPTForCausalLM: dict(labels=IDS),
    OPTForSequenceClassification: dict(labels=np.array([0, 2], np.int32)),
    OPTForQuestionAnswering: dict(start_positions=np.array([1, 2]), end_positions=np.array([2, 30])),
}


def half(cls=OPTForCausalLM):
    return cls(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)


def heads(cls):
    call = lambda model, key: model.forward(  # noqa: E731
        IDS, IDS != 1, output_attentions=True, dropout_key=key, **LABELS[cls]
    )
    jax.eval_shape(lambda model: model.forward(IDS, segment_ids=IDS), half(cls))
    return jax.eval_shape(call, half(cls), jax.random.key(0))


def decoded(model, **options):
    request = check_request(model, IDS, options=NEW | options)
    kind = dict(do_sample=request.do_sample)

    def run(model):
        how = dict(logprobs=request.logprobs, cache_dtype=request.cache_dtype, **kind)
        state = loop.begin(model, request.prompts, request.options, capacity=request.capacity, **how)[0]
        prefix = generation._read_prefix(model, IDS[:1], IDS[:1] != 1, request.cache_dtype).extend(3, 20)
        scores = _score(model, jnp.asarray(IDS), jnp.asarray(IDS != 1))
        advance = inspect.unwrap(loop.advance)  # a function with compiler options cannot be traced within another one
        return advance(model, state, request.options, np.int32(3), np.int32(2), **kind), prefix, scores

    return jax.eval_shape(run, model)


def drawn_beams():
    model = half()
    request = check_request(model, IDS, options=dict(NEW, num_beams=3, early_stopping="never", **PROCESSORS))
    options = beams.BeamOptions(
        sampling=request.options_of(np.arange(1)),
        length_penalty=jnp.float32(1),
        keys=jax.random.split(jax.random.key(0), len(IDS)),
        early_stopping="never",
        min_keep=2,
    )

    def search(model):
        state, _ = beams._begin(model, request.prompts, options, num_beams=3, capacity=16, logprobs=1, cache_dtype=None)
        return beams.advance(model, state, options, np.int32(3), np.int32(2))

    return jax.eval_shape(search, model)


def trained(cls, lora=None, remat="none"):
    """Initialisation, update and evaluation on four devices, in bfloat16, with two micro-batches."""
    mesh, optimizer = make_mesh("fsdp=2,tensor=2", devices=jax.devices()[:4]), make_optimizer(SCHEDULE)
    new = lambda: new_model(CONFIG, 0, "bfloat16", cls, remat=remat)  # noqa: E731
    adapted = lora and lora.adapt(jax.eval_shape(new))
    begin = lambda: (  # noqa: E731
        new_state(lora.initial(adapted, new(), 0), optimizer, is_trained) if lora else new_state(new(), optimizer)
    )
    state, loss = jax.eval_shape(begin), batch_loss if cls is OPTForCausalLM else task_loss
    shardings = state_shardings(state, mesh)
    ids = jax.ShapeDtypeStruct((2, 4, 16), jnp.int32)
    shapes = {OPTForCausalLM: (2, 4, 16), OPTForSequenceClassification: (2, 4), OPTForQuestionAnswering: (2, 4, 2)}
    batch = dict(input_ids=ids, labels=jax.ShapeDtypeStruct(shapes[cls], jnp.int32))
    batch["segment_ids" if cls is OPTForCausalLM else "attention_mask"] = ids
    one = {name: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for name, x in batch.items()}
    step = make_train_step(optimizer, SCHEDULE, CONFIG, 0, shardings, mesh, loss_of=loss)
    evaluate = (make_eval_step if cls is OPTForCausalLM else make_predict_step)(shardings.full_model, mesh)
    with use_mesh(mesh):
        return state, jax.eval_shape(step, state, batch), jax.eval_shape(evaluate, state.full_model, one)


def splash():
    x, segments = jnp.ones((1, 2, 8, 16), jnp.bfloat16), jnp.zeros((1, 8), jnp.int32)
    return jax.eval_shape(jax.grad(lambda x: flash.splash(x, x, x, segments, interpret=True).sum(dtype="f")), x)


TRACED = {
    "causal": lambda: heads(OPTForCausalLM),
    "classifier": lambda: heads(OPTForSequenceClassification),
    "answers": lambda: heads(OPTForQuestionAnswering),
    "processors": lambda: decoded(half(), logprobs=2, stop_token_ids=[[3, 4]], **PROCESSORS),
    "int8": lambda: decoded(quantize(half()), cache_dtype="int8"),
    "ReLU sparsity": lambda: decoded(use_relu_sparsity(half())),
    "narrower cache": lambda: decoded(model(), cache_dtype="float16"),
    "wider cache": lambda: decoded(half(), cache_dtype="float32"),
    "drawn beams": drawn_beams,
    "train": lambda: trained(OPTForCausalLM, remat="full"),
    "train classifier": lambda: trained(OPTForSequenceClassification),
    "train answers with LoRA": lambda: trained(OPTForQuestionAnswering, LoRA(2, 4.0)),
    "splash": splash,
}


@pytest.mark.parametrize("program", TRACED)
def test_a_program_has_no_implicit_promotion_and_gives_nothing_of_64_bits(program):
    with settings(STRICT):
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(TRACED[program]())}
    assert dtypes and not dtypes & {np.dtype(name) for name in ("int64", "uint64", "float64")}


def test_a_run_without_jit_is_refused():
    check_options(Options())
    with settings(NO_JIT), pytest.raises(ValueError, match="jax_disable_jit is on, .*: unset JAX_DISABLE_JIT"):
        check_options(Options())
