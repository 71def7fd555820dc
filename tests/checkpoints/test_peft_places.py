"""Where adapters of PEFT come from: the hub, a bucket, wrapped training code; and several processes that merge one."""

import json
import sys
import warnings

import huggingface_hub
import numpy as np
import pytest
from etils import epath
from huggingface_hub import constants
from support import gcs_server
from support.conversions import assert_same, convert, load_hf_names, refused
from support.hf_files import TINY, hf_weights, write_hf
from support.hub_server import COMMIT, HubServer, Repository
from support.peft_files import PREFIX, pairs, write
from support.processes import free_address, outcomes, start

import opt_jax
from convert.__main__ import main
from opt_jax import named_parameters


@pytest.fixture
def base(tmp_path):
    return write_hf(tmp_path / "base", TINY, hf_weights(TINY))


@pytest.fixture
def merged(tmp_path, base):
    """The names and arrays of the base with `pairs()` merged in."""
    return load_hf_names(convert(base, tmp_path / "merged", "--adapter", str(write(tmp_path / "adapter", pairs()))))


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def assert_equal_models(model, other):
    for path, param in named_parameters(other).items():
        np.testing.assert_array_equal(named_parameters(model)[path].get_value(), param.get_value(), err_msg=path)


# The hub --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    with HubServer() as server:
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        huggingface_hub.close_session()
        yield server
    huggingface_hub.close_session()


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_an_adapter_comes_from_the_hub(tmp_path, base, merged, server, form):
    files = contents(write(tmp_path / "other", pairs(), form, base_model_name_or_path="somebody/base")) | {
        "README.md": b"r",
        "optimizer.bin": b"o",
    }
    adapter = server.repositories["me/adapter"] = Repository(files)
    server.repositories["somebody/base"] = Repository(contents(base))
    cache, load = tmp_path / "cache", opt_jax.OPTForCausalLM.from_pretrained
    model = load("somebody/base", adapter="me/adapter", cache_dir=cache)
    assert {each.file for each in adapter.asked} == files.keys() - {"README.md", "optimizer.bin"}
    adapter.asked.clear()
    assert_equal_models(model, load(tmp_path / "merged"))
    load(base, adapter="me/adapter", cache_dir=cache, local_files_only=True)
    options = ["--adapter", "me/adapter", "--cache-dir", str(cache), "--offline"]
    assert_same(load_hf_names(convert(base, tmp_path / "out", *options)), merged)
    assert main(["verify", str(tmp_path / "out"), "--against", str(base), *options]) == 0
    assert not adapter.asked
    folder = cache / "models--me--adapter" / "snapshots" / COMMIT
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", f"adapter_model.{form}"]


def test_an_adapter_that_the_hub_does_not_have(tmp_path, base, server, capsys):
    files = contents(write(tmp_path / "adapter", pairs()))
    server.repositories["me/base"] = Repository(contents(base))
    server.repositories["me/adapter"] = Repository(files)
    server.repositories["me/half"] = Repository({"adapter_config.json": files["adapter_config.json"]})
    options = ["--cache-dir", str(tmp_path / "cache"), "--adapter"]
    (tmp_path / "cache").mkdir()
    for name, message in {
        "me/nothing": "no directory me/nothing, and no repository me/nothing",
        "me/half": "me/half at http.* has no weights: none of adapter_model.safetensors, adapter_model.bin",
        "me/base": "me/base at http.* has no weights: none of adapter_model.safetensors, adapter_model.bin",
        "not/a/name": "no PEFT adapter at not/a/name: no such directory",
        str(base / "config.json"): "config.json is a file; give the directory that it is in",
    }.items():
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            opt_jax.OPTForCausalLM.from_pretrained(base, adapter=name, cache_dir=tmp_path / "cache")
        refused(capsys, base, tmp_path / "out", *options, name)
    line = refused(capsys, base, tmp_path / "out", *options, str(tmp_path / "adapter"))
    assert "--cache-dir and --offline are for hub ids" in line
    with pytest.raises(FileNotFoundError, match="it is a PEFT adapter: give its base as the model"):
        opt_jax.OPTForCausalLM.from_pretrained("me/adapter", cache_dir=tmp_path / "cache")


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "of, to, note",
    [
        ("", "module.", "'module.' in"),
        ("", "module._orig_mod.", "'module.', '_orig_mod.' in"),
        (PREFIX, f"{PREFIX}_orig_mod.", "'_orig_mod.' in"),
        (".self_attn.", "._fsdp_wrapped_module.self_attn.", "'_fsdp_wrapped_module.' in"),
    ],
)
def test_wrappers_in_names_are_left_out(tmp_path, base, merged, of, to, note, capsys):
    adapter = write(tmp_path / "wrapped", {name.replace(of, to, 1): array for name, array in pairs().items()})
    note = f"wrapped/adapter_model.safetensors: left out: {note} the names of its tensors"
    capsys.readouterr()
    with warnings.catch_warnings(action="always"):
        convert(base, tmp_path / "out", "--adapter", str(adapter), "--quiet")
    assert capsys.readouterr().err == f"warning: {tmp_path}/{note}\n"
    assert_same(load_hf_names(tmp_path / "out"), merged)
    with pytest.warns(UserWarning, match=note):
        model = opt_jax.OPTForCausalLM.from_pretrained(base, adapter=adapter)
    assert_equal_models(model, opt_jax.OPTForCausalLM.from_pretrained(tmp_path / "merged"))


# A bucket -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_base_and_adapter_in_a_bucket(tmp_path, base, merged, monkeypatch, capsys):
    with gcs_server.serve() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        assert main([str(base), "gs://bucket/base"]) == 0
        for form in ("safetensors", "bin"):
            for name, content in contents(write(tmp_path / form, pairs(), form)).items():
                epath.Path("gs://bucket", form, name).write_bytes(content)
        options = ["--adapter", "gs://bucket/safetensors"]
        assert_same(load_hf_names(convert("gs://bucket/base", tmp_path / "out", *options)), merged)
        assert main(["verify", str(tmp_path / "out"), "--against", "gs://bucket/base", *options]) == 0
        load = opt_jax.OPTForCausalLM.from_pretrained
        assert_equal_models(load("gs://bucket/base", adapter="gs://bucket/bin"), load(tmp_path / "out"))
        epath.Path("gs://bucket/half/adapter_config.json").write_text(json.dumps(dict(peft_type="LORA")))
        for name, message in (("none", "no PEFT adapter at gs://bucket/none"), ("half", "half has no weights")):
            assert message in refused(capsys, base, tmp_path / "out2", "--adapter", f"gs://bucket/{name}")


# Several processes ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_several_processes_merge_an_adapter(tmp_path, base, merged):
    job = ["--coordinator-address", free_address(), "--num-processes", "2", "--process-id"]
    code = (
        "import sys; from convert.__main__ import main; from opt_jax.checkpoints import chunks\n"
        "chunks.CHUNK_BYTES = 64\n"  # each matrix in pieces, of which each process merges some
        "sys.exit(main(sys.argv[1:]))"
    )
    words = ["-c", code, str(base), str(tmp_path / "out"), "--adapter", str(tmp_path / "adapter"), *job]
    for code, _, error in outcomes([start([sys.executable, *words, str(i)]) for i in range(2)]):
        assert code == 0, error
    assert_same(load_hf_names(tmp_path / "out"), merged)
