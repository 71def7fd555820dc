"""`to-hf` writes the files that save_pretrained writes, and `transformers` loads them without a warning."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest
from oracle import make_hf, torch, transformers
from reference import CLASSES, SMALL, batch

from convert import to_hf, to_orbax
from convert.source import open_directory


def main_outputs(out) -> list:
    return [out[key] for key in ("logits", "start_logits", "end_logits", "last_hidden_state") if key in out]


def saved(hf, directory: Path, max_shard_size: str) -> Path:
    hf.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def through_orbax(source: Path, tmp_path: Path, max_shard_size: str) -> Path:
    to_orbax.convert(open_directory(source), tmp_path / "orbax")
    to_hf.convert(open_directory(tmp_path / "orbax"), tmp_path / "back", max_shard_size=max_shard_size)
    return tmp_path / "back"


CASES = [(name, cls, jnp.float32) for name in (*SMALL, "no-final-norm") for cls in CLASSES]
CASES += [("opt-350m", "OPTForCausalLM", dtype) for dtype in (jnp.float16, jnp.bfloat16)]


@pytest.mark.combinations
@pytest.mark.parametrize("name, cls, dtype", CASES)
def test_transformers_loads_it_and_gives_the_same_outputs(tmp_path, name, cls, dtype):
    settings = {"_remove_final_layer_norm": True} if name == "no-final-norm" else {}
    name = "opt-125m" if settings else name
    hf = make_hf(name, cls, dtype, **settings)
    back = through_orbax(saved(hf, tmp_path / "hf", "1GB"), tmp_path, "8KB")
    loaded, info = getattr(transformers, cls).from_pretrained(
        back, output_loading_info=True, attn_implementation="eager"
    )
    assert {key: value for key, value in info.items() if value} == {}  # missing, unexpected, mismatched keys, errors
    assert loaded.dtype == hf.dtype
    ours = loaded.state_dict()
    assert ours.keys() == hf.state_dict().keys()
    for key, tensor in hf.state_dict().items():
        assert torch.equal(ours[key].view(torch.uint8), tensor.view(torch.uint8)), key
    inputs = {k: torch.from_numpy(v).long() for k, v in batch(name, "left").items() if k != "labels"}
    with torch.no_grad():
        pairs = list(zip(main_outputs(hf(**inputs)), main_outputs(loaded.eval()(**inputs)), strict=True))
    assert pairs and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("size", ["8KB", "1GB"])
@pytest.mark.parametrize(
    "name, cls",
    [
        ("opt-350m", "OPTForCausalLM"),
        ("untied", "OPTForCausalLM"),
        ("opt-125m", "OPTModel"),
        ("galactica", "OPTForQuestionAnswering"),
        ("opt-125m", "OPTForSequenceClassification"),
    ],
)
def test_files_are_those_of_save_pretrained(tmp_path, name, cls, size):
    """Names, shards and tensor files are equal byte for byte, the two configurations as JSON."""
    theirs = saved(make_hf(name, cls), tmp_path / "hf", size)
    ours = through_orbax(theirs, tmp_path, size)
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())
    for file in theirs.glob("*.safetensors"):
        assert (ours / file.name).read_bytes() == file.read_bytes(), file.name
    for file in theirs.glob("*.json"):
        assert json.loads((ours / file.name).read_text()) == json.loads(file.read_text()), file.name


def test_generation_config_made_here_is_that_of_transformers(tmp_path):
    theirs = saved(make_hf("opt-125m", bos_token_id=7, eos_token_id=9, pad_token_id=5), tmp_path / "hf", "1GB")
    expected = transformers.GenerationConfig.from_pretrained(theirs)
    (theirs / "generation_config.json").unlink()
    ours = through_orbax(theirs, tmp_path, "1GB")
    loaded = transformers.GenerationConfig.from_pretrained(ours)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "_from_model_config"):
        assert getattr(loaded, key) == getattr(expected, key), key
    model = transformers.OPTForCausalLM.from_pretrained(ours)
    assert model.generate(torch.tensor([[2, 11, 12]]), max_new_tokens=3, do_sample=False).shape[1] <= 6
