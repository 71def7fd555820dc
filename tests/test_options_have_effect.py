"""Every argument and field changes the program or a result, or is refused, or stands here with the reason why not.

All of them come from signatures and dataclasses: a new one fails until it has an entry. Programs are traced, and not
compiled. The fields of OPTConfig are in test_model.py, which looks at the numbers that each of them changes.
"""

import ast
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import CONFIGS, our_model

import opt_jax
from convert import __main__ as convert_command
from convert import job, source
from opt_jax import GenerationConfig, OPTTokenizer
from opt_jax.checkpoints import publish
from opt_jax.checkpoints.pretrained import load_pretrained, save_pretrained
from opt_jax.evaluation import command
from opt_jax.evaluation._perplexity import perplexity
from opt_jax.generation import sampling
from opt_jax.generation.beams import BeamEngine
from opt_jax.generation.config import FIELDS
from opt_jax.generation.drafts import check_drafts
from opt_jax.generation.generate import generate, prefill, stream
from opt_jax.generation.loop import FlatModel
from opt_jax.generation.processors import History, completes
from opt_jax.generation.request import check_request
from opt_jax.generation.scoring import score
from opt_jax.model import embeddings
from opt_jax.model.decoder import DecoderInputs
from opt_jax.model.heads import OPTPreTrainedModel
from opt_jax.model.lora import LoRA
from opt_jax.parallel.mesh import make_mesh, use_mesh
from opt_jax.text.pipelines import pipeline, score_texts, stream_text
from opt_jax.training.optimizer import make_optimizer, make_schedule
from opt_jax.training.options import Options
from opt_jax.training.step import make_gradients, new_model, state_shardings

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = dataclasses.replace(CONFIGS["opt-125m"], num_hidden_layers=1)
IDS = jax.ShapeDtypeStruct((2, 8), jnp.int32)


class Because(str):
    """Why an option is not shown to have an effect."""


class Refused:
    """Arguments with which a call fails, and words of the message."""

    def __init__(self, words: str, **arguments: Any):
        self.words, self.arguments = words, arguments


def names(function: Callable) -> list[str]:
    kinds = inspect.Parameter
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self" and parameter.kind not in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)
    ]


def check_all(
    found: Iterable[str], entries: dict[str, Any], observe: Callable, base: dict[str, Any] | None = None
) -> None:
    """`observe(**base)` differs from what it is with each entry: a value of the option, or a dict of arguments."""
    assert sorted(found) == sorted(entries), "give each option an entry: a value that changes something, or Because"
    base = base or {}
    usual, same = observe(**base), []
    for name, entry in entries.items():
        if isinstance(entry, Because):
            continue
        if isinstance(entry, Refused):
            with pytest.raises((ValueError, OSError), match=entry.words):
                observe(**base | entry.arguments)
        elif observe(**base | (entry if isinstance(entry, dict) else {name: entry})) == usual:
            same.append(name)
    assert not same, f"without effect: {same}"


# Programs -------------------------------------------------------------------------------------------------------------


def equations(jaxpr: Any) -> Iterator[tuple]:
    """What a traced program does, without the names of its variables, of which some may be read by nobody."""
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
        assert "__init__" not in vars(getattr(opt_jax, name))  # no other arguments

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


# Generation -----------------------------------------------------------------------------------------------------------

VOCAB = CONFIG.vocab_size
# All processors that are left out of the program unless asked for, at values that change next to nothing.
WEAK: dict[str, Any] = dict(
    do_sample=True,
    min_p=1e-9,
    typical_p=1 - 1e-6,
    repetition_penalty=1 + 1e-6,
    presence_penalty=1e-6,
    frequency_penalty=1e-6,
    no_repeat_ngram_size=7,
    bad_words_ids=[[90, 91]],
    suppress_tokens=[92],
    begin_suppress_tokens=[93],
    forced_bos_token_id=94,
    forced_eos_token_id=2,
    stop_token_ids=[[95, 96]],
    max_new_tokens=4,
    min_new_tokens=1,
)
# Rows: amid a text, the first token, the first one after a prompt of one token, the last one, one that ends.
TOKENS = np.array([[5, 6, 7, 5, 6, 7, 5, 6]] * 5, np.int32)
STEP = np.array([2, 0, 0, 3, 1], np.int32)
VALID = np.arange(8) >= np.array([0, 0, 7, 0, 0])[:, None]


@jax.jit
def choose(options):
    history = History(jnp.asarray(TOKENS), jnp.asarray(VALID), jnp.full(5, 8), jnp.asarray(STEP))
    logits = 3 * jax.random.normal(jax.random.key(0), (5, VOCAB))
    ends = completes(history, options.stop_sequences)
    return sampling.process(logits, history, options, True), sampling.choose(logits, history, options, True), ends


@pytest.fixture(scope="module")
def model():
    return our_model("opt-125m", num_hidden_layers=1)


def test_options_of_generation(model):
    tokenizer = OPTTokenizer.from_pretrained("tiny")

    def asked(assistant=None, **options):
        request = check_request(model, TOKENS, tokenizer=tokenizer, options=options)
        drafts = check_drafts(model, request, assistant)
        on_host = {
            field.name: getattr(request, field.name)
            for field in dataclasses.fields(request)
            if field.name not in ("input_ids", "prompts", "options", "given", "column_bytes")
        }
        on_host |= dict(stops=request.options.stop_strings is not None, beams=request.num_beams)
        on_host |= dict(drafts=drafts and (drafts.count, int(drafts.ngram)))
        if request.num_beams > 1:
            beams = BeamEngine(FlatModel.of(model), request).options_of(np.arange(1))
            on_host |= dict(penalty=float(beams.length_penalty), early=beams.early_stopping)
        # In one program, for all processors are on; what is not about them has no other tokens to show.
        chosen = choose(request.options) if request.options.stop_sequences is not None and request.copies == 1 else ()
        rounded = lambda x: np.round(np.asarray(x, np.float64), 3).tolist() if hasattr(x, "dtype") else x  # noqa: E731
        return str(jax.tree.map(rounded, (on_host, chosen)))

    entries: dict[str, Any] = {
        "max_new_tokens": 5,
        "max_length": dict(max_new_tokens=None, max_length=20),
        "min_new_tokens": 3,
        "min_length": 11,
        "do_sample": dict.fromkeys(WEAK),
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.5,
        "typical_p": 0.5,
        "repetition_penalty": 1.5,
        "presence_penalty": 1.0,
        "frequency_penalty": 1.0,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[6, 9]],
        "suppress_tokens": [9],
        "begin_suppress_tokens": [9],
        "forced_bos_token_id": 9,
        "forced_eos_token_id": 9,
        "eos_token_id": 9,
        "pad_token_id": 9,
        "stop_token_ids": [[5, 6]],
        "stop_strings": "x",
        "num_beams": dict(num_beams=2, stop_token_ids=None),
        "num_assistant_tokens": dict(assistant=model, num_assistant_tokens=3),
        "prompt_lookup_num_tokens": 3,
        "num_return_sequences": 2,
        "seed": 7,
        "cache_dtype": "bfloat16",
        "logprobs": 2,
    }
    more = {  # what needs another option
        "length_penalty": (dict(num_beams=2), dict(length_penalty=2.0)),
        "early_stopping": (dict(num_beams=2), dict(early_stopping=True)),
        "max_matching_ngram_size": (dict(prompt_lookup_num_tokens=3), dict(max_matching_ngram_size=4)),
        "num_assistant_tokens": (dict(assistant=model), dict(num_assistant_tokens=3)),
    }
    check_all([*{*FIELDS} - {*more} | {"num_assistant_tokens"}], entries, asked, WEAK)
    for name, (base, changed) in more.items():
        assert asked(**base, **changed) != asked(**base), name
        with pytest.raises(ValueError, match=f"{name} without effect"):  # alone
            asked(**changed)


def test_every_traced_option_reaches_the_tokens():
    """The other half: of what a request says in arrays, the compiled code reads all."""
    read = attributes(
        ["opt_jax/generation/sampling.py", "opt_jax/generation/loop.py", "opt_jax/generation/speculative.py"],
        {"o", "options"},
    )
    assert {field.name for field in dataclasses.fields(sampling.SamplingOptions)} <= read


def test_arguments_of_generate(model):
    entries: dict[str, Any] = {
        "model": Because("what generates"),
        "input_ids": Because("the prompts"),
        "attention_mask": Refused("attention_mask must be of the shape", attention_mask=[[1]]),
        "generation_config": Refused("top_k without effect", generation_config=GenerationConfig(top_k=3)),
        "tokenizer": Refused("stop_strings need the tokenizer", stop_strings="x"),
        "cache": Refused("cache must be what model.prefill returns", cache="x"),
        "assistant_model": Refused("assistant_model must be an OPTForCausalLM", assistant_model="x"),
        "batch_size": Refused("batch_size=0 must be an integer of at least 1", batch_size=0),
        "progress_bar": Refused("progress_bar without effect: pass batch_size", progress_bar=True),
    }
    call = lambda **arguments: generate(model, TOKENS, **arguments) if arguments else None  # noqa: E731
    check_all(names(generate), entries, call)
    assert {*names(generate)} - {*names(stream)} == {"batch_size", "progress_bar"}
    entries = {
        "model": Because("it"),
        "input_ids": Because("it"),
        "attention_mask": Because("test_generate.py"),
        "cache_dtype": Refused("cache_dtype='int4' must be one of", cache_dtype="int4"),
    }
    call = lambda **arguments: prefill(model, TOKENS[:1], **arguments) if arguments else None  # noqa: E731
    check_all(names(prefill), entries, call)


# Text -----------------------------------------------------------------------------------------------------------------


def test_arguments_of_the_tokenizer():
    texts, pairs = ["def f(x): return", "x"], ["y = 2", "z"]

    def made(**arguments):
        tokenizer = OPTTokenizer(OPTTokenizer.from_pretrained("tiny").backend_tokenizer, **arguments)
        return str([tokenizer(texts, truncation=True, max_length=3), tokenizer(texts)])

    entries: dict[str, Any] = {
        "backend": Because("it"),
        "config": {"config": {"pad_token": "</s>"}},
        "padding_side": "right",
        "truncation_side": "left",
    }
    check_all(names(OPTTokenizer.__init__), entries, made)

    tokenizer = OPTTokenizer.from_pretrained("tiny")
    entries = {
        "text": ["y", "x"],
        "text_pair": pairs,
        "padding": dict(padding="max_length", max_length=50),
        "truncation": dict(truncation=True, max_length=4),
        "max_length": dict(truncation=True, max_length=3),
        "return_tensors": None,
        "add_special_tokens": Because("False warns, too: test_text.py"),
        "padding_side": "right",
        "pad_to_multiple_of": 64,
        "return_offsets_mapping": True,
    }
    check_all(names(OPTTokenizer.__call__), entries, lambda **arguments: str(tokenizer(**arguments)), dict(text=texts))

    rows = tokenizer(texts, return_tensors=None)
    entries = {
        "encoded_inputs": [tokenizer("x", return_tensors=None)],
        "padding": dict(padding=False, return_tensors=None),
        "max_length": dict(padding="max_length", max_length=50),
        "pad_to_multiple_of": 64,
        "padding_side": "right",
        "return_tensors": None,
    }
    check_all(names(OPTTokenizer.pad), entries, lambda **a: str(tokenizer.pad(**a)), dict(encoded_inputs=rows))
    entries = {
        "token_ids": [3],
        "skip_special_tokens": True,
        "clean_up_tokenization_spaces": Because("warns: it would damage byte-level BPE, as HF v5 says"),
    }
    check_all(names(OPTTokenizer.decode), entries, tokenizer.decode, dict(token_ids=tokenizer.encode("x")))


def test_arguments_of_text_functions(model):
    """What is said in words: each is at least refused where it does not fit."""
    tokenizer = OPTTokenizer.from_pretrained("tiny")
    entries: dict[str, Any] = {
        "task": Refused("task 'x' is not supported", task="x"),
        "model": Refused("no directory", model="./nowhere", tokenizer=None),
        "tokenizer": Refused("pass tokenizer=", model=model, tokenizer=None),
    }
    check_all(names(pipeline), entries, lambda **a: pipeline(**a) and None, dict(model=model, tokenizer=tokenizer))
    with pytest.raises(ValueError, match="dtype: only for a model that is loaded by name"):
        pipeline(model=model, tokenizer=tokenizer, dtype="bfloat16")
    it = Because("the input")
    entries = {
        "model": it,
        "tokenizer": it,
        "texts": it,
        "prompts": Refused("2 prompts for 1 texts", prompts=["x", "y"]),
    }
    call = lambda **a: score_texts(model, tokenizer, ["x"], **a) if a else None  # noqa: E731
    check_all(names(score_texts), entries, call)
    assert names(stream_text) == ["model", "tokenizer", "prompt"]
    assert names(score) == ["model", "input_ids", "attention_mask", "return_greedy"]  # the last adds to the result
    entries = {
        "model": it,
        "input_ids": it,
        "protocol": Refused("protocol 'x'", protocol="x"),
        "window": Refused("window 1:", window=1),
        "stride": Refused("only for the sliding protocol", stride=2),
        "batch_size": Refused("batch size 0", batch_size=0),
        "progress": Because("called: test_perplexity.py"),
    }
    check_all(names(perplexity), entries, lambda **a: perplexity(model, TOKENS[0], **a) if a else None)


# Files ----------------------------------------------------------------------------------------------------------------


def test_arguments_of_resizing_and_publishing():
    def resized(**arguments):
        model = our_model("opt-125m", num_hidden_layers=1)
        return np.asarray(embeddings.resize_token_embeddings(model, **arguments).embedding.get_value()).tolist()

    entries: dict[str, Any] = {
        "model": Because("it"),
        "new_num_tokens": 101,
        "pad_to_multiple_of": 16,
        "mean_resizing": dict(new_num_tokens=101, mean_resizing=False),
    }
    check_all(names(embeddings.resize_token_embeddings), entries, resized)
    assert resized(new_num_tokens=101) != resized(new_num_tokens=101, mean_resizing=False)
    assert names(embeddings.num_parameters) == ["model", "exclude_embeddings"]  # test_interface.py
    common = ["repo_id", "private", "token", "revision", "create_pr", "commit_message"]  # test_publish.py
    assert sorted(names(publish.push_tokenizer)) == sorted(["tokenizer", *common])
    assert sorted(names(publish.push_model)) == sorted(["model", "tokenizer", "max_shard_size", *common])


def test_arguments_of_loading_and_saving(model, tmp_path):
    model.save_pretrained(tmp_path / "model")

    def loaded(name="model", **arguments):
        new = load_pretrained(opt_jax.OPTForCausalLM, tmp_path / name, **arguments)
        leaf = jax.tree.leaves(new)[0]
        decoder = new.model.decoder
        return str([new.dtype, leaf.dtype, leaf.sharding, decoder.implementation, decoder.remat, type(decoder.layers)])

    at_hub = Because("of hub ids: test_download.py")
    entries: dict[str, Any] = {
        "cls": Because("which class comes back"),
        "name": Refused("no directory", name="nowhere"),
        "dtype": "bfloat16",
        "param_dtype": "bfloat16",
        "config": Refused("the config calls for", config=dataclasses.replace(CONFIG, ffn_dim=48)),
        "scan_layers": True,
        "remat": "full",
        "attn_implementation": "splash",
        "mesh": make_mesh("data=1", jax.devices()[:1]),
        "ignore_mismatched_sizes": Because("test_interface.py, as are fields of the config"),
        "output_loading_info": Because("test_interface.py"),
        "revision": Refused("revision='x' is for models on the hub", revision="x"),
        "cache_dir": at_hub,
        "local_files_only": at_hub,
        "verify": Because("test_checkpoint.test_without_verifying_a_damaged_model_is_read_as_it_is"),
    }
    check_all(names(load_pretrained), entries, loaded)

    def saved(overwrite=True, **arguments):
        for path in (tmp_path / "new").glob("*.*"):
            path.unlink()
        save_pretrained(model, tmp_path / "new", overwrite=overwrite, **arguments)
        return sorted(path.name for path in (tmp_path / "new").iterdir())

    entries = {
        "model": Because("it"),
        "directory": Because("it"),
        "tokenizer": OPTTokenizer.from_pretrained("tiny"),
        "overwrite": Refused("new", overwrite=False),
        "safe_serialization": True,
        "max_shard_size": Refused("without effect", max_shard_size="1KB"),
    }
    check_all(names(save_pretrained), entries, saved)
    with pytest.raises(ValueError, match="int4"):
        model.init_cache(1, 8, "int4")


# Commands -------------------------------------------------------------------------------------------------------------


def attributes(paths: Iterable[str], variables: set[str]) -> set[str]:
    """What is read of the variables in the files, but for functions that only check."""
    read = set()
    for path in paths:
        tree = ast.parse((REPOSITORY / path).read_text())
        checks = (f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name.startswith("check"))
        skipped = {id(node) for check in checks for node in ast.walk(check)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and id(node) not in skipped:
                read |= {node.attr} if node.value.id in variables else set()
    return read


def test_options_of_commands_are_read():
    """By what does the work, not only by the checks; what changes nothing in a run is refused there."""
    rooms = [path for room in ("training", "data") for path in (REPOSITORY / "opt_jax" / room).rglob("*.py")]
    training = ["train.py", *(str(path.relative_to(REPOSITORY)) for path in rooms)]
    for options, paths, passed in (
        (Options, training, {"dropout", "attention_dropout", "init_std"}),  # model_config takes these by their names
        (command.EvalOptions, ["opt_jax/evaluation/command.py"], set()),
        (convert_command.WriteOptions, ["convert/__main__.py"], set()),
    ):
        variables = {"options", "write"}
        unread = {f.name for f in dataclasses.fields(options)} - attributes(paths, variables)
        assert unread == passed, options.__name__
    given = {
        f.name
        for kind in (convert_command.SourceOptions, convert_command.MetaseqOptions)
        for f in dataclasses.fields(kind)
    }
    assert given - {"no_verify"} | {"verify"} == {*names(source.open_source)} - {"names", "from_metaseq"}
    assert {f.name for f in dataclasses.fields(convert_command.JobOptions)} == {*names(job.started)}
    for function in (source.open_source, job.started):
        body = ast.walk(ast.parse(inspect.getsource(function)))
        assert {*names(function)} <= {node.id for node in body if isinstance(node, ast.Name)}
