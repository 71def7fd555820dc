"""metaseq checkpoints whose parts and shards do not fit together are refused, with the file and the tensor."""

import struct

import numpy as np
import pytest
from support.conversions import assert_same
from support.hf_files import hf_weights
from support.metaseq_files import Foreign, contents, write
from test_metaseq import CFG, CONFIG, LAST, given, load

from convert import metaseq
from opt_jax.checkpoints.formats import unpickle

FLAT = "decoder.layers.1.flat_param_0"
PART = "reshard-model_part-2.pt"


def edit(key: str, change):
    """Change one tensor of the last file."""

    def apply(files):
        model = files[max(files)]["model"]
        model[key] = change(model[key].copy())

    return apply


def replace_rows(array):
    array[1] += 1
    return array


BAD_CONTENTS = {
    # whole tensors in three parts
    "norm": (False, edit("decoder.layers.0.fc2.bias", replace_rows), f"{PART}: tensor .*fc2.bias differs .*at \\[1\\]"),
    "positions": (False, edit("decoder.embed_positions.weight", replace_rows), f"{PART}: .*positions.* differs"),
    "dtype": (False, edit("decoder.layers.0.fc1.bias", np.float16), f"{PART}: .*fc1.bias .*float16.* cannot be joined"),
    "widths": (False, edit("decoder.layers.0.fc1.weight", lambda a: a[:, 1:]), f"{PART}: .*fc1.weight .* cannot be"),
    "shape": (False, edit("decoder.layers.0.fc1.weight", lambda a: a[1:]), "fc1.weight has shape .50, 18.*3 model par"),
    "thirds": (
        False,
        edit("decoder.layers.0.self_attn.qkv_proj.bias", lambda a: a[1:]),
        f"{PART}: .*qkv_proj.bias has shape .17,",
    ),
    "lacks": (
        False,
        lambda f: f[PART]["model"].pop("decoder.layer_norm.bias"),
        f"{PART}: .*layer_norm.bias is missing",
    ),
    "all-lack": (
        False,
        lambda f: [content["model"].pop("decoder.layer_norm.bias") for content in f.values()],
        "decoder.final_layer_norm.bias is missing",
    ),
    "left-over": (
        False,
        lambda f: [content["model"].update({"decoder.layers.0.fc3.bias": np.ones(2, "f")}) for content in f.values()],
        "decoder.layers.0.fc3.bias is left over",
    ),
    "no-tensor": (False, lambda f: f[PART]["model"].update({"x": 3}), f"{PART}: entry 'x' is a int"),
    "no-model": (False, lambda f: f[PART].update(model=3), f"{PART} holds no model"),
    "head": (
        False,
        lambda f: [
            content["model"].update(
                {"decoder.output_projection.weight": content["model"]["decoder.embed_tokens.weight"] + i}
            )
            for i, content in enumerate(f.values())
        ],
        "reshard-model_part-1.pt: tensor decoder.output_projection.weight differs",
    ),
    # flat ones in three parts of four shards
    "flat-size": (True, edit(FLAT, lambda a: a[1:]), "reshard-model_part-2-shard0.pt: .*layers.1.flat_param_0 has"),
    "flat-missing": (True, lambda f: f[LAST]["model"].pop(FLAT), f"{LAST}: tensor {FLAT} is in it or in"),
    "flat-dtype": (True, edit(FLAT, np.float16), "part-2-shard0.pt: .*flat_param_0 is not one-dim.* one dtype"),
    "flat-rank": (True, edit(FLAT, lambda a: a[None]), "part-2-shard0.pt: .*flat_param_0 is not one-dimensional"),
    "buffer": (True, edit("decoder.version", lambda a: a + 1), f"{LAST}: tensor decoder.version differs"),
}


@pytest.mark.slow
@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("case", BAD_CONTENTS)
def test_bad_contents(tmp_path, case, metadata):
    flat, change, message = BAD_CONTENTS[case]
    files = contents(hf_weights(CONFIG), parts=3, shards=4 if flat else None, flat=flat, metadata=metadata, cfg=CFG)
    change(files)
    with pytest.raises(ValueError, match=message):
        metaseq.open_checkpoint(write(tmp_path, files), config=given()).check()


def test_the_same_head_in_every_part_is_dropped(tmp_path):
    files = contents(hf_weights(CONFIG), parts=3)
    for content in files.values():
        content["model"]["decoder.output_projection.weight"] = content["model"]["decoder.embed_tokens.weight"].copy()
    assert_same(load(metaseq.open_checkpoint(write(tmp_path, files), config=given())), hf_weights(CONFIG))


def info(files: dict, name: str = LAST) -> dict:
    return files[name]["shard_metadata"]["param_metadata"][2]


BAD_METADATA = {
    "padding": (
        lambda f: info(f)["params"]["flat_param_0"].update(padding=0),
        "part-2-shard0.pt: .* is a shard missing",
    ),
    "all-padding": (lambda f: info(f)["params"]["flat_param_0"].update(padding=10**9), "part-2-shard0.pt: .* take"),
    "negative": (lambda f: info(f)["params"]["flat_param_0"].update(padding=-1), f"{LAST}: .*metadata are malformed"),
    "numels": (lambda f: info(f)["params"]["flat_param_0"]["numels"].append(1), f"{LAST}: .*metadata are malformed"),
    "keys": (lambda f: info(f).pop("fsdp_path"), f"{LAST}: .*metadata are malformed"),
    "another": (lambda f: info(f).update(fsdp_path="decoder.layers.7"), f"{LAST}: its shard_metadata are not those"),
    "twice": (
        lambda f: [info(f, name).update(fsdp_path="decoder.layers.0") for name in f],
        "layers.1.flat_param_0 is in its model or in its shard_metadata, but not in both",
    ),
    "no-entry": (
        lambda f: [f[name]["shard_metadata"]["param_metadata"].pop() for name in f],
        "layers.1.flat_param_0 is in its model or in its shard_metadata, but not in both",
    ),
    "one-file-without": (lambda f: f[LAST].pop("shard_metadata"), f"{LAST}: its shard_metadata are not those"),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_bad_metadata(tmp_path, case):
    change, message = BAD_METADATA[case]
    files = contents(hf_weights(CONFIG), parts=3, shards=4, flat=True, cfg=CFG)
    change(files)
    with pytest.raises(ValueError, match=message):
        metaseq.open_checkpoint(write(tmp_path, files), config=given())


BAD_LAYOUTS = {
    "another-size": (dict(ffn_dim=49 * 3), dict(parts=3), "flat_param_0 has .* its config: is it another model's"),
    "layers": (dict(num_hidden_layers=3), dict(parts=3), "tensors take, according to its config"),
    "parts": (dict(ffn_dim=50), dict(parts=3), "ffn_dim=50 is not divisible by the 3 model parts"),
    "350m": (dict(word_embed_proj_dim=12), dict(), "order is not known for this config"),
    "post-norm": (dict(do_layer_norm_before=False), dict(), "order is not known for this config"),
}


@pytest.mark.parametrize("case", BAD_LAYOUTS)
def test_layouts_that_do_not_fit(tmp_path, case):
    changes, form, message = BAD_LAYOUTS[case]
    files = write(tmp_path, contents(hf_weights(CONFIG), flat=True, metadata=False, **form))
    with pytest.raises(ValueError, match=message):
        metaseq.open_checkpoint(files, config=given(CONFIG | changes))


def test_shards_whose_pickles_differ_in_times_are_unpickled_once(tmp_path, monkeypatch):
    """The last shards have padding, so their pickles differ in more."""
    weights, shards = hf_weights(CONFIG), 12
    files = contents(weights, 3, shards, flat=True, cfg=CFG)
    paddings = []
    for i, content in enumerate(files.values()):
        content["extra_state"] = {"time": 0.5 + i, "state": Foreign("metaseq.logging.meters TimeMeter", state=1.5 * i)}
        units = content["shard_metadata"]["param_metadata"]
        paddings.append([unit["params"]["flat_param_0"]["padding"] for unit in units])
    new = [i for i in range(len(files)) if i % shards == 0 or paddings[i] != paddings[i - 1]]
    assert 3 < len(new) < len(files) / 2
    run, pickles = unpickle._Machine.run, []
    monkeypatch.setattr(unpickle._Machine, "run", lambda self, data: pickles.append(data) or run(self, data))
    opened = metaseq.open_checkpoint(write(tmp_path / "metaseq", files), config=given())
    assert len(pickles) == len(new)
    assert_same(load(opened), weights)


def test_pickles_that_differ_in_floats_only():
    pickle = b"\x80\x02]q\0(G" + struct.pack(">d", 0.5) + b"K\7G" + struct.pack(">d", 2.0) + b"X\1\0\0\0Ge."
    floats: list[int] = []
    assert unpickle.loads(pickle, str, floats) == [0.5, 7, 2.0, "G"] and floats == [7, 18]
    for i in range(len(pickle)):
        other = pickle[:i] + bytes([pickle[i] ^ 1]) + pickle[i + 1 :]
        assert unpickle.differ_in_floats(pickle, other, floats) == (7 <= i < 15 or 18 <= i < 26), i
    assert unpickle.differ_in_floats(pickle, pickle, floats) and unpickle.differ_in_floats(b".", b".", [])
    assert not unpickle.differ_in_floats(pickle, pickle + b".", floats)


def test_whole_tensors_in_several_shards(tmp_path):
    files = contents(hf_weights(CONFIG), shards=2)
    with pytest.raises(ValueError, match="reshard-shard1.pt: its tensors are whole"):
        metaseq.open_checkpoint(write(tmp_path, files), config=given())


@pytest.mark.parametrize("name", ["os system", "builtins eval", "builtins getattr", "torch.storage _load_from_bytes"])
def test_pickles_that_ask_for_more(tmp_path, name):
    files = contents(hf_weights(CONFIG), extra_state={"x": Foreign(name, ("touch gotcha",))})
    with pytest.raises(ValueError, match=f"reshard.pt: refused, .* asks for {name.replace(' ', '.')}"):
        metaseq.open_checkpoint(write(tmp_path, files), config=given())
