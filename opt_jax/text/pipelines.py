"""Texts through a model: the text-generation pipeline, streaming, and scoring. Nothing here is compiled."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from opt_jax.checkpoints import hf_scripts
from opt_jax.generation.config import options_of, override
from opt_jax.generation.generate import generate_requested, hooked_model, stream_requested
from opt_jax.generation.request import Request, check_request, checkpoint_options
from opt_jax.model.heads import OPTForCausalLM
from opt_jax.system.messages import shown
from opt_jax.text.streaming import TextBeforeStop, TextStream
from opt_jax.text.tokenizer import BatchEncoding, OPTTokenizer

DEFAULT_NEW_TOKENS = 256  # HF's pipeline's
DEFAULT_BATCH_SIZE = 8


def pipeline(
    task: str = "text-generation", model: Any = "tiny", tokenizer: Any = None, **options
) -> "TextGenerationPipeline":
    """A text generator with the interface of `transformers.pipeline("text-generation", ...)`.

    Args:
      task: "text-generation".
      model: a name for `OPTForCausalLM.from_pretrained`, or a model.
      tokenizer: a name for `OPTTokenizer.from_pretrained`, or an `OPTTokenizer`; default: that of the named model.
      **options: for a named model, `from_pretrained`'s `dtype`, `param_dtype`, `mesh`, `revision`, `cache_dir`,
        `local_files_only`. All others become defaults of every call.

    Raises:
      ValueError: another task; a model object without a tokenizer, or with options for loading.
    """
    if task != "text-generation":
        raise ValueError(f'task {task!r} is not supported: opt-jax has "text-generation"')
    options = hf_scripts.known("pipeline", options, hf_scripts.PIPELINE)
    origin = {k: options.pop(k) for k in ("revision", "cache_dir", "local_files_only") if k in options}
    loading = {k: options.pop(k) for k in ("dtype", "param_dtype", "mesh") if k in options}
    named = isinstance(model, (str, os.PathLike))
    if not named and (origin or loading):
        raise ValueError(f"{', '.join(origin | loading)}: only for a model that is loaded by name")
    if not named and tokenizer is None:
        raise ValueError("a model object does not know its tokenizer: pass tokenizer=")
    if tokenizer is None:
        tokenizer = OPTTokenizer.from_pretrained(model, **origin)  # before the weights: it fails sooner
    elif isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = OPTTokenizer.from_pretrained(tokenizer)
    if named:
        model = OPTForCausalLM.from_pretrained(model, **origin, **loading)
    return TextGenerationPipeline(model, tokenizer, **options)


class TextGenerationPipeline:
    """A text generator, as `pipeline` returns it. By default it samples like HF's: temperature 0.7, top_k 50.

    The default is 256 new tokens, as in HF. Deviations from HF: the 256 are reduced to the room that the context has.
    Of a list, `batch_size` prompts run at a time (HF: one), with continuous batching; each counts alone for
    `max_length` and `min_length` (HF with a `batch_size`: with its pads). The same call returns the same text unless
    `seed` changes. `prefix=""` has its effect on lengths, too (HF still counts the config's prefix).
    """

    def __init__(self, model: Any, tokenizer: OPTTokenizer, **defaults):
        self.task, self.model, self.tokenizer, self._defaults = "text-generation", model, tokenizer, defaults

    def __call__(self, text_inputs: str | Sequence[str], **options) -> list:
        """Continues one or more prompts.

        Args:
          text_inputs: a string, or a sequence of strings.
          **options: `return_full_text` (True: the prompt is part of the result), `skip_special_tokens` (True),
            `add_special_tokens` (True), `include_stop_str_in_output` (True: a stop string that ends the text is part of
            it), `batch_size` (8), `progress_bar` (default: on a terminal, for more than `batch_size` prompts), `prefix`
            (default: that of the model's config.json, `</s>` in several of facebook/opt-*): a text in front of each
            prompt, which is not in the result and does not count for `max_length` and `min_length`. All others are
            passed to `model.generate`.

        Returns:
          `[{"generated_text": str}]` for a string; a list of such lists for a sequence. With `stop_strings` the dicts
          also have "stop_reason": the string that ended the text, or None.

        Raises:
          ValueError: the input is not text; or as `generate` raises it.
        """
        options = override(_flat(self._defaults), _flat(options))
        full, skip = _taken(options, "return_full_text", True), _taken(options, "skip_special_tokens", True)
        special, size = _taken(options, "add_special_tokens", True), _taken(options, "batch_size", DEFAULT_BATCH_SIZE)
        bar, assistant, hooks = (options.pop(k, None) for k in ("progress_bar", "assistant_model", "hooks"))
        with_stop = _taken(options, "include_stop_str_in_output", True)
        prefix = options.pop("prefix", None)
        prefix = self.model.config.extra.get("prefix") if prefix is None else prefix
        if not isinstance(prefix, str | None):
            raise ValueError(f"prefix={shown(prefix)} must be a text")
        given = {k: v for k, v in (checkpoint_options(self.model) | options).items() if v is not None}  # as HF
        sampling = {k: v for k, v in dict(temperature=0.7, top_k=50).items() if k not in given}
        if given.setdefault("do_sample", True):
            options = sampling | options | {"do_sample": True}
        prompts = [text_inputs] if isinstance(text_inputs, str) else list(text_inputs)
        if any(not isinstance(prompt, str) for prompt in prompts):
            raise ValueError("the pipeline takes a string or a sequence of strings; OPT has no chat template")

        if not prompts:
            return []
        if prefix:
            inputs = self._with_prefix(prefix, prompts, special)
            tokens = len(self.tokenizer.encode(prefix, add_special_tokens=False))
            for name, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
                if new not in given and isinstance(given.get(name), int):
                    options[name] = given[name] + tokens
        else:
            inputs = self.tokenizer(
                prompts, padding=True, padding_side="left", return_tensors="np", add_special_tokens=special
            )
        how: Any = dict(tokenizer=self.tokenizer, default_new_tokens=DEFAULT_NEW_TOKENS, count_pads=False)
        request = check_request(self.model, **inputs, options=options, **how)
        if request.logprobs is not None:
            raise ValueError("logprobs are no part of a pipeline's result: use model.generate")
        _check_stop(request, with_stop)
        model = hooked_model(self.model, hooks, request, size, assistant)
        output = generate_requested(model, request, size, bar, assistant)
        new = output.sequences[:, request.input_ids.shape[1] :]
        if with_stop:
            texts = self.tokenizer.batch_decode(new, skip_special_tokens=skip)
        else:
            streams = [TextBeforeStop(request.stops, i // request.copies, skip) for i in range(len(new))]
            rows = zip(streams, new, output.lengths, strict=True)
            texts = [stream.put(row[:length]) + stream.end() for stream, row, length in rows]
        results: list[list[dict[str, Any]]] = [[] for _ in prompts]
        for i, text in enumerate(texts):
            prompt = prompts[i // request.copies] if full else ""
            stop = {} if output.stop_reasons is None else {"stop_reason": output.stop_reasons[i]}
            results[i // request.copies].append({"generated_text": prompt + text} | stop)
        return results[0] if isinstance(text_inputs, str) else results

    def _with_prefix(self, prefix: str, prompts: list[str], add_special_tokens: bool) -> BatchEncoding:
        """The inputs of a model. Unlike the tokenizer's call, without a warning that `</s>` is there twice."""
        encodings = self.tokenizer._encode(
            [prefix + prompt for prompt in prompts], None, add_special_tokens, None, False
        )
        return self.tokenizer.pad([{"input_ids": encoding.ids} for encoding in encodings], padding_side="left")


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """The options, merged over those of an option `generation_config`."""
    others = {name: value for name, value in options.items() if name != "generation_config"}
    return override(options_of(options.get("generation_config")), others)


def _taken(options: dict[str, Any], name: str, default: Any) -> Any:
    """An option, taken out of the others; the default if it is not there or None."""
    value = options.pop(name, None)
    return default if value is None else value


def _check_stop(request: Request, with_stop: Any) -> None:
    if not isinstance(with_stop, bool):
        raise ValueError(f"include_stop_str_in_output={shown(with_stop)} must be True or False")
    if not with_stop and request.stops is None:
        raise ValueError("include_stop_str_in_output=False without effect: pass stop_strings as well")


def stream_text(model: Any, tokenizer: OPTTokenizer, prompt: str | BatchEncoding, **options: Any) -> Iterator[str]:
    """The continuation of a prompt, piece by piece as it is generated. A piece never ends inside of a character.

    Args:
      model: an `OPTForCausalLM`.
      tokenizer: its tokenizer.
      prompt: a text, or the tokenizer's output for one text, [1, T].
      **options: those of `model.generate`, and `include_stop_str_in_output` (True). False: a stop string that ends the
        text is left out. Text that may be its beginning then comes later, when it is known not to be.

    Raises:
      ValueError: as `model.generate`, when this function is called and not when the first piece is read.
    """
    if _flat(options).get("num_return_sequences") not in (None, 1):
        raise ValueError("stream_text returns one text: leave out num_return_sequences")
    options["num_return_sequences"] = 1  # whatever the checkpoint says
    inputs = tokenizer(prompt, return_tensors="np") if isinstance(prompt, str) else prompt
    if len(inputs["input_ids"]) != 1:
        raise ValueError(f"stream_text continues one prompt, not {len(inputs['input_ids'])}")
    with_stop = _taken(options, "include_stop_str_in_output", True)
    names = ("generation_config", "cache", "assistant_model", "hooks")
    config, cache, assistant, hooks = (options.pop(k, None) for k in names)
    request = check_request(
        model, **inputs, generation_config=config, tokenizer=tokenizer, prefix=cache, options=options
    )
    _check_stop(request, with_stop)
    tokens = stream_requested(hooked_model(model, hooks, request, None, assistant), request, assistant)

    def pieces() -> Iterator[str]:
        text = TextStream(tokenizer) if with_stop else TextBeforeStop(request.stops)
        for token in tokens:
            if piece := text.put(token):
                yield piece
        if piece := text.end():
            yield piece

    return pieces()


class TokenScore(NamedTuple):
    """A token of a text, and its log-probability after the tokens before it (None for the first token)."""

    token_id: int
    text: str  # U+FFFD for an incomplete character
    logprob: float | None


def score_texts(
    model: Any, tokenizer: OPTTokenizer, texts: Sequence[str], prompts: Sequence[str] | None = None
) -> list[list[TokenScore]]:
    """The log-probability of each token of each text; with `prompts`, of text i as the continuation of prompt i.

    Raises:
      ValueError: the numbers of prompts and texts differ, a text is empty, or a row is longer than the context.
    """
    if isinstance(texts, str) or isinstance(prompts, str):
        raise ValueError("score_texts takes sequences of strings")
    if prompts is not None and len(prompts) != len(texts):
        raise ValueError(f"{len(prompts)} prompts for {len(texts)} texts")
    rows = [tokenizer.encode(text, add_special_tokens=prompts is None) for text in texts]
    if not all(rows):
        raise ValueError(f"text {list(map(bool, rows)).index(False)} has no token to score")
    before = [[] for _ in texts] if prompts is None else [tokenizer.encode(prompt) for prompt in prompts]
    if not rows:
        return []
    longest = max(len(a) + len(b) for a, b in zip(before, rows, strict=True))
    ids = np.full((len(rows), longest), tokenizer.pad_token_id, np.int32)
    mask = np.zeros(ids.shape, bool)
    for i, (first, row) in enumerate(zip(before, rows, strict=True)):
        ids[i, longest - len(first) - len(row) :], mask[i, longest - len(first) - len(row) :] = [*first, *row], True
    scores = [values[longest - len(row) :] for values, row in zip(model.score(ids, mask), rows, strict=True)]
    return [
        [TokenScore(i, tokenizer.decode([i]), None if np.isnan(x) else float(x)) for i, x in zip(*pair, strict=True)]
        for pair in zip(rows, scores, strict=True)
    ]
