"""metaseq checkpoints in every form, written without torch, give back the weights that they were written from."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.conversions import assert_same
from support.hf_files import VARIANTS, hf_weights, tensor_pickle, torch_zip
from support.metaseq_files import contents, namespace, settings, write

from convert import metaseq
from convert.checkpoint import Checkpoint
from opt_jax import OPTConfig
from opt_jax.checkpoints.formats import names

# CONFIG: sizes that do not divide over four shards of three parts. WIDE: sizes for more than ten parts.
CONFIG = VARIANTS["125m"] | dict(vocab_size=51, hidden_size=18, ffn_dim=51, word_embed_proj_dim=18)
WIDE = VARIANTS["125m"] | dict(vocab_size=66, hidden_size=33, ffn_dim=55, word_embed_proj_dim=33, num_attention_heads=3)
CFG = {"model": namespace(settings(CONFIG))}


def given(config: dict = CONFIG) -> OPTConfig:
    return OPTConfig.from_hf(config)


def load(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """HF name -> array in HF's orientation."""
    weights = {}
    for path, array in checkpoint.arrays.items():
        name, transposed = names.to_hf(path)
        weights[name] = array.load().T if transposed else array.load()
    return weights


FORMS = {
    "one-file": dict(),
    "one-file-separate": dict(fused=False),
    "parts": dict(parts=3),
    "parts-separate": dict(parts=3, fused=False),
    "many-parts": dict(parts=11),
    "one-shard-of-each-part": dict(parts=3, shards=1, flat=True),
    "shards": dict(shards=5, flat=True),
    "parts-and-shards": dict(parts=3, shards=4, flat=True),
    "parts-and-shards-separate": dict(parts=3, shards=4, flat=True, fused=False),
    "many-parts-and-shards": dict(parts=11, shards=12, flat=True),
    "flat-file-without-metadata": dict(flat=True, metadata=False),
    "flat-parts-without-metadata": dict(parts=3, flat=True, metadata=False),
    "parts-and-shards-without-metadata": dict(parts=3, shards=4, flat=True, metadata=False),
    "more-shards-than-some-need": dict(parts=3, shards=70, flat=True, metadata=False),
}


@pytest.mark.combinations
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_weights_back(tmp_path, form, dtype):
    config = WIDE if form.startswith("many") else CONFIG
    weights = hf_weights(config, dtype=dtype)
    cfg = {"model": namespace(settings(config))}
    files = write(tmp_path, contents(weights, cfg=cfg, **FORMS[form]))
    opened = metaseq.open_checkpoint(files, config=given(config))
    assert_same(load(opened), weights)
    assert opened.config == given(config)
    assert opened.raw_config["architectures"] == ["OPTForCausalLM"]
    assert dtype in (opened.raw_config.get("dtype"), opened.raw_config.get("torch_dtype"))
    assert opened.companions == (tmp_path,)
    assert opened.where == (tmp_path if len(list(tmp_path.iterdir())) > 1 else tmp_path / "reshard.pt")


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_and_their_config(tmp_path, variant):
    config = VARIANTS[variant]
    weights = hf_weights(config)
    changes = {"share_decoder_input_output_embed": variant != "untied"}
    if variant == "no-final-norm":
        changes["no_decoder_final_norm"] = True
    if variant == "galactica":
        changes["activation_fn"] = "gelu"
    values = settings(config, **changes)
    renamed = {n.replace("lm_head.", "model.decoder.output_projection."): a for n, a in weights.items()}
    files = write(tmp_path, contents(renamed, fused=False, cfg={"model": values}))
    assert_same(load(metaseq.open_checkpoint(files, config=given(config))), weights)
    if variant != "galactica":
        opened = metaseq.open_checkpoint(files, config=None)
        assert replace(opened.config, extra={}) == replace(given(config), extra={})
        assert_same(load(opened), weights)


def test_flat_without_metadata_and_without_a_unit_per_layer(tmp_path):
    """FSDP leaves small layers in the root unit, in the order of the modules."""
    weights = hf_weights(CONFIG)
    files = contents(weights, flat=True, metadata=False)
    model = files["reshard.pt"]["model"]
    root = model.pop("flat_param_0")
    end = sum(weights[f"model.decoder.embed_{kind}.weight"].size for kind in ("tokens", "positions"))
    layers = [model.pop(f"decoder.layers.{i}.flat_param_0") for i in range(2)]
    model["flat_param_0"] = np.concatenate([root[:end], *layers, root[end:]])
    assert_same(load(metaseq.open_checkpoint(write(tmp_path, files), config=given())), weights)


def test_stale_metadata_of_whole_tensors_are_ignored(tmp_path):
    files = contents(hf_weights(CONFIG), parts=3)
    for content in files.values():
        content["shard_metadata"] = {"param_metadata": [{"stale": True}]}
    assert_same(load(metaseq.open_checkpoint(write(tmp_path, files), config=given())), hf_weights(CONFIG))


def test_a_bare_state_dict(tmp_path):
    """What metaseq's convert_to_singleton writes."""
    model = contents(hf_weights(CONFIG), fused=False)["reshard.pt"]["model"]
    files = write(tmp_path, {"restored.pt": model})
    assert_same(load(metaseq.open_checkpoint(files, config=given())), hf_weights(CONFIG))


# Files ------------------------------------------------------------------------------------------------------


def test_find_files(tmp_path, monkeypatch):
    for name in ("reshard-model_part-0.pt", "reshard-model_part-1.pt", "dict.txt", "[odd].pt"):
        (tmp_path / name).touch()
    parts = [tmp_path / f"reshard-model_part-{i}.pt" for i in range(2)]
    assert metaseq.find_files([str(tmp_path / "reshard-*.pt")]) == parts
    assert metaseq.find_files([str(path) for path in parts]) == parts
    assert metaseq.find_files([str(tmp_path / "[odd].pt")]) == [tmp_path / "[odd].pt"]
    assert set(metaseq.find_files([str(tmp_path)])) == {*parts, tmp_path / "[odd].pt"}
    monkeypatch.chdir(tmp_path)
    assert metaseq.find_files(["reshard-model_part-?.pt"]) == [Path(path.name) for path in parts]
    (tmp_path / "empty").mkdir()
    for pattern, message in (("absent-*.pt", "is not there"), ("absent.pt", "is not there"), ("empty", "no .pt files")):
        with pytest.raises(FileNotFoundError, match=f"{pattern.replace('*', '.')} .*{message}"):
            metaseq.find_files([str(parts[0]), pattern])


def test_names_of_released_files(tmp_path):
    files = contents(hf_weights(CONFIG), parts=3, cfg=CFG)
    renamed = {name.replace("reshard", "checkpoint_1_4000.pt"): content for name, content in files.items()}
    assert_same(load(metaseq.open_checkpoint(write(tmp_path, renamed), config=None)), hf_weights(CONFIG))


def rename(files: dict, old: str, new: str) -> None:
    assert old in files
    files[new] = files.pop(old)


LAST = "reshard-model_part-2-shard3.pt"


BAD_FILES = {
    "missing-part": (lambda f: f.pop("reshard-model_part-1-shard0.pt"), "reshard-model_part-1-shard0.pt is missing"),
    "missing-shard": (lambda f: f.pop("reshard-model_part-0-shard10.pt"), "reshard-model_part-0-shard10.pt is missing"),
    "shards-differ": (
        lambda f: [f.pop(f"reshard-model_part-2-shard{i}.pt") for i in (9, 10, 11)],
        "reshard-model_part-2-shard9.pt is missing",
    ),
    "duplicate": (
        lambda f: f.update({"reshard-model_part-01-shard2.pt": f["reshard-model_part-1-shard2.pt"]}),
        "reshard-model_part-0?1-shard2.pt and .*reshard-model_part-0?1-shard2.pt are the same part",
    ),
    "another-checkpoint": (
        lambda f: rename(f, "reshard-model_part-1-shard2.pt", "checkpoint_9-model_part-1-shard2.pt"),
        "(checkpoint_9-model_part-1-shard2.pt is of another|is of another .*checkpoint_9-model_part-1-shard2.pt)",
    ),
    "merged-beside-parts": (
        lambda f: rename(f, "reshard-model_part-1-shard2.pt", "reshard.pt"),
        "(reshard.pt is of another|is of another .*reshard.pt)",
    ),
    "copied-part": (
        lambda f: f.update({name.replace("part-0", "part-1"): f[name] for name in sorted(f) if "part-0" in name}),
        "part-1-shard0.pt holds what .*part-0-shard0.pt holds, bit for bit",
    ),
    "settings": (
        lambda f: f[LAST].update(cfg={"model": namespace(settings(CONFIG, activation_fn="tanh"))}),
        "part-2-shard3.pt: activation_fn='tanh' in its settings, but 'relu' in .*part-2-shard0.pt",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_sets_of_files(tmp_path, case):
    change, message = BAD_FILES[case]
    files = contents(hf_weights(CONFIG), parts=3, shards=12, flat=True, cfg=CFG)
    change(files)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        metaseq.open_checkpoint(write(tmp_path, files), config=given()).check()


@pytest.mark.parametrize("config", [given(), None])
def test_last_parts_missing(tmp_path, config):
    files = contents(hf_weights(CONFIG), parts=3, cfg=CFG)
    del files["reshard-model_part-2.pt"]
    with pytest.raises(ValueError, match="has shape .* but the config calls for .*from 2 model parts: are they all"):
        metaseq.open_checkpoint(write(tmp_path, files), config=config)


@pytest.mark.parametrize("metadata", [True, False])
def test_last_shards_missing(tmp_path, metadata):
    files = contents(hf_weights(CONFIG), parts=3, shards=4, flat=True, metadata=metadata, cfg=CFG)
    for part in range(3):
        del files[f"reshard-model_part-{part}-shard3.pt"]
    with pytest.raises(ValueError, match="reshard-model_part-0-shard0.pt: .*flat_param_0 has .* elements in 3 files"):
        metaseq.open_checkpoint(write(tmp_path, files), config=given())


def test_another_vocabulary(tmp_path):
    files = write(tmp_path, contents(hf_weights(CONFIG), parts=3))
    with pytest.raises(
        ValueError, match=r"embed_tokens.weight has shape \(51, 18\), but the config calls for \(48, 18\)"
    ):
        metaseq.open_checkpoint(files, config=given(CONFIG | {"vocab_size": 48}))


def test_no_files():
    with pytest.raises(ValueError, match="no metaseq files"):
        metaseq.open_checkpoint([], config=given())


# Reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["one-file", "parts", "shards", "parts-and-shards", "many-parts-and-shards"])
def test_parts_of_arrays(tmp_path, form):
    config = WIDE if form.startswith("many") else CONFIG
    opened = metaseq.open_checkpoint(write(tmp_path, contents(hf_weights(config), **FORMS[form])), config=given(config))
    rng = np.random.default_rng(0)
    for array in opened.arrays.values():
        loaded = array.load()
        for _ in range(12):
            index = tuple(slice(*sorted(rng.integers(0, n + 1, 2))) for n in array.shape)
            np.testing.assert_array_equal(array.load(index), loaded[index], strict=True)


def test_reading_takes_the_bytes_it_needs_and_leaves_nothing_open(tmp_path, monkeypatch):
    config = CONFIG | dict(vocab_size=3 * 4096)
    weights = hf_weights(config)
    files = write(tmp_path, contents(weights, parts=3, shards=4, flat=True))
    opened = metaseq.open_checkpoint(files, config=given(config))
    if Path("/proc/self/fd").exists():
        links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        assert not [link for link in links if link.startswith(str(tmp_path))]
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    taken: list[int] = []
    real = os.preadv

    def spy(fd, buffers, offset):
        taken.append(real(fd, buffers, offset))
        return taken[-1]

    monkeypatch.setattr("opt_jax.checkpoints.formats.stored.os.preadv", spy)
    embedding = opened.arrays["model.decoder.embed_tokens.embedding"]
    rows = slice(5000, 5100)  # in the second part
    np.testing.assert_array_equal(
        embedding.load((rows, slice(0, 18))), weights["model.decoder.embed_tokens.weight"][rows], strict=True
    )
    assert sum(taken) == 100 * 18 * 4 and len(taken) <= 2
    taken.clear()
    opened.arrays["model.decoder.layers.0.fc1.bias"].load((slice(0, 16),))  # all in the first part
    assert sum(taken) == 16 * 4 and len(taken) <= 2


def test_only_the_shards_needed_are_read(tmp_path):
    weights = hf_weights(CONFIG)
    files = write(tmp_path, contents(weights, shards=100, flat=True))  # of 13 elements in the root unit
    embedding = metaseq.open_checkpoint(files, config=given()).arrays["model.decoder.embed_tokens.embedding"]
    row = weights["model.decoder.embed_tokens.weight"][21:22]  # elements 378 to 395: 12 in shard 29, 6 in shard 30
    for i in {*range(100)} - {29, 30}:
        (tmp_path / f"reshard-shard{i}.pt").unlink()
    np.testing.assert_array_equal(embedding.load((slice(21, 22), slice(0, 18))), row, strict=True)
    (tmp_path / "reshard-shard30.pt").rename(tmp_path / "away")
    np.testing.assert_array_equal(embedding.load((slice(21, 22), slice(3, 12))), row[:, 3:12], strict=True)
    with pytest.raises(FileNotFoundError, match="reshard-shard30.pt"):
        embedding.load((slice(21, 22), slice(3, 13)))
    (tmp_path / "away").rename(tmp_path / "reshard-shard30.pt")
    (tmp_path / "reshard-shard29.pt").unlink()
    np.testing.assert_array_equal(embedding.load((slice(21, 22), slice(12, 17))), row[:, 12:17], strict=True)


def test_only_the_parts_needed_are_read(tmp_path):
    weights = hf_weights(CONFIG)
    files = write(tmp_path, contents(weights, parts=3))
    opened = metaseq.open_checkpoint(files, config=given())
    for i in (0, 2):
        (tmp_path / f"reshard-model_part-{i}.pt").unlink()
    fc2 = opened.arrays["model.decoder.layers.1.fc2.kernel"]  # [51, 18]: rows 17..33 are in the second part
    expected = weights["model.decoder.layers.1.fc2.weight"].T
    np.testing.assert_array_equal(fc2.load((slice(17, 34), slice(3, 9))), expected[17:34, 3:9], strict=True)
    with pytest.raises(FileNotFoundError, match="reshard-model_part-2.pt"):
        fc2.load((slice(17, 35), slice(3, 9)))


def test_a_file_that_shrinks_after_opening(tmp_path):
    files = write(tmp_path, contents(hf_weights(CONFIG)))
    opened = metaseq.open_checkpoint(files, config=given())
    os.truncate(files[0], 100)
    with pytest.raises(ValueError, match="reshard.pt is shorter than it was when it was opened"):
        opened.arrays["model.decoder.layers.1.fc2.kernel"].load()


def test_tensors_that_are_views(tmp_path):
    """Views of one storage, transposed or with an offset, as torch saves them."""
    weights = hf_weights(CONFIG)
    model = contents(weights, fused=False)["reshard.pt"]["model"]
    pool = np.concatenate([np.asfortranarray(a).ravel(order="K") for a in model.values()])
    pickled, start = b"\x80\x02}(", 0
    for name, array in model.items():
        strides = [1, array.shape[0]][: array.ndim]
        key = b"X" + len(name).to_bytes(4, "little") + name.encode()
        pickled += key + tensor_pickle("pool", "float32", pool.size, start, array.shape, strides)
        start += array.size
    torch_zip(tmp_path / "reshard.pt", pickled + b"u.", {"pool": pool.tobytes()})
    assert_same(load(metaseq.open_checkpoint([tmp_path / "reshard.pt"], config=given())), weights)
