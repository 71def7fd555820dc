"""What scripts for `transformers` (or its old Flax port) write, and what to write here instead: texts of errors."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from opt_jax.system.messages import shown

T = TypeVar("T")
_DEVICES = "JAX puts arrays on its default device; for several devices pass mesh=opt_jax.parallel.make_mesh(...)"
_DTYPE = 'pass dtype="bfloat16" (computation and weights) to from_pretrained'
_INT8 = "load the model, then opt_jax.quantize(model)"
_COMPRESS = "`opt-jax compress MODEL --method gptq --bits 4 --output DIRECTORY`, and load that directory"
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
    "load_in_4bit": _COMPRESS,
    "quantization_config": _LEAVE_OUT + "config.json says it of a quantized model; to quantize one, " + _COMPRESS,
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
# Fields that `OPTConfig` lacks, its methods, and fields that are assigned for an effect they do not have here.
_CALLED, _GENERATION = "pass it to the call", "model.generation_config = GenerationConfig(...) has options of generate"
CONFIG = {
    "use_cache": "leave it out: a call has the cache that it is given, and generate always has one",
    "output_attentions": _CALLED,
    "output_hidden_states": _CALLED,
    **{name: LOADING[name] for name in ("return_dict", "gradient_checkpointing")},
    **dict.fromkeys(("torch_dtype", "dtype"), "pass dtype= to the model's constructor, or to from_pretrained"),
    **dict.fromkeys(
        ("attn_implementation", "_attn_implementation"),
        "pass attn_implementation= to the model's constructor, or to from_pretrained",
    ),
    **dict.fromkeys(("id2label", "label2id"), "pass it to from_pretrained, or num_labels= and extra= to OPTConfig"),
    **dict.fromkeys(("max_length", "do_sample", "num_beams", "temperature", "top_k", "top_p"), _GENERATION),
    "vocab_size": "model.resize_token_embeddings(n), or a new config: dataclasses.replace(config, vocab_size=n)",
    "update": "dataclasses.replace(config, dropout=0.0)",
    **dict.fromkeys(("name_or_path", "_name_or_path"), "model.name_or_path"),
    "to_json_string": "json.dumps(config.to_dict())",
    "to_json_file": "config.save_pretrained(directory)",
    "to_diff_dict": "config.to_dict() has all fields",
}
# Arguments of a tokenizer's call, and of `encode`.
_CUT = "cut the ids of a long text yourself; train.py --task question-answering does so"
TOKENIZING = {
    "return_attention_mask": _LEAVE_OUT + 'the mask is returned; take ["input_ids"] alone',
    "return_token_type_ids": _LEAVE_OUT + "OPT has one type of tokens",
    "return_overflowing_tokens": _CUT,
    "stride": _CUT,
    "return_special_tokens_mask": "compare the ids with tokenizer.all_special_ids",
    "return_length": "the lengths are attention_mask.sum(1)",
    "is_split_into_words": 'join the words: " ".join(words)',
    "text_target": "tokenize it in a call of its own",
    "text_pair_target": "tokenize it in a call of its own",
    "split_special_tokens": "set it in tokenizer_config.json",
    "verbose": _LEAVE_OUT + "there are no such messages",
}
# Arguments of a tokenizer's `from_pretrained`, and of `pipeline`.
_ATTRIBUTE = "set the attribute of the tokenizer after loading"
_FAST = _LEAVE_OUT + "there is one tokenizer, and its ids are those of both"
TOKENIZER = {
    "use_fast": _FAST,
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
    "use_fast": _FAST,
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
# Arguments of `push_to_hub`.
PUSHING = {
    "use_auth_token": "write token=",
    "use_temp_dir": _LEAVE_OUT + "files are written to a temporary directory",
    "safe_serialization": _LEAVE_OUT + "models are uploaded as safetensors",
    "commit_description": "write it into commit_message=",
    "organization": 'write repo_id="ORGANIZATION/NAME"',
    "repo_url": 'write repo_id="USER/NAME"',
    "tags": "write them into the README.md of the repository",
    "variant": "rename the files",
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
    **dict.fromkeys(("return_dict", "weights_only", "deterministic", "return_attention_mask"), (True,)),
    **dict.fromkeys(("use_fast", "verbose", "use_temp_dir"), (True, False)),
    **dict.fromkeys(("return_token_type_ids", "return_overflowing_tokens", "is_split_into_words"), (False,)),
    **dict.fromkeys(("return_special_tokens_mask", "return_length", "split_special_tokens"), (False,)),
    "safe_serialization": (True,),
    "stride": (0,),
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
    "load_adapter": "from_pretrained(base, adapter=...)",
    **dict.fromkeys(("merge_and_unload", "merge_adapter"), "from_pretrained(base, adapter=...) merges the adapter"),
    "get_memory_footprint": "sum(x.nbytes for x in jax.tree.leaves(model))",
    "config_class": "opt_jax.OPTConfig",
    "gradient_checkpointing_disable": 'pass remat="none" to from_pretrained, which is the default',
    "print_trainable_parameters": "model.num_parameters() counts all; train.py prints what it trains",
    "register_forward_hook": "pass hooks= to the call (docs/research.md)",
    "freeze": _GRADIENTS,
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
ENCODING = {
    "to": "the arrays are NumPy's, which every call takes: leave it out",
    "data": "it is a dict itself",
    "tokens": "tokenizer.convert_ids_to_tokens(ids)",
    **dict.fromkeys(
        ("word_ids", "char_to_token", "token_to_chars"), "return_offsets_mapping=True has (start, end) of each token"
    ),
    "overflow_to_sample_mapping": _CUT,
}
VOCABULARY = {
    **dict.fromkeys(("encode_plus", "batch_encode_plus"), "call the tokenizer: tokenizer(text)"),
    **dict.fromkeys(("apply_chat_template", "chat_template"), "OPT has no chat template: write the prompt as text"),
    "is_fast": "there is one tokenizer",
    "save_vocabulary": "tokenizer.save_pretrained(directory)",
    "prepare_for_model": "tokenizer.pad takes rows of ids",
    "train_new_from_iterator": "train.py without --tokenizer trains one on its data",
    "as_target_tokenizer": "tokenize targets in a call of their own",
}
PACKAGE = {
    "GPT2Tokenizer": "use opt_jax.OPTTokenizer",
    "GPT2TokenizerFast": "use opt_jax.OPTTokenizer",
    "BitsAndBytesConfig": _INT8,
    "TextStreamer": "use opt_jax.stream_text",
    "TextIteratorStreamer": "use opt_jax.stream_text",
    "Trainer": "use python train.py (docs/training.md)",
    "TrainingArguments": "use python train.py (docs/training.md)",
    "set_seed": "pass seed= to generate, rngs=nnx.Rngs(seed) to a constructor",
    **dict.fromkeys(
        ("DataCollatorForLanguageModeling", "DataCollatorWithPadding", "default_data_collator"),
        "tokenizer(texts) and tokenizer.pad(rows) return padded arrays; labels are the ids, -100 at pads",
    ),
    **dict.fromkeys(
        ("StoppingCriteria", "StoppingCriteriaList", "LogitsProcessor", "LogitsProcessorList"),
        "pass stop_strings, stop_token_ids or other options to generate",
    ),
    "get_linear_schedule_with_warmup": "use a schedule of optax, or python train.py",
    **dict.fromkeys(("PeftModel", "get_peft_model", "LoraConfig"), "from_pretrained(base, adapter=...), or train.py"),
    **dict.fromkeys(("get_scheduler", "get_cosine_schedule_with_warmup"), "use a schedule of optax, or train.py"),
    **dict.fromkeys(("Seq2SeqTrainer", "EarlyStoppingCallback"), "use python train.py (docs/training.md)"),
    "AdamW": "use optax.adamw, or python train.py",
    "PeftConfig": "from_pretrained(base, adapter=...) reads it",
    **dict.fromkeys(("GPTQConfig", "prepare_model_for_kbit_training"), _INT8),
    "logging": "use Python's logging",
    "OPTPreTrainedModel": "use opt_jax.model.heads.OPTPreTrainedModel",
    "PreTrainedModel": "use opt_jax.model.heads.OPTPreTrainedModel",
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


def check_fields(cls: type[Any], fields: Iterable[str]) -> None:
    """Raise ValueError for a name that is no field of the dataclass `cls`, which is `OPTConfig`."""
    names = [field.name for field in dataclasses.fields(cls)]
    for name in fields:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            other = f"did you mean {near[0]}?" if near else 'what else a config.json holds is in extra={"name": value}'
            raise ValueError(f"{cls.__name__} takes no {shown(name)}: {CONFIG.get(name, other)}")


def unchangeable(example: str, hints: Mapping[str, str] = MappingProxyType({})) -> Callable[[type[T]], type[T]]:
    """A decorator of frozen dataclasses: the error for an assignment says what to write instead.

    Args:
      example: what to write, with {name} and {value}.
      hints: field -> what to write for it.
    """

    def decorate(cls: type[T]) -> type[T]:
        def refuse(self: T, name: str, value: Any) -> None:  # noqa: ARG001
            instead = hints.get(name, "there is no such field")
            if name in cls.__dataclass_fields__ and name not in hints:  # type: ignore[reportAttributeAccessIssue]
                instead = example.format(name=name, value=shown(value, 40))
            raise dataclasses.FrozenInstanceError(f"cannot assign to {cls.__name__}.{name}: {instead}")

        setattr(cls, "__setattr__", refuse)  # noqa: B010  (a frozen dataclass may not define it)
        return cls

    return decorate


def no_attribute(owner: str, name: str, table: Mapping[str, str]) -> AttributeError:
    """The error for an attribute that does not exist."""
    hint = f": {table[name]}" if table.get(name) else ""
    return AttributeError(f"{owner} has no attribute {name!r}{hint}")
