"""The methods and outputs that models share with `transformers`, without it: tests/parity/ compares the numbers."""

import copy
import inspect
import json
import logging
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from reference import our_model
from support.small_models import on_mesh
from test_layers import room

import opt_jax
from opt_jax import (
    GenerationConfig,
    OPTConfig,
    OPTForCausalLM,
    OPTForSequenceClassification,
    OPTTokenizer,
    interface,
    named_parameters,
)
from opt_jax.checkpoints import hf_scripts
from opt_jax.parallel.mesh import make_mesh
from opt_jax.parallel.rules import param_sharding

IDS = np.array([[2, 5, 6, 7]])


@pytest.fixture(scope="module")
def model():
    return our_model("opt-125m")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A causal LM, as an Orbax directory."""
    path = tmp_path_factory.mktemp("models") / "orbax"
    our_model("opt-125m", vocab_size=96).save_pretrained(path)
    return path


def parameters(model) -> dict[str, np.ndarray]:
    return {path: np.asarray(param.get_value()) for path, param in named_parameters(model).items()}


# Methods --------------------------------------------------------------------------------------------------------------


def test_methods_lead_to_functions_of_lower_rooms(model):
    classes = (interface.ConfigMethods, interface.ModelMethods, interface.GenerationMethods)
    delegates = [value for cls in classes for value in vars(cls).values() if isinstance(value, interface.Delegate)]
    assert len(delegates) > 12
    for delegate in delegates:
        assert room(f"opt_jax.{delegate.module}") < room("opt_jax.interface"), delegate.name
        assert delegate.__get__(None, object).__doc__, delegate.name
    assert {"dtype", "scan_layers", "verify"} <= {*inspect.signature(OPTForCausalLM.from_pretrained).parameters}
    assert {"assistant_model", "batch_size"} <= {*inspect.signature(model.generate).parameters}
    assert next(iter(inspect.signature(model.generate).parameters)) == "input_ids"


def test_what_a_tab_completes(model):
    assert {*opt_jax.__all__} <= {*dir(opt_jax)}
    assert {"from_pretrained", "generate", "push_to_hub", "resize_token_embeddings"} <= {*dir(model)}
    assert {"from_pretrained", "from_hf", "save_pretrained"} <= {*dir(OPTConfig)}


def test_auto_classes():
    assert opt_jax.AutoModel is opt_jax.OPTModel and opt_jax.AutoConfig is OPTConfig
    assert opt_jax.AutoModelForCausalLM is OPTForCausalLM
    assert opt_jax.AutoModelForSequenceClassification is OPTForSequenceClassification
    assert opt_jax.AutoModelForQuestionAnswering is opt_jax.OPTForQuestionAnswering
    with pytest.raises(AttributeError, match=r"use opt_jax\.OPTForCausalLM"):
        opt_jax.FlaxOPTForCausalLM  # noqa: B018
    with pytest.raises(AttributeError, match=r"opt_jax\.quantize"):
        opt_jax.BitsAndBytesConfig  # noqa: B018


def test_print_shows_equal_layers_once():
    text, count = str(our_model("untied")), our_model("untied").num_parameters()
    assert text.splitlines()[0] == f"OPTForCausalLM:  # {count:,} parameters, computed in float32"
    layers = sum(p.size for path, p in named_parameters(our_model("untied")).items() if ".layers." in path)
    assert f"      layers: 3 x OPTDecoderLayer  # {layers:,}" in text.splitlines()
    assert "  lm_head: Linear(kernel float32[16,99])  # 1,584" in text.splitlines()
    assert text == repr(our_model("untied")) and len(text.splitlines()) < 30
    stacked = opt_jax.stack_layers(our_model("opt-125m"))
    assert "        fc1: Linear(kernel float32[3,24,40], bias float32[3,40])  # 3,000" in str(stacked).splitlines()


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_print_shows_shardings():
    model = our_model("opt-125m", vocab_size=100)
    meshed = on_mesh(model, make_mesh("fsdp=2,tensor=2", devices=jax.devices()[:4]))
    assert "fc1: Linear(kernel float32[24@fsdp,40@tensor], bias float32[40@tensor])  # 1,000" in str(meshed)
    meshed = on_mesh(model, make_mesh("fsdp=2", devices=jax.devices()[:2]))
    assert "fc1: Linear(kernel float32[24@fsdp,40], bias float32[40])" in str(meshed)


@pytest.mark.default_settings("nnx.tabulate traces every module by itself")
def test_tabulate():
    """Flax's table. Where it fails, it leaves all modules of the classes unusable."""
    model = our_model("opt-125m", num_hidden_layers=1)
    table = nnx.tabulate(model, jnp.asarray(IDS, jnp.int32), console_kwargs=dict(width=200, color_system=None))
    assert "model/decoder/layers/0/self_attn/q_proj" in table and "float32[1,4,99]" in table
    assert model(IDS).logits.shape == (1, 4, 99)
    stacked = opt_jax.stack_layers(our_model("opt-125m"))
    assert "Total Parameters" in nnx.tabulate(stacked, jnp.asarray(IDS, jnp.int32), depth=2)


# What only scripts for transformers say -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", hf_scripts.MODEL)
def test_attributes_of_other_models_say_what_to_write(model, name):
    assert not hasattr(model, name)
    with pytest.raises(AttributeError, match=f"OPTForCausalLM has no attribute '{name}': ..."):
        getattr(model, name)


def test_attributes_of_other_results_say_what_to_write(model):
    out, generated = model(IDS), model.generate(IDS, max_new_tokens=2, return_cache=True)
    for result, table in ((out, hf_scripts.OUTPUT), (generated, hf_scripts.GENERATED)):
        assert not hasattr(result, "absent")
        for name in table:
            with pytest.raises(AttributeError, match=f"has no attribute '{name}': ..."):
                getattr(result, name)
    assert generated["sequences"] is generated.sequences and generated["cache"] is generated.cache
    assert pickle.loads(pickle.dumps(out)).logits.shape == copy.copy(out).logits.shape == (1, 4, 99)
    np.testing.assert_array_equal(np.asarray(copy.deepcopy(generated)), generated.sequences)


@pytest.mark.parametrize("name", ["prng_key", "params", "trace", "generator", "truncation"])
def test_arguments_of_generate_say_what_to_write(model, name):
    with pytest.raises(ValueError, match=f"{name}=.* is not supported by opt-jax: (write|leave|shorten)"):
        model.generate(IDS, **{name: jax.random.key(0)})


def test_modes(model):
    assert model.eval() is model and model.train(False) is model
    with pytest.raises(ValueError, match="pass dropout_key="):
        model.train()
    with pytest.raises(AttributeError, match="no attribute 'absent'$"):
        model.absent  # noqa: B018
    with pytest.raises(AttributeError, match="leave it out"):
        OPTTokenizer.from_pretrained("tiny")("x").to("cuda")


@pytest.mark.parametrize("name", hf_scripts.LOADING)
def test_arguments_of_from_pretrained_say_what_to_write(name):
    options: dict[str, Any] = {name: "x"}
    with pytest.raises(ValueError, match=f"from_pretrained takes no {name} .it is 'x'.: ..."):
        OPTForCausalLM.from_pretrained("tiny", **options)
    assert hf_scripts.known("from_pretrained", {name: None, "dropout": 0.5}, hf_scripts.LOADING) == {"dropout": 0.5}


def test_arguments_that_ask_for_what_is_so_anyway(model):
    options: Any = dict(trust_remote_code=False, load_in_8bit=False, device_map=None, return_dict=True, dropout=0.25)
    assert OPTConfig.from_pretrained("tiny", **options).dropout == 0.25
    assert model(IDS, return_dict=True, use_cache=False).logits.shape == (1, 4, 99)
    for name in hf_scripts.CALL:
        with pytest.raises(ValueError, match=f"call takes no {name} "):
            model(IDS, **{name: "x"})


@pytest.mark.parametrize("name", hf_scripts.ATTENTION)
def test_implementations_of_attention_say_what_to_write(name):
    with pytest.raises(ValueError, match=f"'{name}': write \"(xla|cudnn)\""):
        OPTForCausalLM.from_pretrained("tiny", attn_implementation=name)


@pytest.mark.parametrize(
    "wrong, right", [("num_label", "num_labels"), ("dtyp", "dtype"), ("drop_out", "dropout"), ("ignore_mismatch", "ig")]
)
def test_unknown_arguments_name_the_nearest(wrong, right):
    options: dict[str, Any] = {wrong: 1}
    with pytest.raises(ValueError, match=f"from_pretrained has no argument '{wrong}': did you mean {right}"):
        OPTForCausalLM.from_pretrained("tiny", **options)


@pytest.mark.parametrize("name", hf_scripts.TOKENIZER)
def test_arguments_of_tokenizers_say_what_to_write(name):
    options: dict[str, Any] = {name: "x"}
    with pytest.raises(ValueError, match=f"from_pretrained takes no {name} "):
        OPTTokenizer.from_pretrained("tiny", **options)


@pytest.mark.parametrize("name", hf_scripts.PIPELINE)
def test_arguments_of_pipelines_say_what_to_write(name):
    options: dict[str, Any] = {name: "x"}
    with pytest.raises(ValueError, match=f"pipeline takes no {name} "):
        opt_jax.pipeline("text-generation", "tiny", **options)


@pytest.mark.parametrize("name", hf_scripts.SAVING)
def test_arguments_of_save_pretrained_say_what_to_write(model, tmp_path, name):
    with pytest.raises(ValueError, match=f"save_pretrained takes no {name} "):
        model.save_pretrained(tmp_path / "model", **{name: "x"})
    with pytest.raises(ValueError, match="did you mean overwrite"):
        model.save_pretrained(tmp_path / "model", overwrit=True)
    assert not [*tmp_path.iterdir()]


# Loading --------------------------------------------------------------------------------------------------------------


def test_fields_of_the_config_are_arguments(saved):
    load: Any = OPTForSequenceClassification.from_pretrained
    model, info = load(saved, num_labels=5, dropout=0.5, output_loading_info=True)
    assert (model.config.num_labels, model.config.dropout, model(IDS).logits.shape) == (5, 0.5, (1, 5))
    assert info["missing_keys"] == {"score.kernel"} and not info["mismatched_keys"] and not info["unexpected_keys"]
    named = load(saved, id2label={0: "no", 1: "maybe", 2: "yes"}, label2id={"no": 0, "maybe": 1, "yes": 2})
    assert named.config.num_labels == 3
    assert named.config.to_hf()["id2label"] == {"0": "no", "1": "maybe", "2": "yes"}
    with pytest.raises(ValueError, match="num_labels=2 but id2label names 3"):
        load(saved, num_labels=2, id2label={0: "no", 1: "maybe", 2: "yes"})
    with pytest.raises(ValueError, match="OPTConfig: dropout=2 must be"):
        load(saved, dropout=2)
    other = OPTConfig.from_pretrained(saved, num_labels=4)
    assert load(saved, config=other).score.kernel.get_value().shape == (24, 4)
    assert load(saved, config=str(saved), num_labels=6).config.num_labels == 6
    with pytest.raises(ValueError, match="OPTConfig.from_hf"):
        load(saved, config={"num_labels": 5})


def test_other_shapes_are_initialised_anew_on_request(tmp_path, caplog):
    path = tmp_path / "classifier"
    our_model("opt-125m", "OPTForSequenceClassification", num_labels=3).save_pretrained(path)
    load: Any = OPTForSequenceClassification.from_pretrained
    with pytest.raises(ValueError, match=r"score.kernel has shape \(24, 3\).*\(24, 5\) \(ignore_mismatched_sizes"):
        load(path, num_labels=5)
    with caplog.at_level(logging.WARNING):
        model, info = load(path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True)
    assert "score.kernel of shape (24, 3): newly initialised" in caplog.text
    assert info["mismatched_keys"] == {("score.kernel", (24, 3), (24, 5))} and not info["missing_keys"]
    new, old = parameters(model), parameters(load(path))
    assert new["score.kernel"].shape == (24, 5) and new["score.kernel"].std() > 0
    del new["score.kernel"], old["score.kernel"]
    assert all((new[name] == old[name]).all() for name in old)


@pytest.mark.parametrize("mesh", [None, "fsdp=4,tensor=2"])
def test_stacked_layers_and_remat(saved, mesh):
    on_mesh: dict[str, Any] = {} if mesh is None else dict(mesh=make_mesh(mesh))
    model = OPTForCausalLM.from_pretrained(saved, scan_layers=True, remat="full", **on_mesh)
    decoder: Any = model.model.decoder
    assert decoder.remat == "full" and not isinstance(decoder.layers, nnx.List)
    kernel = decoder.layers.fc1.kernel.get_value()
    assert kernel.shape == (3, 24, 40)
    for path, param in named_parameters(model).items() if mesh is not None else ():
        value = param.get_value()
        assert value.sharding.is_equivalent_to(param_sharding(path, value.shape, on_mesh["mesh"]), value.ndim), path
    expected = parameters(opt_jax.stack_layers(OPTForCausalLM.from_pretrained(saved)))
    assert all((value == expected[path]).all() for path, value in parameters(model).items())


@pytest.mark.parametrize("dtype", ["fp16", "int8", float, object()])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=r"is not a dtype for models \(float32, bfloat16, float16\)"):
        OPTForCausalLM.from_pretrained("tiny", dtype=dtype)


# Saving ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", [False, True])
def test_saved_as_safetensors(tmp_path, stack):
    model = our_model("untied")
    expected = parameters(model)
    model = opt_jax.stack_layers(model) if stack else model
    model.save_pretrained(tmp_path / "hf", safe_serialization=True, max_shard_size="20KB")
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors.index.json"} < names and "params" not in names
    assert sum(name.endswith(".safetensors") for name in names) > 2
    loaded = parameters(OPTForCausalLM.from_pretrained(tmp_path / "hf"))
    assert all((expected[path] == value).all() for path, value in loaded.items()) and loaded.keys() == expected.keys()
    with pytest.raises(FileExistsError):
        model.save_pretrained(tmp_path / "hf", safe_serialization=True)
    with pytest.raises(ValueError, match="max_shard_size '1X' is not a size"):
        model.save_pretrained(tmp_path / "hf", safe_serialization=True, max_shard_size="1X", overwrite=True)
    model.save_pretrained(tmp_path / "hf", safe_serialization=True, overwrite=True)
    assert (tmp_path / "hf" / "model.safetensors").is_file()


def test_generation_config(model, tmp_path):
    config = GenerationConfig(max_new_tokens=3, stop_token_ids=np.array([[9, 8]]))
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "max_new_tokens": 3,
        "stop_token_ids": [[9, 8]],
    }
    assert GenerationConfig.from_pretrained(tmp_path).max_new_tokens == 3

    model = our_model("opt-125m")
    assert model.generation_config == GenerationConfig()
    before = jax.tree.structure(model)
    model.generation_config = config
    assert model.generate(IDS).sequences.shape == (1, 7) and len(model.generate(IDS, max_new_tokens=2)[0]) == 6
    model.save_pretrained(tmp_path / "model")
    loaded = OPTForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.generation_config.max_new_tokens == 3
    loaded.generation_config = None
    assert loaded.generation_config == GenerationConfig()
    with pytest.raises(ValueError, match="opt_jax.GenerationConfig"):
        model.generation_config = {"max_new_tokens": 3}
    model.generation_config = None
    assert model.generation_config == GenerationConfig() and before is not None


# Outputs --------------------------------------------------------------------------------------------------------------


def test_outputs_are_indexed_as_a_tuple_and_as_a_dict(model):
    out = model(IDS, labels=IDS, output_hidden_states=True)
    assert [*out] == [*out.keys()] == ["loss", "logits", "hidden_states"] and len(out) == 3
    assert out[0] is out.loss is out["loss"] and out[-1] is out.hidden_states is out.to_tuple()[2]
    assert out[:2] == (out.loss, out.logits) and "attentions" not in out and out.get("cache") is None
    for key, error in (("attentions", KeyError), ("nothing", KeyError), (3, IndexError)):
        with pytest.raises(error):
            out[key]
    assert {**out}["logits"] is out.logits and dict(out.items()).keys() == out.keys()


def test_outputs_are_pytrees(model):
    out = jax.jit(lambda model, ids: model.forward(ids))(model, jnp.asarray(IDS, jnp.int32))
    assert type(out) is type(model(IDS)) and len(jax.tree.leaves(out)) == 1
    doubled = jax.tree.map(lambda x: 2 * x, out)
    assert (doubled["logits"] == 2 * out[0]).all() and [*doubled] == ["logits"]


# Embeddings -----------------------------------------------------------------------------------------------------------


def test_parameters_are_counted():
    model = our_model("untied")
    count = sum(value.size for value in parameters(model).values())
    assert model.num_parameters() == count
    assert model.num_parameters(exclude_embeddings=True) == count - 99 * 16 - 66 * 24
    abstract = nnx.eval_shape(lambda: OPTForCausalLM(model.config, rngs=nnx.Rngs(0), scan_layers=True))
    assert abstract.num_parameters() == count


def test_embeddings(model):
    assert model.get_input_embeddings() is model.get_output_embeddings() is model.model.decoder.embed_tokens
    untied = our_model("untied")
    assert untied.get_output_embeddings() is untied.lm_head
    assert our_model("opt-125m", "OPTModel").get_output_embeddings() is None


@pytest.mark.parametrize("name", ["opt-125m", "untied"])
@pytest.mark.parametrize("cls", ["OPTForCausalLM", "OPTModel"])
def test_resized_embeddings(name, cls, tmp_path):
    model = our_model(name, cls)
    old = parameters(model)
    embed = model.resize_token_embeddings(101, pad_to_multiple_of=8)
    assert embed is model.get_input_embeddings() and embed.embedding.get_value().shape[0] == 104
    assert model.config.vocab_size == model.base_model.decoder.config.vocab_size == embed.num_embeddings == 104
    new = parameters(model)
    for path, axis in (("model.decoder.embed_tokens.embedding", 0), ("lm_head.kernel", 1)):
        if path in new:
            kept, added = np.split(new.pop(path), [99], axis)
            assert (kept == old[path]).all()
            np.testing.assert_allclose(
                added, np.repeat(old[path].mean(axis, keepdims=True), 5, axis), rtol=1e-5, atol=1e-6
            )
    assert all((new[path] == old[path]).all() for path in new)
    assert model(np.array([[2, 103]]))[0].shape[:2] == (1, 2)
    model.save_pretrained(tmp_path / "model")
    assert type(model).from_pretrained(tmp_path / "model").config.vocab_size == 104
    model.resize_token_embeddings(99)
    assert all((value == old[path]).all() for path, value in parameters(model).items())


def test_other_ways_to_resize():
    model = our_model("opt-125m")
    assert model.resize_token_embeddings() is model.get_input_embeddings() and model.config.vocab_size == 99
    drawn = model.resize_token_embeddings(600, mean_resizing=False).embedding.get_value()[99:]
    assert abs(float(drawn.std()) / model.config.init_std - 1) < 0.05 and abs(float(drawn.mean())) < 1e-3
    for wrong in (0, -3, 2.5, True, "7"):
        with pytest.raises(ValueError, match="new_num_tokens=.* must be a positive integer"):
            model.resize_token_embeddings(wrong)
    with pytest.raises(ValueError, match="OPTConfig: pad_token_id=1 must be in"):
        model.resize_token_embeddings(1)
    assert model.config.vocab_size == 600
    mesh = make_mesh("tensor=2", jax.devices()[:2])
    table = model.get_input_embeddings().embedding
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor"))
    table.set_value(jax.device_put(table.get_value(), sharding))
    model.resize_token_embeddings(700)
    assert len(table.get_value().sharding.device_set) == 2
    with pytest.raises(ValueError, match="resize the model first"):
        opt_jax.quantize(our_model("opt-125m", num_hidden_layers=1)).resize_token_embeddings(700)


def test_files_of_configs(tmp_path):
    config = OPTConfig.from_pretrained("tiny", num_labels=3)
    config.save_pretrained(tmp_path)
    assert OPTConfig.from_pretrained(tmp_path).num_labels == 3
    assert OPTConfig.from_hf(tmp_path).hidden_size == OPTConfig.from_pretrained("tiny").hidden_size
    with pytest.raises(ValueError, match="did you mean hidden_size"):
        OPTConfig.from_pretrained("tiny", hidden_siz=3)


# jax.export -----------------------------------------------------------------------------------------------------------


def test_exported_with_symbolic_batch_and_length():
    model = our_model("opt-125m", num_hidden_layers=1, max_position_embeddings=512)
    leaves, structure = jax.tree.flatten(model)
    batch, length = export.symbolic_shape("batch, length", constraints=["length <= 512"])

    @jax.jit
    def logits(leaves, ids, mask):
        return jax.tree.unflatten(structure, leaves).forward(ids, mask).logits

    arguments = [jax.ShapeDtypeStruct((batch, length), dtype) for dtype in ("int32", "bool")]
    exported = export.export(logits)(leaves, *arguments)
    for rows, columns in ((1, 5), (2, 300)):  # the latter in blocks, where the length is known
        ids = np.random.RandomState(0).randint(3, 99, (rows, columns)).astype(np.int32)
        mask = np.arange(columns) >= np.array([0, 3])[:rows, None]
        ours, expected = exported.call(leaves, ids, mask), model(ids, mask).logits
        np.testing.assert_allclose(ours[mask], expected[mask], rtol=1e-5, atol=1e-5)
