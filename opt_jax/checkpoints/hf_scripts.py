"""What scripts for `transformers` (or its old Flax port) write, and what to write here instead: texts of errors."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from opt_jax.system.messages import shown

T = TypeVar("T")
_DEVICES = "JAX puts arrays on its default device; for several devices pass mesh=opt_jax.parallel.make_mesh(...)"
_DTYPE = 'pass dtype="bfloat16" (computation and weights) to from_pretrained'
_INT8 = "load the model, then opt_jax.quantize(model)"
_LEAVE_OUT = "leave it out: "
_TOKEN = "log in once (`hf auth login`), or set HF_TOKEN"
_LAZY = _LEAVE_OUT + "weights are read array by array"
_DROPOUT = "pass dropout_key=jax.random.key(...) to the call; without it there is no dropout"
_PARAMETERS = "opt_jax.named_parameters(model) has names and arrays, jax.tree.leaves(model) the arrays"
_GRADIENTS = "jax.grad(loss)(model) returns gradients; docs/modules.md has an example"
_CACHE = "pass cache=model.init_cache(batch_size, max_length), and the cache of the output to the next call"

# Arguments of `from_pretrained` -> what to write instead.
LOADING = {
    "torch_dtype": 'write dtype="bfloat16", "float16", "float32" or "auto"',
    "device_map": _DEVICES,
    "device_mesh": _DEVICES,
    "max_memory": _DEVICES,
    "tp_plan": 'pass mesh=opt_jax.parallel.make_mesh("tensor=4")',
    "tp_size": 'pass mesh=opt_jax.parallel.make_mesh("tensor=4")',
    "low_cpu_mem_usage": _LAZY,
    "_fast_init": _LAZY,
    "offload_folder": _LAZY,
    "offload_state_dict": _LAZY,
    "offload_buffers": _LAZY,
    "trust_remote_code": _LEAVE_OUT + "no code of a repository is ever run",
    "code_revision": _LEAVE_OUT + "no code of a repository is ever run",
    "load_in_8bit": _INT8,
    "load_in_4bit": _INT8 + " (8 bits; there are no 4 bits here)",
    "quantization_config": _INT8,
    "use_flash_attention_2": 'write attn_implementation="cudnn" on NVIDIA GPUs, "splash" on TPUs',
    "gradient_checkpointing": 'write remat="full"',
    "use_safetensors": _LEAVE_OUT + "safetensors files are preferred to others",
    "weights_only": _LEAVE_OUT + "no pickle is ever run",
    "use_cache": "pass cache= to the call; generate always has one",
    "output_hidden_states": "pass it to the call",
    "output_attentions": "pass it to the call",
    "return_dict": _LEAVE_OUT + "an output is indexed as a tuple and as a dict",
    "state_dict": "jax.tree.map or named_parameters(model)[path].set_value(...) after loading",
    "variant": "name the files model.safetensors in a directory of their own",
    "subfolder": "download the repository (`hf download`), and name the directory inside it",
    "gguf_file": "GGUF files are not read: take the repository that they were made from",
    "key_mapping": "rename the tensors in the file",
    "token": _TOKEN,
    "use_auth_token": _TOKEN,
    "proxies": "set HTTPS_PROXY",
    "mirror": "set HF_ENDPOINT",
    "force_download": "remove the repository from the cache (`hf cache rm`)",
    "resume_download": _LEAVE_OUT + "a download that was cut short is always resumed",
    "adapter_name": _LEAVE_OUT + "a model has one adapter at most",
    "experts_implementation": _LEAVE_OUT + "OPT has no experts",
    "use_kernels": "write attn_implementation=",
    "from_pt": _LEAVE_OUT + "the format is found by the files",
    "from_flax": _LEAVE_OUT + "the format is found by the files",
    "from_tf": "TensorFlow's files are not read: load them with transformers 4, and save_pretrained from there",
    "_do_init": _LEAVE_OUT + "a model holds its parameters; to trace without them: nnx.eval_shape",
    "input_shape": _LEAVE_OUT + "parameters do not depend on the length of texts",
}
# Values of arguments -> what to write instead.
ATTENTION = {
    "eager": "xla",
    "sdpa": "xla",
    "flash_attention_2": 'cudnn" on NVIDIA GPUs, "splash" on TPUs, or "xla',
    "flash_attention_3": 'cudnn" on NVIDIA GPUs, "splash" on TPUs, or "xla',
    "flex_attention": "xla",
}
# Arguments of a tokenizer's `from_pretrained`, and of `pipeline`.
_ATTRIBUTE = "set the attribute of the tokenizer after loading"
TOKENIZER = {
    "use_fast": _LEAVE_OUT + "there is one tokenizer, and its ids are those of both",
    "from_slow": _LEAVE_OUT + "there is one tokenizer",
    **dict.fromkeys(
        ("model_max_length", "add_bos_token", "bos_token", "eos_token", "pad_token", "unk_token"), _ATTRIBUTE
    ),
    **{name: LOADING[name] for name in ("trust_remote_code", "token", "use_auth_token", "subfolder", "force_download")},
}
PIPELINE = {
    "device": _DEVICES,
    "framework": _LEAVE_OUT + "this one is JAX's",
    "model_kwargs": "pass dtype, param_dtype or mesh by name, or a model",
    "use_fast": TOKENIZER["use_fast"],
    **{name: LOADING[name] for name in ("torch_dtype", "device_map", "trust_remote_code", "token")},
}
# Arguments of a model's call.
CALL = {
    "past_key_values": _CACHE,
    "use_cache": _CACHE,
    "return_dict": _LEAVE_OUT + "an output is indexed as a tuple and as a dict",
    "cache_position": _LEAVE_OUT + "the cache knows its column",
    "head_mask": "heads cannot be masked: set rows of out_proj.kernel to 0",
    "token_type_ids": _LEAVE_OUT + "OPT has one type of tokens",
    "num_items_in_batch": "scale the loss yourself",
    "params": "call the model that holds them; nnx.split and nnx.merge take a model apart",
    "dropout_rng": _DROPOUT,
    "train": _DROPOUT,
    "deterministic": _DROPOUT,
}
# Arguments of `save_pretrained`.
SAVING = {
    "params": "a model holds its parameters: leave it out",
    "push_to_hub": "call model.push_to_hub(repo_id)",
    "state_dict": "a model holds its parameters: leave it out",
    "is_main_process": "all processes call save_pretrained together",
    "save_function": _LEAVE_OUT + "arrays are written piece by piece",
    "token": _TOKEN,
    "variant": "rename the files",
    "save_peft_format": "leave it out",
}
# Values that ask for what is so here anyway, beside None.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("trust_remote_code", "load_in_8bit", "load_in_4bit", "use_flash_attention_2"), (False,)),
    **dict.fromkeys(("from_pt", "from_flax", "from_tf", "force_download", "use_cache", "train"), (False,)),
    **dict.fromkeys(("gradient_checkpointing", "push_to_hub"), (False,)),
    **dict.fromkeys(("return_dict", "weights_only", "deterministic"), (True,)),
}
# Attributes of a model.
MODEL = {
    **dict.fromkeys(("to", "cuda", "tpu", "device", "hf_device_map"), _DEVICES),
    "cpu": 'run with JAX_PLATFORMS=cpu, or under jax.default_device(jax.devices("cpu")[0])',
    **dict.fromkeys(("half", "bfloat16", "float", "double", "to_bf16", "to_fp16", "to_fp32"), _DTYPE),
    **dict.fromkeys(("parameters", "named_parameters", "state_dict", "params", "buffers"), _PARAMETERS),
    "load_state_dict": "opt_jax.named_parameters(model)[path].set_value(array)",
    **dict.fromkeys(("modules", "named_modules", "children"), "flax.nnx.iter_graph(model) has all modules"),
    **dict.fromkeys(("zero_grad", "requires_grad_", "backward"), _GRADIENTS),
    "training": _DROPOUT,
    "gradient_checkpointing_enable": 'pass remat="full" to from_pretrained, or to the constructor',
    "tie_weights": "nothing to do: a tied head is the embedding itself",
    "compile": "nothing to do: a call is compiled",
    "init_weights": "the constructor takes rngs=nnx.Rngs(seed)",
    "can_generate": "an OPTForCausalLM can",
    "get_decoder": "model.base_model.decoder",
    "compute_transition_scores": "pass logprobs=1 to generate",
    "prepare_inputs_for_generation": _CACHE,
    "enable_input_require_grads": _GRADIENTS,
    "set_input_embeddings": "model.base_model.decoder.embed_tokens.embedding.set_value(array)",
    "set_output_embeddings": "model.lm_head.kernel.set_value(array)",
    "add_adapter": "python train.py --lora-rank (docs/finetuning.md)",
}
# Attributes of what a model's call and `generate` return.
OUTPUT = {"past_key_values": "the cache is its attribute `cache`, if the call was given one: " + _CACHE}
GENERATED = {
    **{name: f"write .sequences.{name}" for name in ("shape", "ndim", "dtype", "tolist")},
    **dict.fromkeys(("size", "dim"), "write .sequences.shape"),
    **dict.fromkeys(("cpu", "numpy", "to", "detach"), "its sequences are a NumPy array: leave it out"),
    "past_key_values": "pass return_cache=True: the result then has `cache`, for generate(..., cache=)",
    "scores": "logprobs=n records log-probabilities",
    "logits": "logprobs=n records log-probabilities",
}
# Attributes of what a tokenizer returns, and of this package.
ENCODING = {"to": "the arrays are NumPy's, which every call takes: leave it out"}
PACKAGE = {
    "GPT2Tokenizer": "use opt_jax.OPTTokenizer",
    "GPT2TokenizerFast": "use opt_jax.OPTTokenizer",
    "BitsAndBytesConfig": _INT8,
    "TextStreamer": "use opt_jax.stream_text",
    "TextIteratorStreamer": "use opt_jax.stream_text",
    "Trainer": "use python train.py (docs/training.md)",
    "TrainingArguments": "use python train.py (docs/training.md)",
    "set_seed": "pass seed= to generate, rngs=nnx.Rngs(seed) to a constructor",
    "no_grad": "leave it out: gradients are computed by jax.grad only",
}


def known(where: str, options: Mapping[str, Any], table: Mapping[str, str]) -> dict[str, Any]:
    """The options that are not in the table.

    Raises:
      ValueError: one of them is, and asks for something (other than None).
    """
    for name, value in options.items():
        if name in table and value is not None and not any(value is harmless for harmless in _HARMLESS.get(name, ())):
            raise ValueError(f"{where} takes no {name} (it is {shown(value, 40)}): {table[name]}")
    return {name: value for name, value in options.items() if name not in table}


def check_attention(name: Any) -> None:
    """Raise ValueError for an implementation of attention that `transformers` has."""
    if isinstance(name, str) and name in ATTENTION:
        raise ValueError(f'attn_implementation {name!r}: write "{ATTENTION[name]}"')


def unknown_argument(where: str, name: str, names: Iterable[str]) -> ValueError:
    """The error for an argument that does not exist; it names the nearest one."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return ValueError(f"{where} has no argument {shown(name)}" + (f": did you mean {near[0]}?" if near else ""))


def unchangeable(example: str) -> Callable[[type[T]], type[T]]:
    """A decorator of frozen dataclasses: the error for an assignment says what to write instead, such as `example`."""

    def decorate(cls: type[T]) -> type[T]:
        def refuse(self: T, name: str, value: Any) -> None:  # noqa: ARG001
            raise dataclasses.FrozenInstanceError(f"cannot assign to {cls.__name__}.{name}: write {example}")

        setattr(cls, "__setattr__", refuse)  # noqa: B010  (a frozen dataclass may not define it)
        return cls

    return decorate


def no_attribute(owner: str, name: str, table: Mapping[str, str]) -> AttributeError:
    """The error for an attribute that does not exist."""
    hint = f": {table[name]}" if table.get(name) else ""
    return AttributeError(f"{owner} has no attribute {name!r}{hint}")
