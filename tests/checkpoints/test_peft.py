"""PEFT adapters, made without torch: merged by `python -m convert --adapter` and `from_pretrained`, or refused.

That PEFT itself computes the same is in `parity/test_peft_parity.py`.
"""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.conversions import assert_same, convert, load_hf_names, refused
from support.hf_files import TINY, hf_weights, write_hf
from support.peft_files import ALPHA, LAYER, PREFIX, RANK, SETTINGS, TARGETS, pairs, write

import opt_jax
from convert.__main__ import main
from opt_jax import named_parameters
from opt_jax.checkpoints.arrays import LazyArray
from opt_jax.checkpoints.formats import names, peft_merge


def merged(weights, tensors, scale=ALPHA / RANK, rounded=True):
    result = dict(weights)
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            weight = name.removeprefix(PREFIX).replace(".lora_A", "")
            b = tensors[name.replace(".lora_A", ".lora_B")]
            total = weights[weight].astype(np.float32) + np.float32(scale) * (b @ a)
            result[weight] = total.astype(weights[weight].dtype) if rounded else total
    return result


def assert_near(got, expected):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype, name
        ulp = 1e-5 if array.dtype == np.float32 else 2 * float(ml_dtypes.finfo(array.dtype).eps)
        ours, theirs = got[name].astype(np.float32), array.astype(np.float32)
        np.testing.assert_allclose(ours, theirs, ulp, ulp, err_msg=name)


@pytest.fixture
def base(tmp_path):
    return write_hf(tmp_path / "base", TINY, hf_weights(TINY))


@pytest.mark.parametrize(
    "dtype, form", [("float32", "safetensors"), ("float16", "bin"), ("bfloat16", "safetensors"), ("float16", "orbax")]
)
def test_an_adapter_is_merged_in_every_form(tmp_path, dtype, form, capsys):
    weights, tensors = hf_weights(TINY, dtype=dtype), pairs()
    base = write_hf(tmp_path / "base", TINY, weights)
    if form == "orbax":
        base = convert(base, tmp_path / "orbax")
    adapter = write(tmp_path / "adapter", tensors, "bin" if form == "bin" else "safetensors")
    out = convert(base, tmp_path / "out", "--adapter", str(adapter))
    expected = merged(weights, tensors)
    assert_near(load_hf_names(out), expected)
    untouched = {name for name, array in expected.items() if array is weights[name]}
    assert len(untouched) == len(weights) - len(TARGETS)
    assert_same(*({name: x[name] for name in untouched} for x in (load_hf_names(out), weights)))
    assert json.loads((out / "config.json").read_text()) == TINY

    # The sums are rounded once, to the dtype that is asked for; so does loading in float32, which is the default here.
    wide = convert(base, tmp_path / "wide", "--adapter", str(adapter), "--dtype", "float32")
    exact = {n: a.astype(np.float32) for n, a in merged(weights, tensors, rounded=False).items()}
    assert_near(load_hf_names(wide), exact)
    model = opt_jax.OPTForCausalLM.from_pretrained(base, adapter=adapter)
    for path, param in named_parameters(model).items():
        name, transposed = names.to_hf(path)
        value = np.asarray(param.get_value())
        np.testing.assert_allclose(value.T if transposed else value, exact[name], 1e-5, 1e-5, err_msg=name)

    assert main(["to-hf", str(base), str(tmp_path / "hf"), "--adapter", str(adapter)]) == 0
    assert_same(load_file(tmp_path / "hf" / "model.safetensors"), load_hf_names(out))
    assert main(["verify", str(out), "--against", str(base), "--adapter", str(adapter)]) == 0
    assert main(["verify", str(out), "--against", str(base)]) == 1
    capsys.readouterr()
    assert main(["inspect", str(base), "--adapter", str(adapter)]) == 0
    assert f"with the adapter {adapter}" in capsys.readouterr().out


def test_a_piece_of_a_merged_matrix_needs_a_piece_of_each(monkeypatch):
    rows, columns = 50, 30
    monkeypatch.setattr(peft_merge, "_BLOCK_BYTES", 4 * columns * 20)  # the sum is computed in three blocks
    rng = np.random.default_rng(0)
    matrix, a, b = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((rows, columns), (rows, 2), (2, columns))
    )
    read = []

    def lazy(array, name):
        return LazyArray(
            array.shape, array.dtype, lambda index: read.append((name, array[index].shape)) or array[index]
        )

    opened = peft_merge.Adapter(Path("a"), {}, {}, {}, "model.")
    pair = peft_merge.Pair(lazy(a, "a"), lazy(b, "b"), 0.5)
    result = opened._merged("lm_head.kernel", lazy(matrix, "matrix"), pair, np.dtype("float32"))
    assert not read
    expected = matrix + np.float32(0.5) * (a @ b)
    np.testing.assert_allclose(result.load((slice(5, 9), slice(2, 5))), expected[5:9, 2:5], rtol=1e-5)
    assert read == [("a", (4, 2)), ("b", (2, 3)), ("matrix", (4, 3))]
    np.testing.assert_allclose(result.load(), expected, rtol=1e-4, atol=1e-6)


def test_a_head_changes_the_class(tmp_path, base):
    """A classifier's head onto a causal LM: the class, the number of labels; its names follow."""
    tensors = pairs() | {f"{PREFIX}score.weight": np.ones((5, 8), np.float32)}
    adapter = write(tmp_path / "adapter", tensors, task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
    out = convert(base, tmp_path / "out", "--adapter", str(adapter))
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["OPTForSequenceClassification"] and len(config["id2label"]) == 5
    model = opt_jax.OPTForSequenceClassification.from_pretrained(base, adapter=adapter)
    again = opt_jax.OPTForSequenceClassification.from_pretrained(out)
    assert model.config.num_labels == again.config.num_labels == 5
    ids = np.arange(2, 10)[None]
    np.testing.assert_array_equal(model(ids).logits, again(ids).logits)


def test_a_base_model_and_names_without_prefix(tmp_path):
    """An adapter of an `OPTModel`, whose names have no `model.`, saved without PEFT's own prefix."""
    weights = hf_weights(TINY, "")
    base = write_hf(tmp_path / "base", TINY | {"architectures": ["OPTModel"]}, weights)
    with_prefix = pairs()
    bare = {name.removeprefix(f"{PREFIX}model."): array for name, array in with_prefix.items()}
    adapter = write(tmp_path / "adapter", bare, target_modules=r"decoder\.layers\.\d+\.(self_attn\.q_proj|fc1)")
    out = convert(base, tmp_path / "out", "--adapter", str(adapter))
    assert_near(load_hf_names(out), merged({f"model.{name}": array for name, array in weights.items()}, with_prefix))


def test_values_that_do_not_fit_are_an_error(tmp_path, capsys):
    weights, tensors = hf_weights(TINY, dtype="float16"), pairs()
    tensors[f"{PREFIX}{TARGETS[1]}.lora_B.weight"][:] = 1e5
    base = write_hf(tmp_path / "base", TINY, weights)
    options = ["--adapter", str(write(tmp_path / "adapter", tensors))]
    assert "layers.0.fc1.weight gets values that float16 cannot hold" in refused(
        capsys, base, tmp_path / "out", *options
    )
    convert(base, tmp_path / "out", *options, "--dtype", "float32")


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(peft_type="IA3"), "peft_type IA3 is not supported"),
        (dict(peft_type="PREFIX_TUNING"), "peft_type PREFIX_TUNING is not supported"),
        (dict(use_dora=True), "use_dora is not supported (its value is True)"),
        (dict(lora_bias=True), "lora_bias is not supported"),
        (dict(layer_replication=[[0, 2]]), "layer_replication is not supported"),
        (dict(target_parameters=["fc1.weight"]), "target_parameters is not supported"),
        (dict(trainable_token_indices=[1]), "trainable_token_indices is not supported"),
        (dict(alora_invocation_tokens=[3]), "alora_invocation_tokens is not supported"),
        (dict(layers_pattern="blocks"), "layers_pattern is not supported"),
        (dict(new_option={"x": 1}), "new_option is not supported"),
        (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights pissa_niter_4 changes the base"),
        (dict(r=0), "r cannot be 0"),
        (dict(r="4"), "r cannot be 4"),
        (dict(lora_alpha=float("inf")), "lora_alpha cannot be inf"),
        (dict(use_rslora="no"), "use_rslora cannot be no"),
        (dict(task_type=[]), "task_type cannot be []"),
        (dict(target_modules=3), "target_modules cannot be 3"),
        (dict(target_modules="("), "target_modules cannot be ("),
        (dict(rank_pattern={"fc1": 0}), "rank_pattern cannot be {'fc1': 0}"),
        (dict(rank_pattern={"(?i)fc1": 3}), "rank_pattern cannot be"),
        (dict(alpha_pattern=[1]), "alpha_pattern cannot be [1]"),
        (dict(modules_to_save="score"), "modules_to_save cannot be score"),
        (dict(layers_to_transform=[True]), "layers_to_transform cannot be [True]"),
        (
            dict(rank_pattern={"fc1": 2}),
            "the pair of model.decoder.layers.0.fc1 has rank 3, but adapter_config.json says 2",
        ),
        (
            dict(target_modules="all-linear"),
            "there is no pair for model.decoder.layers.0.",
        ),
        (dict(target_modules=["fc1", "embed_tokens"]), "there is no pair for model.decoder.embed_tokens"),
        (dict(target_modules=["fc1", "lm_head"]), "there is no pair for lm_head"),
        (dict(modules_to_save=["lm_head"]), "there is no tensor for lm_head, which modules_to_save names"),
        (dict(modules_to_save=["embed_positions"]), "there is no tensor for model.decoder.embed_positions"),
    ],
)
def test_options_that_are_not_supported_are_named(tmp_path, base, capsys, settings, message):
    adapter = write(tmp_path / "adapter", pairs(), **settings)
    assert message in refused(capsys, base, tmp_path / "out", "--adapter", str(adapter))


A, B = (f"{PREFIX}{TARGETS[0]}.lora_{part}.weight" for part in "AB")
ONE = np.ones((1, 1), np.float32)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(A), "the pair of model.decoder.layers.0.self_attn.q_proj has no lora_A, only lora_B"),
        (lambda t: t.pop(B), "the pair of model.decoder.layers.0.self_attn.q_proj has no lora_B, only lora_A"),
        (lambda t: [t.pop(A), t.pop(B)], "there is no pair for model.decoder.layers.0.self_attn.q_proj, which target_"),
        (lambda t: t.clear(), "holds no tensors"),
        (lambda t: t.update(wrong=ONE), "tensor wrong has no place in an OPT model"),
        (
            lambda t: t.update({f"{PREFIX}model.decoder.embed_positions.lora_embedding_A": ONE}),
            "has no place in an OPT",
        ),
        (
            lambda t: t.update({f"{PREFIX}model.decoder.embed_tokens.lora_A.weight": ONE}),
            "has no place in an OPT model",
        ),
        (lambda t: t.update({f"{PREFIX}{TARGETS[0]}.lora_magnitude_vector": ONE}), "has no place in an OPT model"),
        (lambda t: t.update({A: t[A].astype(np.int32)}), "is int32, not a floating point number"),
        (
            lambda t: t.update({A: t[A][:2]}),
            "lora_A (2, 8) and lora_B (8, 3) of model.decoder.layers.0.self_attn.q_proj",
        ),
        (lambda t: t.update({A: t[A][:, :4].copy()}), "q_proj is for 4x8, not 8x8: is "),
        (
            lambda t: t.update(pairs([LAYER.format(2, "fc1")], config=TINY | {"num_hidden_layers": 3})),
            "has no place in",
        ),
        (lambda t: t.update({A.removeprefix(PREFIX): t[A]}), "is there twice"),
        (
            lambda t: t.update({f"{PREFIX}model.decoder.embed_tokens.weight": np.ones((50, 8), np.float32)}),
            "(50, 8), but",
        ),
        (
            lambda t: t.update({f"{PREFIX}lm_head.weight": np.ones((48, 8), np.float32)}),
            "lm_head.weight is not the embed",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, base, capsys, change, message):
    tensors = pairs()
    change(tensors)
    adapter = write(tmp_path / "adapter", tensors)
    assert message in refused(capsys, base, tmp_path / "out", "--adapter", str(adapter))


def test_a_pair_that_the_options_do_not_target_is_named(tmp_path, base, capsys):
    cases: list[dict[str, Any]] = [dict(target_modules=["fc1"]), dict(layers_to_transform=[1])]
    for i, settings in enumerate(cases):
        adapter = write(tmp_path / f"adapter{i}", pairs(), **settings)
        line = refused(capsys, base, tmp_path / "out", "--adapter", str(adapter))
        assert re.search(r"the pair of model\.decoder\.layers\.0\.\S+ is not a target of adapter_config\.json", line)


def test_a_wrong_base_is_one_line(tmp_path, base, capsys):
    """Other widths, or another number of layers, on either side; the line says which base the adapter names."""
    adapter = write(tmp_path / "adapter", pairs())
    for name, change in (("wide", dict(hidden_size=16, word_embed_proj_dim=16)), ("deep", dict(num_hidden_layers=3))):
        config = TINY | change
        other = write_hf(tmp_path / name, config, hf_weights(config))
        line = refused(capsys, other, tmp_path / "out", "--adapter", str(adapter))
        assert f"is {other} its base? It names somebody/base" in line
        with pytest.raises(ValueError, match=f"is {other} its base"):
            opt_jax.OPTForCausalLM.from_pretrained(other, adapter=adapter)


@pytest.mark.parametrize("named, fits", [("Me/OPT", True), ("me/opt-iml", False)])
def test_another_base_of_the_same_shapes_is_a_warning(tmp_path, named, fits):
    adapter = write(tmp_path / "adapter", pairs(), base_model_name_or_path=named)
    cached = tmp_path / "models--me--opt" / "snapshots" / ("0" * 40)
    cached.parent.mkdir(parents=True)
    write_hf(cached, TINY, hf_weights(TINY))
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        opt_jax.OPTForCausalLM.from_pretrained(cached, adapter=adapter)
    messages = [str(note.message) for note in noted if "its base is" in str(note.message)]
    assert len(messages) == (not fits) and all("me/opt-iml, not me/opt: " in text for text in messages)


def test_an_adapter_is_no_model(tmp_path, base, capsys):
    adapter = write(tmp_path / "adapter", pairs())
    message = "this is a PEFT adapter; give its base as the model, and this as its adapter"
    assert message in refused(capsys, adapter, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=message):
        opt_jax.OPTForCausalLM.from_pretrained(adapter)
    (adapter / "config.json").write_text(json.dumps(TINY))
    assert message in refused(capsys, adapter, tmp_path / "out")
    assert "no PEFT adapter at" in refused(capsys, base, tmp_path / "out", "--adapter", str(base))
    (adapter / "adapter_model.safetensors").unlink()
    line = refused(capsys, base, tmp_path / "out", "--adapter", str(adapter))
    assert "has no weights: none of adapter_model.safetensors, adapter_model.bin" in line


def test_an_adapter_that_changes_while_it_is_read(tmp_path, base, capsys, monkeypatch):
    adapter = write(tmp_path / "adapter", pairs())
    read = peft_merge.Adapter._round

    def changing(self, *args):
        (adapter / "adapter_config.json").write_text(json.dumps(SETTINGS | {"r": 3.0}))
        return read(self, *args)

    monkeypatch.setattr(peft_merge.Adapter, "_round", changing)
    with pytest.raises(ValueError, match="adapter_config.json has changed while it was read"):
        opt_jax.OPTForCausalLM.from_pretrained(base, adapter=adapter)


# Kept apart -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kept_apart_it_computes_the_same_and_is_saved_as_an_adapter(tmp_path, base):
    pytest.importorskip("qwix")
    score = {f"{PREFIX}score.weight": np.random.default_rng(1).standard_normal((2, 8)).astype(np.float32)}
    adapter = write(
        tmp_path / "adapter", pairs() | score, task_type="SEQ_CLS", modules_to_save=["score"], use_rslora=True
    )
    cls, ids = opt_jax.OPTForSequenceClassification, np.arange(2, 10)[None]
    merged_model = cls.from_pretrained(base, adapter=adapter)
    kept = cls.from_pretrained(
        base, adapter=adapter, merge_adapter=False, mesh=opt_jax.parallel.make_mesh("fsdp=4,tensor=2")
    )
    assert len(named_parameters(kept)) == len(named_parameters(merged_model)) + 2 * len(TARGETS)
    np.testing.assert_allclose(kept(ids).logits, merged_model(ids).logits, rtol=1e-4, atol=1e-5)
    kept.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert_same(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in ("saved", "adapter")))
    again = cls.from_pretrained(base, adapter=tmp_path / "saved")  # alpha / rank instead of alpha / sqrt(rank)
    np.testing.assert_allclose(again(ids).logits, merged_model(ids).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(FileExistsError, match="it will not be overwritten"):
        kept.save_pretrained(tmp_path / "saved", overwrite=True)
    with pytest.raises(ValueError, match=re.escape("leave out tokenizer=")):
        kept.save_pretrained(tmp_path / "other", tokenizer=opt_jax.OPTTokenizer.from_pretrained("tiny"))


def test_only_what_lora_can_train_is_kept_apart(tmp_path, base):
    load = opt_jax.OPTForCausalLM.from_pretrained
    with pytest.raises(ValueError, match="merge_adapter=False is for an adapter"):
        load(base, merge_adapter=False)
    rank = write(tmp_path / "rank", pairs(TARGETS[::2]) | pairs(TARGETS[1::2], rank=2), rank_pattern={"fc1": 2})
    scale = write(tmp_path / "scale", pairs(), alpha_pattern={"fc1": 2})
    layer = write(tmp_path / "layer", pairs(TARGETS[:2]), layers_to_transform=0)
    norm = {f"{PREFIX}model.decoder.final_layer_norm.{part}": np.ones(8, np.float32) for part in ("weight", "bias")}
    more = write(tmp_path / "more", pairs() | norm, modules_to_save=["decoder.final_layer_norm"])
    for adapter in (rank, scale, layer, more):
        with pytest.raises(ValueError, match="an adapter that is kept apart has the same matrices in all layers"):
            load(base, adapter=adapter, merge_adapter=False)
        load(base, adapter=adapter)
    pytest.importorskip("qwix")
    with pytest.raises(ValueError, match="LoRA adapts models with a head, and not OPTModel"):
        opt_jax.OPTModel.from_pretrained(base, adapter=write(tmp_path / "all", pairs()), merge_adapter=False)
