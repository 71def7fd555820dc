"""metaseq checkpoints with foreign objects, written by torch.save and converted to Orbax, give PyTorch's logits."""

import sys
import types
from argparse import Namespace
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
from limits import assert_close
from oracle import make_hf, torch
from reference import CONFIGS, batch
from support.metaseq_files import Foreign, contents, settings

import opt_jax
from convert import metaseq, to_orbax
from opt_jax import OPTConfig
from opt_jax.model.inputs import check_inputs


@contextmanager
def foreign_modules():
    """Define the classes whose objects such files hold. Afterwards their modules cannot be imported."""
    modules: dict[str, types.ModuleType] = {}

    def define(name: str, *bases: type) -> type:
        module, _, short = name.rpartition(".")
        parts = module.split(".")
        for path in (".".join(parts[: i + 1]) for i in range(len(parts))):
            modules[path] = sys.modules.setdefault(path, types.ModuleType(path))
        cls = type(short, bases or (object,), {"__module__": module})
        setattr(modules[module], short, cls)
        return cls

    try:
        yield define
    finally:
        for name in modules:
            del sys.modules[name]


def save(directory: Path, files: dict, values: dict, style: str) -> list[Path]:
    """Write the files of `metaseq_files.contents` by torch.save, with the settings as objects."""
    directory.mkdir()
    with foreign_modules() as define:
        meter = define("metaseq.logging.meters.AverageMeter")()
        meter.__dict__.update(val=np.float32(1.5), count=np.int64(3), history=np.arange(3), when=(1, 2.5, None))
        scaler = define("fairscale.optim.grad_scaler.ShardedGradScaler")()
        scaler.__dict__.update(device=torch.device("cpu"), dtype=torch.float16, kinds={int, str}, path=Path("/x"))
        choice = Enum("Choices", {"relu": "relu"}, module="metaseq.dataclass.constants")
        define("metaseq.dataclass.constants.Other")
        sys.modules["metaseq.dataclass.constants"].Choices = choice  # type: ignore[attr-defined]
        values = values | {"activation_fn": choice.relu} if values["activation_fn"] == "relu" else values
        if style == "omegaconf":
            cfg = omega(define, {"model": values, "common": {"model_parallel_size": 3}})
        else:
            cfg = {"model": Namespace(**values), "common": {"fp16": True}} if style == "namespace" else None
        for name, content in files.items():
            content = {key: to_torch(value) for key, value in content.items()}
            content["extra_state"] = {"meter": meter, "scaler": scaler, "train_iterator": {"epoch": 1}}
            content |= {"cfg": cfg, "args": Namespace(**values) if style == "args" else None}
            torch.save(content, directory / name)
    assert "metaseq" not in sys.modules and "omegaconf" not in sys.modules
    return [directory / name for name in files]


def omega(define, values: dict):
    """The objects that pickle writes for omegaconf's DictConfig."""
    node_class = define("omegaconf.nodes.AnyNode")
    config_class = define("omegaconf.dictconfig.DictConfig")
    metadata_class = define("omegaconf.base.ContainerMetadata")

    def wrap(value, parent):
        node = (config_class if isinstance(value, dict) else node_class)()
        metadata = metadata_class()
        metadata.__dict__.update(ref_type=dict, object_type=dict, optional=True, key=None, flags={})
        node.__dict__.update(_metadata=metadata, _parent=parent)
        if isinstance(value, dict):
            node.__dict__["_content"] = {key: wrap(inner, node) for key, inner in value.items()}
        else:
            node.__dict__["_val"] = value
        return node

    return wrap(values, None)


def to_torch(value):
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {key: to_torch(inner) for key, inner in value.items() if not isinstance(inner, Foreign)}
    return value


CASES = {
    "one-file": ("opt-125m", dict(), "namespace"),
    "parts": ("opt-125m", dict(parts=3), "omegaconf"),
    "parts-and-shards": ("opt-125m", dict(parts=3, shards=4, flat=True), "omegaconf"),
    "shards": ("opt-125m", dict(shards=4, flat=True), "args"),
    "without-metadata": ("opt-125m", dict(parts=3, flat=True, metadata=False), "none"),
    "shards-without-metadata": ("opt-125m", dict(parts=3, shards=4, flat=True, metadata=False), "namespace"),
    "350m": ("opt-350m", dict(fused=False), "args"),
    "galactica": ("galactica", dict(parts=3, shards=4, flat=True), "namespace"),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_pytorch(tmp_path, case):
    name, form, style = CASES[case]
    hf = make_hf(name, vocab_size=102, num_hidden_layers=2)  # sizes that divide by three
    if name != "opt-350m":
        hf = make_hf(name, vocab_size=102, num_hidden_layers=2, ffn_dim=51)
    weights = {n: p.detach().numpy() for n, p in hf.named_parameters() if not n.startswith("lm_head")}
    config = OPTConfig.from_hf(hf.config.to_dict())
    values = settings(config.to_hf(), activation_fn="relu" if name != "galactica" else "gelu")
    files = save(tmp_path / "source", contents(weights, **form), values, style)
    know = style == "none" or name == "galactica" or form.get("metadata") is False
    opened = metaseq.open_checkpoint(files, config=config if know else None)
    to_orbax.convert(opened, tmp_path / "out")
    inputs = {key: value for key, value in batch(name, "left").items() if key != "labels"}
    with torch.no_grad():
        expected = hf(**{key: torch.from_numpy(value).long() for key, value in inputs.items()}).logits.numpy()
    model = opt_jax.OPTForCausalLM.from_pretrained(tmp_path / "out")
    got = np.asarray(model.forward(**check_inputs(model, inputs)).logits)  # not compiled
    real = inputs["attention_mask"] == 1
    assert_close(got[real], expected[real], atol=1e-4 * np.abs(expected).max(), what="logits")


def test_views_of_one_storage(tmp_path):
    """metaseq's reshard_fsdp writes the tensors of a unit as views of one storage."""
    hf = make_hf("opt-125m")
    weights = {n: p.detach().numpy() for n, p in hf.named_parameters()}
    model = contents(weights)["reshard.pt"]["model"]
    pool = torch.from_numpy(np.concatenate([array.ravel() for array in model.values()]))
    pieces = pool.split([array.size for array in model.values()])
    views = {name: piece.view(model[name].shape) for name, piece in zip(model, pieces, strict=True)}
    torch.save({"model": views}, tmp_path / "reshard.pt")
    opened = metaseq.open_checkpoint([tmp_path / "reshard.pt"], config=CONFIGS["opt-125m"])
    query = opened.arrays["model.decoder.layers.2.self_attn.q_proj.kernel"].load()
    np.testing.assert_array_equal(query.T, weights["model.decoder.layers.2.self_attn.q_proj.weight"], strict=True)
