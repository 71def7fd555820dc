"""Adapters that PEFT has written: the logits of its model, and the weights after its `merge_and_unload`; and back."""

import copy
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from limits import TOLERANCE, assert_close, within
from oracle import canonical_path, make_hf, torch
from reference import batch

import opt_jax
from convert.source import open_directory, open_source
from opt_jax.checkpoints.formats.peft import adapter_files
from opt_jax.model.lora import TARGETS, LoRA

peft = pytest.importorskip("peft", reason="these tests compare with PEFT")
pytestmark = [
    # Of tied embeddings, of fan_in_fan_out, of what else is saved: all on purpose.
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # by peft 0.21
]
MAIN = ("logits", "start_logits", "last_hidden_state")
Settings = dict[str, Any]


def write(directory, name: str, cls: str, dtype=jnp.float32, **settings):
    """A base and an adapter with random numbers, both saved; returns their directories."""
    base = make_hf(name, cls, dtype)
    base.save_pretrained(directory / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    random = torch.Generator().manual_seed(0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=random))
    assert trained
    model.save_pretrained(directory / "adapter")
    return directory / "base", directory / "adapter"


def reloaded(adapter, name: str, cls: str, dtype=jnp.float32):
    return peft.PeftModel.from_pretrained(make_hf(name, cls, dtype), adapter).eval()


def assert_same_outputs(theirs, ours, name: str) -> None:
    inputs = {key: value for key, value in batch(name, "right").items() if key != "labels"}
    real = inputs["attention_mask"] > 0
    with torch.no_grad():
        expected = theirs.double()(**{key: torch.from_numpy(value).long() for key, value in inputs.items()})
    ours.name_or_path = None  # models of one kind are compiled once
    got = ours(**inputs)
    key = next(key for key in MAIN if key in expected)
    a, b = np.asarray(getattr(got, key)), expected[key].numpy()
    if a.shape[:2] == real.shape:
        a, b = a[real], b[real]
    assert np.abs(b).max() > 0.1
    assert_close(a, b, atol=TOLERANCE * max(1, np.abs(b).max()))


CAUSAL, LABELS, ANSWERS = "OPTForCausalLM", "OPTForSequenceClassification", "OPTForQuestionAnswering"
LAYERS = r".*layers\.[01]\.(self_attn\.(q|k)_proj|fc1)"
CASES: dict[str, tuple[str, str, Settings]] = {
    "as it comes": ("opt-125m", CAUSAL, dict()),
    "all linear": ("opt-350m", CAUSAL, dict(target_modules="all-linear", use_rslora=True)),
    "patterns": (
        "opt-125m",
        CAUSAL,
        dict(
            target_modules=LAYERS,
            rank_pattern={"fc1": 2, "layers.0.self_attn.q_proj": 3},
            alpha_pattern={r"^model.decoder.layers.1.*fc1": 7, r"layers\.\d+\.self_attn\.k_proj": 5},
        ),
    ),
    "layers": (
        "opt-125m",
        CAUSAL,
        dict(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"], layers_to_transform=[0, 2]),
    ),
    "all biases": ("opt-125m", CAUSAL, dict(target_modules=["fc1", "out_proj"], bias="all", fan_in_fan_out=True)),
    "some biases": ("untied", CAUSAL, dict(target_modules=["fc2", "project_in", "lm_head"], bias="lora_only")),
    "no biases": ("galactica", CAUSAL, dict(target_modules=["fc1", "k_proj"])),
    "norms": ("opt-350m", CAUSAL, dict(modules_to_save=["final_layer_norm", "fc2"])),
    "labels": ("opt-125m", LABELS, dict(task_type="SEQ_CLS")),
    "all linear, labels": ("opt-125m", LABELS, dict(task_type="SEQ_CLS", target_modules="all-linear")),
    "answers": ("opt-350m", ANSWERS, dict(task_type="QUESTION_ANS")),
    "answers, a pair": ("opt-125m", ANSWERS, dict(task_type=None, target_modules=["fc1", "qa_outputs"])),
    "base": ("opt-125m", "OPTModel", dict(task_type="FEATURE_EXTRACTION")),
    "embedding, untied": ("untied", CAUSAL, dict(target_modules=["q_proj", "embed_tokens"])),
}
# Tied matrices of which one is adapted. PEFT's merge would adapt both, against what its model computes.
TIED: dict[str, tuple[str, str, Settings]] = {
    "tied embedding": ("opt-125m", CAUSAL, dict(target_modules=["q_proj", "embed_tokens"])),
    "tied head": ("opt-350m", CAUSAL, dict(target_modules=["q_proj", "lm_head"])),
    "tied, both": ("opt-125m", CAUSAL, dict(target_modules=["lm_head", "embed_tokens"])),
    "tied head, saved": ("opt-125m", CAUSAL, dict(modules_to_save=["lm_head"])),
    "tied embedding, saved": ("opt-350m", CAUSAL, dict(modules_to_save=["embed_tokens"])),
    "tied, both saved": ("opt-125m", CAUSAL, dict(modules_to_save=["embed_tokens", "lm_head"])),
    "tied, without head": ("opt-125m", LABELS, dict(target_modules=["embed_tokens"], task_type="SEQ_CLS")),
}
COMMON: Settings = dict(r=4, lora_alpha=12, task_type="CAUSAL_LM")


@pytest.mark.parametrize("case", [*CASES, *TIED])
def test_outputs_are_those_of_the_adapted_model(tmp_path, case):
    name, cls, settings = (CASES | TIED)[case]
    base, adapter = write(tmp_path, name, cls, **COMMON | settings)
    theirs = reloaded(adapter, name, cls)
    assert_same_outputs(theirs, getattr(opt_jax, cls).from_pretrained(base, adapter=adapter), name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", ["all linear", "patterns", "some biases", "labels", "embedding, untied"])
def test_merged_weights_are_those_of_merge_and_unload(tmp_path, case, dtype):
    name, cls, settings = CASES[case]
    base, adapter = write(tmp_path, name, cls, jnp.dtype(dtype), **COMMON | settings)
    theirs = reloaded(adapter, name, cls, jnp.dtype(dtype)).merge_and_unload()
    ours = open_source([str(base)], adapter=adapter)
    ours.check()
    before, changed = open_directory(base).arrays, 0
    for hf_name, tensor in theirs.named_parameters():
        path, transposed = canonical_path(hf_name)
        got, expected = ours.arrays[path].load(), tensor.detach().double().numpy()
        assert got.dtype.name == str(tensor.dtype).removeprefix("torch.") == dtype
        got, old = (x.T if transposed else x for x in (got, before[path].load()))
        changed += bool((old != got).any())
        # A sum of the old value and `rank` products, in float32. Then it is rounded, perhaps to another neighbour that
        # is 2**-10 away in float16; the limit is twice that.
        sizes = np.abs(old.astype(np.float64)) + np.abs(expected)
        rounding = {"float32": 0, "float16": 2**-9, "bfloat16": 2**-6}[dtype]
        rounded = sizes if "embed" in path else np.abs(expected)  # PEFT rounds the change of an embedding, too
        within(np.abs(got.astype(np.float64) - expected), 64 * 2**-24 * (1 + sizes) + rounding * rounded, path)
    assert changed >= 4


def test_our_adapters_are_loaded_by_peft(tmp_path):
    """Those of a run with --lora-rank: stacked, with a head."""
    lora, random = LoRA(2, 8.0, TARGETS), np.random.RandomState(0)
    base = make_hf("opt-125m", LABELS)
    base.save_pretrained(tmp_path / "base")
    arrays = open_directory(tmp_path / "base").arrays
    parameters = {"score.kernel": random.standard_normal(arrays["score.kernel"].shape)}
    for target in TARGETS:
        inner = target if target.startswith("fc") else f"self_attn.{target}"
        rows, columns = arrays[f"model.decoder.layers.0.{inner}.kernel"].shape
        parameters[f"model.decoder.layers.{inner}.kernel_lora_a"] = 0.3 * random.standard_normal((3, rows, 2))
        parameters[f"model.decoder.layers.{inner}.kernel_lora_b"] = 0.3 * random.standard_normal((3, 2, columns))
    (tmp_path / "adapter").mkdir()
    for file, content in adapter_files(parameters, lora, "somebody/base", LABELS).items():
        (tmp_path / "adapter" / file).write_bytes(content)

    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert isinstance(theirs, peft.PeftModelForSequenceClassification)
    assert theirs.peft_config["default"].base_model_name_or_path == "somebody/base"
    state = peft.get_peft_model_state_dict(theirs)
    with torch.no_grad():
        q = state["base_model.model.model.decoder.layers.1.self_attn.q_proj.lora_A.weight"].numpy()
    expected = parameters["model.decoder.layers.self_attn.q_proj.kernel_lora_a"][1].T
    np.testing.assert_array_equal(q, expected.astype(np.float32))
    assert len(state) == 1 + 2 * 3 * len(TARGETS)
    ours = opt_jax.OPTForSequenceClassification.from_pretrained(tmp_path / "base", adapter=tmp_path / "adapter")
    assert_same_outputs(theirs, ours, "opt-125m")


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(use_dora=True), "use_dora is not supported"),
        (dict(lora_bias=True), "lora_bias is not supported"),
        (dict(trainable_token_indices=[3]), "trainable_token_indices is not supported"),
        (dict(init_lora_weights="olora"), "init_lora_weights olora changes the base"),
        (dict(ensure_weight_tying=True, target_modules=["embed_tokens"]), "with ensure_weight_tying is not supported"),
    ],
)
def test_variants_are_refused(tmp_path, config, message):
    base, adapter = write(tmp_path, "opt-125m", CAUSAL, **COMMON | config)
    with pytest.raises(ValueError, match=message):
        opt_jax.OPTForCausalLM.from_pretrained(base, adapter=adapter)


@pytest.mark.parametrize("config", [peft.IA3Config, peft.PrefixTuningConfig, peft.AdaLoraConfig, peft.LoHaConfig])
def test_other_kinds_of_adapters_are_refused(tmp_path, config):
    more = dict(num_virtual_tokens=3) if config is peft.PrefixTuningConfig else dict(target_modules=["fc1"])
    more |= dict(feedforward_modules=["fc1"]) if config is peft.IA3Config else {}
    more |= dict(total_step=10) if config is peft.AdaLoraConfig else {}
    base = make_hf("opt-125m")
    base.save_pretrained(tmp_path / "base")
    peft.get_peft_model(base, config(task_type="CAUSAL_LM", **more)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="peft_type [A-Z0-9_]+ is not supported, only LORA"):
        opt_jax.OPTForCausalLM.from_pretrained(tmp_path / "base", adapter=tmp_path / "adapter")
