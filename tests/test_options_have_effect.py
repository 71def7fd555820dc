"""Every argument and field changes the program or a result, or is refused, or has a reason here why not.

They come from signatures and dataclasses, so a new one fails until it has an entry. Arguments of models and of training
steps are in test_traced_options_have_effect.py.
"""

import ast
import dataclasses
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY
from reference import CONFIGS, our_model

import opt_jax
from convert import __main__ as convert_command
from convert import job, series, source
from opt_jax import Add, GenerationConfig, OPTTokenizer, Project, Replace, Scale, Zero
from opt_jax.checkpoints import hub, publish
from opt_jax.checkpoints.orbax import open_stored
from opt_jax.checkpoints.pretrained import load_pretrained
from opt_jax.checkpoints.saving import save_pretrained
from opt_jax.compression import compress
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
from opt_jax.model.interventions import run_with_cache, run_with_hooks
from opt_jax.parallel.mesh import make_mesh
from opt_jax.text.pipelines import pipeline, score_texts, stream_text
from opt_jax.training.options import Options

CONFIG = dataclasses.replace(CONFIGS["opt-125m"], num_hidden_layers=1)


class Because(str):
    """The reason why no effect of an option is shown here."""


class Refused:
    """Arguments with which a call fails, and a pattern of its message."""

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
    options: Iterable[str], entries: dict[str, Any], observe: Callable, base: dict[str, Any] | None = None
) -> None:
    """Assert that each option changes what `observe` returns.

    Args:
      options: all names.
      entries: name -> another value, a dict of arguments, `Because` or `Refused`.
      observe: a function of the options.
      base: its other arguments.
    """
    assert sorted(options) == sorted(entries), "give each option an entry: a value that changes something, or Because"
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


# Generation -----------------------------------------------------------------------------------------------------------

VOCAB = CONFIG.vocab_size
# All optional processors are on, at values that change almost nothing.
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
# Rows: in a text, at the first token, at the first one after a prompt of one token, at the last one, at an end.
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
            if field.name not in ("input_ids", "prompts", "options", "given", "column_bytes", "stops")
        }
        on_host |= dict(stops=request.options.stop_strings is not None, beams=request.num_beams)
        on_host |= dict(drafts=drafts and (drafts.count, int(drafts.ngram)))
        if request.num_beams > 1:
            beams = BeamEngine(FlatModel.of(model), request).options_of(np.arange(1))
            on_host |= dict(penalty=float(beams.length_penalty), early=beams.early_stopping)
        # One program serves all options of processors. Other options show in `on_host`.
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
    more = {  # options that need another one: (the other one, the option)
        "length_penalty": (dict(num_beams=2), dict(length_penalty=2.0)),
        "early_stopping": (dict(num_beams=2), dict(early_stopping=True)),
        "max_matching_ngram_size": (dict(prompt_lookup_num_tokens=3), dict(max_matching_ngram_size=4)),
        "num_assistant_tokens": (dict(assistant=model), dict(num_assistant_tokens=3)),
    }
    check_all([*{*FIELDS} - {*more} | {"num_assistant_tokens"}], entries, asked, WEAK)
    for name, (base, changed) in more.items():
        assert asked(**base, **changed) != asked(**base), name
        with pytest.raises(ValueError, match=f"{name} without effect"):  # without the other option
            asked(**changed)


def test_every_traced_option_reaches_the_tokens():
    """The compiled code reads each field of `SamplingOptions`."""
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
        "inputs_embeds": Refused("inputs_embeds must be", inputs_embeds=np.zeros((5, 8, 3), np.float32)),
        "generation_config": Refused("top_k without effect", generation_config=GenerationConfig(top_k=3)),
        "tokenizer": Refused("stop_strings need the tokenizer", stop_strings="x"),
        "cache": Refused("cache must be what model.prefill returns", cache="x"),
        "assistant_model": Refused("assistant_model must be an OPTForCausalLM", assistant_model="x"),
        "batch_size": Refused("batch_size=0 must be an integer of at least 1", batch_size=0),
        "progress_bar": Refused("progress_bar without effect: pass batch_size", progress_bar=True),
        "return_cache": Refused("return_cache is not supported with num_beams", return_cache=True, num_beams=2),
        "hooks": Refused("no hook point is named 'x'", hooks={"x": Zero()}),
    }
    call = lambda **arguments: generate(model, TOKENS, **arguments) if arguments else None  # noqa: E731
    check_all(names(generate), entries, call)
    assert {*names(generate)} - {*names(stream)} == {"batch_size", "progress_bar", "return_cache"}
    entries = {
        "model": Because("it"),
        "input_ids": Because("it"),
        "attention_mask": Because("test_generate.py"),
        "cache_dtype": Refused("cache_dtype='int4' must be one of", cache_dtype="int4"),
    }
    call = lambda **arguments: prefill(model, TOKENS[:1], **arguments) if arguments else None  # noqa: E731
    check_all(names(prefill), entries, call)


def test_arguments_of_hooks(model):
    """Values and indices of interventions: each changes the result."""

    def call(function=run_with_cache, **arguments):
        return str(jax.tree.map(np.asarray, function(model, TOKENS, **arguments)))

    entries: dict[str, Any] = {
        "model": Because("it"),
        "input_ids": Because("it"),
        "attention_mask": VALID,
        "names": "ln_final.hook_scale",
        "hooks": dict(hooks={"hook_embed": Zero()}),
    }
    check_all(names(run_with_cache), entries, call, dict(names="hook_embed"))
    assert {*names(run_with_cache)} - {*names(run_with_hooks)} == {"names"}
    for base, changed in (
        (Add(3.0), dict(value=2.0, scale=2.0)),
        (Replace(3.0), dict(value=2.0)),
        (Scale(3.0), dict(factor=2.0)),
        (Zero(), {}),
        (Project(np.eye(8)[:1]), dict(directions=np.eye(8)[:2])),
    ):

        def logits(base=base, **arguments):
            edit = dataclasses.replace(base, **arguments)
            return str(np.asarray(model.forward(TOKENS, hooks={"blocks.0.attn.hook_z": edit}).logits))

        indices = dict(rows=1, positions=-1, heads=2, layers=Refused("layers=1: there are 1", layers=1))
        entries = dict(indices, neurons=Refused("has no neurons", neurons=1)) | changed
        check_all([field.name for field in dataclasses.fields(base)], entries, logits)


def test_arguments_of_relu_sparsity(model):
    def program(**arguments):
        sparse = opt_jax.use_relu_sparsity(model, **arguments)
        return jax.jit(sparse.forward).lower(TOKENS[:1]).as_text()

    entries = dict(model=Because("it"), capacity=0.2)
    check_all(names(opt_jax.use_relu_sparsity), entries, program)


# Text -----------------------------------------------------------------------------------------------------------------


def test_arguments_of_the_tokenizer():
    texts, pairs = ["def f(x): return", "x"], ["y = 2", "z"]

    def tokenized(**arguments):
        tokenizer = OPTTokenizer(OPTTokenizer.from_pretrained("tiny").backend_tokenizer, **arguments)
        return str([tokenizer(texts, truncation=True, max_length=3), tokenizer(texts)])

    entries: dict[str, Any] = {
        "backend": Because("it"),
        "config": {"config": {"pad_token": "</s>"}},
        "padding_side": "right",
        "truncation_side": "left",
    }
    check_all(names(OPTTokenizer.__init__), entries, tokenized)

    tokenizer = OPTTokenizer.from_pretrained("tiny")
    entries = {
        "text": ["y", "x"],
        "text_pair": pairs,
        "padding": dict(padding="max_length", max_length=50),
        "truncation": dict(truncation=True, max_length=4),
        "max_length": dict(truncation=True, max_length=3),
        "return_tensors": None,
        "add_special_tokens": Because("False warns, too: test_tokenizer.py"),
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
    """Each argument changes the result, or is refused when it is wrong."""
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
    # return_greedy adds to the result; hooks: test_hooks.py
    assert names(score) == ["model", "input_ids", "attention_mask", "return_greedy", "hooks"]
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
        "verify": Refused("--no-verify. is for Orbax directories", name=hub.resolve("tiny"), verify=False),
        "adapter": Refused("no PEFT adapter", adapter=tmp_path / "nowhere"),
        "merge_adapter": Refused("merge_adapter=False is for an adapter", merge_adapter=False),
        "dequantize": Refused("--dequantize. is for quantized models", dequantize=True),
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


def test_arguments_of_compress(model, tmp_path):
    """Each changes what is written. That they are refused where they have no effect: test_compress.py."""
    model.save_pretrained(tmp_path / "model")

    def written(method="gptq", calibration: Any = TOKENS[:1], **arguments):
        output = tmp_path / f"out{len([*tmp_path.iterdir()])}"
        options: dict[str, Any] = dict(model=tmp_path / "model", output=output, method=method, calibration=calibration)
        options |= arguments
        compress(**options)
        return str({path: array.load().tobytes() for path, array in open_stored(output / "params").items()})

    text = Because("of texts: test_calibration.py, test_compress_command.py")
    entries: dict[str, Any] = {
        "model": Refused("no directory", model="./nowhere"),
        "output": Refused("exists already", output=tmp_path / "model"),
        "method": "awq",
        "bits": 3,
        "group_size": 8,
        "symmetric": True,
        "act_order": True,
        "true_sequential": True,
        "damping": 0.3,
        "alpha": Because("of smoothquant: below"),
        "sparsity": Because("of methods that prune: below"),
        "calibration": TOKENS[:1, :5],
        **dict.fromkeys(("samples", "window", "seed", "rows", "text_key"), text),
        "dtype": Refused("is not a dtype for models", dtype="int4"),
        "mesh": Because("the result is the same: test_compress.py"),
        "verify": Refused("--no-verify. is for Orbax directories", model="tiny", verify=False),
        "progress": Because("called: test_compress.py"),
    }
    check_all(names(compress), entries, written)
    for method, calibration, values in (
        ("smoothquant", TOKENS[:1], dict(alpha=[0.4, 0.6])),
        ("sparsegpt", TOKENS[:1], dict(sparsity=[0.4, 0.6], bits=[None, 4])),
        ("magnitude", None, dict(sparsity=[0.4, "2:4"])),
    ):
        for name, (first, second) in values.items():
            results = [written(method, calibration, **{name: value}) for value in (first, second)]
            assert results[0] != results[1], (method, name)


# Commands -------------------------------------------------------------------------------------------------------------


def attributes(paths: Iterable[str], variables: set[str]) -> set[str]:
    """The attributes of the variables that the files read, outside of functions that only check."""
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
    """They are read by code that does the work, and not only by checks."""
    rooms = [path for room in ("training", "data") for path in (REPOSITORY / "opt_jax" / room).rglob("*.py")]
    training = ["train.py", *(str(path.relative_to(REPOSITORY)) for path in rooms)]
    for options, paths, passed in (
        (Options, training, {"dropout", "attention_dropout", "init_std"}),  # model_config gets these by name
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
    assert given - {"no_verify"} | {"verify"} == {*names(source.open_source)} - {"names", "from_metaseq", "dtype"}
    assert {f.name for f in dataclasses.fields(convert_command.JobOptions)} == {*names(job.started)} - {"options"}
    commands = (convert_command.metaseq, convert_command.to_hf, convert_command.verify)
    for function in (source.open_source, job.started, series.verify, series.convert_each, *commands):
        body = ast.walk(ast.parse(inspect.getsource(function)))
        assert {*names(function)} <= {node.id for node in body if isinstance(node, ast.Name)}
