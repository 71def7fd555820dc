"""Methods and outputs beside those of `transformers`: the same calls, the same keys, numbers and files."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from oracle import make_hf, make_pair, torch, transformers
from reference import batch

import opt_jax
from opt_jax import OPTForCausalLM, OPTForSequenceClassification, named_parameters

CLASSES = ("OPTModel", "OPTForCausalLM", "OPTForSequenceClassification", "OPTForQuestionAnswering")


@pytest.mark.parametrize("cls", CLASSES)
def test_outputs_have_the_same_keys_in_the_same_order(cls):
    hf, model = make_pair("opt-125m", cls, num_hidden_layers=1)
    ids = batch("opt-125m")["input_ids"]
    options = dict(output_hidden_states=True, output_attentions=True)
    inputs, targets = dict(input_ids=ids), {"OPTForCausalLM": dict(labels=ids)}.get(cls, {})
    if cls == "OPTForSequenceClassification":
        targets = dict(labels=np.zeros(3, np.int32))
    if cls == "OPTForQuestionAnswering":
        targets = dict(start_positions=np.zeros(3, np.int32), end_positions=np.ones(3, np.int32))
    inputs |= targets
    theirs = hf(**{k: torch.from_numpy(v).long() for k, v in inputs.items()}, use_cache=False, **options)
    ours = model(**inputs, **options)
    assert [*ours] == [*theirs] == [*ours.keys()] and len(ours) == len(theirs)
    assert len(ours.to_tuple()) == len(theirs.to_tuple()) and len(ours[:2]) == len(theirs[:2]) == 2
    for i, key in enumerate(theirs):
        assert ours[i] is ours[key] is getattr(ours, key) and key in ours
        if not isinstance(theirs[key], tuple):
            assert ours[key].shape == tuple(theirs[i].shape)
        else:
            assert [x.shape for x in ours[key]] == [tuple(x.shape) for x in theirs[i]]
    for key, error in (("past_key_values", KeyError), (len(theirs), IndexError)):
        for out in (ours, theirs):
            with pytest.raises(error):
                out[key]


def plain(info):
    """The keys as sorted lists of tuples and names."""
    keys = lambda values: sorted((k[0], *map(tuple, k[1:])) if isinstance(k, tuple) else k for k in values)  # noqa: E731
    return {name: keys(values) for name, values in info.items()}


def test_loading_info(tmp_path):
    """A head that is missing, one of another size, one too many."""
    make_hf("opt-125m", "OPTForSequenceClassification", num_labels=3).save_pretrained(tmp_path / "score")
    make_hf("untied").save_pretrained(tmp_path / "untied")
    for cls, name, options in (
        ("OPTForSequenceClassification", "score", dict(num_labels=5, ignore_mismatched_sizes=True)),
        ("OPTForSequenceClassification", "score", {}),
        ("OPTForQuestionAnswering", "score", {}),
        ("OPTForSequenceClassification", "untied", dict(num_labels=7)),
    ):
        options |= dict(output_loading_info=True)
        hf, theirs = getattr(transformers, cls).from_pretrained(tmp_path / name, **options)
        model, ours = getattr(opt_jax, cls).from_pretrained(tmp_path / name, **options)
        assert plain(ours) == plain(theirs), (cls, name)
        assert model.config.num_labels == hf.config.num_labels


@pytest.mark.parametrize("cls", ["OPTForCausalLM", "OPTModel", "OPTForSequenceClassification"])
@pytest.mark.parametrize("size", ["8KB", "1GB"])
def test_saved_files_are_those_of_transformers(tmp_path, cls, size):
    hf = make_hf("untied", cls)
    hf.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    model = getattr(opt_jax, cls).from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours", safe_serialization=True, max_shard_size=size)
    files = {side: sorted(path.name for path in (tmp_path / side).iterdir()) for side in ("ours", "theirs")}
    assert files["ours"] == files["theirs"]
    for path in (tmp_path / "theirs").glob("*.safetensors*"):
        same = tmp_path / "ours" / path.name
        if path.suffix == ".json":
            assert json.loads(path.read_text()) == json.loads(same.read_text())
        else:
            assert path.read_bytes() == same.read_bytes()
    loaded = getattr(transformers, cls).from_pretrained(tmp_path / "ours")
    for key, tensor in hf.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", ["opt-125m", "untied"])
@pytest.mark.parametrize("count", [60, 103])
def test_resized_models_are_those_of_transformers(name, count):
    hf, model = make_pair(name)
    assert hf.num_parameters() == model.num_parameters()
    assert hf.num_parameters(exclude_embeddings=True) == model.num_parameters(exclude_embeddings=True)
    theirs = hf.resize_token_embeddings(count, mean_resizing=True).weight.detach().numpy()
    ours = np.asarray(model.resize_token_embeddings(count).embedding.get_value())
    assert model.config.vocab_size == hf.config.vocab_size == count and hf.num_parameters() == model.num_parameters()
    assert (ours[:99] == theirs[:99]).all()
    # HF draws new rows around the mean, with 1e-9 of the covariance.
    np.testing.assert_allclose(ours[99:], theirs[99:], atol=5 * 1e-9**0.5 * ours[:99].std() + 1e-6)
    ids = np.array([[2, 11, count - 1, 12]])
    with torch.no_grad():
        expected = hf(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(model(ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_dtype_means_the_weights_too(tmp_path):
    make_hf("opt-125m").save_pretrained(tmp_path / "hf")
    hf = transformers.OPTForCausalLM.from_pretrained(tmp_path / "hf", dtype="bfloat16", attn_implementation="eager")
    model = OPTForCausalLM.from_pretrained(tmp_path / "hf", dtype="bfloat16")
    assert model.get_input_embeddings().embedding.get_value().dtype == jnp.bfloat16
    assert hf.get_input_embeddings().weight.dtype == torch.bfloat16
    weight = hf.model.decoder.layers[0].fc1.weight.detach().float().numpy()
    assert (
        np.asarray(named_parameters(model)["model.decoder.layers.0.fc1.kernel"].get_value(), np.float32).T == weight
    ).all()
    with pytest.raises(ValueError, match="torch.bfloat16 is not a dtype for models"):
        OPTForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)


def test_labels_by_name(tmp_path):
    make_hf("opt-125m").save_pretrained(tmp_path / "hf")
    options: Any = dict(id2label={0: "bad", 1: "fair", 2: "good"}, label2id={"bad": 0, "fair": 1, "good": 2})
    hf = transformers.OPTForSequenceClassification.from_pretrained(tmp_path / "hf", **options)
    model = OPTForSequenceClassification.from_pretrained(tmp_path / "hf", **options)
    model.save_pretrained(tmp_path / "ours", safe_serialization=True)
    loaded = transformers.OPTForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert model.config.num_labels == hf.config.num_labels == 3
    assert loaded.config.id2label == hf.config.id2label and loaded.config.label2id == hf.config.label2id
