"""The adapter to EleutherAI's lm-evaluation-harness: `lm_eval.simple_evaluate(model=OPTLM("tiny"), tasks=[...])`.

It answers the harness as its own `hf` model does, with the same tokens, windows, truncation and post-processing, so
that results can be compared. Importing this module also registers the name "opt-jax" with the harness.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
except ImportError as error:
    raise ValueError(f"tasks need the package lm-eval ({error}): pip install lm-eval") from None
from tqdm import tqdm

from opt_jax.evaluation._perplexity import check_batch_size
from opt_jax.generation.config import SAMPLING
from opt_jax.generation.prompts import batch_bucket
from opt_jax.model.heads import OPTForCausalLM
from opt_jax.parallel import processes
from opt_jax.text.tokenizer import OPTTokenizer

# Options of sampling. A greedy task may have them; `hf` ignores them there, and `generate` would refuse them.
Pair = tuple[Any, list[int], list[int]]  # the harness's key of the request in its cache, context, continuation


@register_model("opt-jax")
class OPTLM(TemplateLM):
    """A model for the harness.

    Args:
      pretrained: a name for `OPTForCausalLM.from_pretrained`, or a model, on a mesh or not.
      tokenizer: a name for `OPTTokenizer.from_pretrained`, or an `OPTTokenizer`; default: that of a named model.
      batch_size: requests at a time. Default: 8; on a mesh, a multiple of the parts that rows are sharded into.
      max_length: the most tokens that the model reads; default: its context.
      max_gen_toks: the most new tokens, for tasks that do not set it.
      **loading: for a named model, `from_pretrained`'s `dtype`, `param_dtype`, `mesh`, `revision`, ...

    Raises:
      ValueError: a bad argument, or one without effect.
    """

    def __init__(
        self,
        pretrained: Any = "tiny",
        *,
        tokenizer: Any = None,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        **loading: Any,
    ):
        super().__init__()
        for name in ("device", "max_batch_size"):  # of lm_eval's own command
            if loading.pop(name, None) is not None:
                raise ValueError(f"{name} is not an option of opt-jax: leave it out")
        if isinstance(pretrained, OPTForCausalLM):
            if loading:
                raise ValueError(f"{', '.join(loading)}: only for a model that is loaded by name")
            if tokenizer is None:
                raise ValueError("a model object does not know its tokenizer: pass tokenizer=")
            self.model: Any = pretrained
        if not isinstance(tokenizer, OPTTokenizer):  # before the weights: it fails sooner
            named = {k: v for k, v in loading.items() if k in ("revision", "cache_dir", "local_files_only")}
            source: Any = pretrained if tokenizer is None else tokenizer
            tokenizer = OPTTokenizer.from_pretrained(source, **(named if tokenizer is None else {}))
        self.tokenizer: Any = tokenizer
        if not isinstance(pretrained, OPTForCausalLM):
            self.model = OPTForCausalLM.from_pretrained(pretrained, **loading)
        if batch_size is not None and not str(batch_size).isdecimal():
            raise ValueError(f"batch_size {batch_size!r} must be a number")
        self.batch_size = check_batch_size(self.model, None if batch_size is None else int(batch_size))
        context = self.model.config.max_position_embeddings
        self.max_length, self.max_gen_toks = context if max_length is None else max_length, max_gen_toks
        if not 1 <= self.max_length <= context:
            raise ValueError(f"max_length {max_length}: must be at least 1 and at most {context}, the model's context")

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer in the harness's cache keys."""
        return repr(self.tokenizer)

    def tok_encode(  # type: ignore[reportIncompatibleMethodOverride]  # the base class takes any keywords
        self, string: str, add_special_tokens: bool | None = None
    ) -> list[int]:
        """The ids of a text. By default `</s>` is added unless the text begins with it."""
        special = not string.startswith(self.tokenizer.bos_token) if add_special_tokens is None else add_special_tokens
        return self.tokenizer(string, return_tensors=None, add_special_tokens=special)["input_ids"]

    def _loglikelihood_tokens(  # type: ignore[reportIncompatibleMethodOverride]  # likewise
        self, requests: Sequence[Pair], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is the greedy continuation) of each request.

        Requests of similar lengths share a batch. Batches have few shapes: `batch_size` rows (a bucket for the last
        batch) and a bucket of columns. A context that is too long is truncated at its beginning.
        """
        rows = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        for (_, context, continuation), row in zip(requests, rows, strict=True):
            if not context or not 0 < len(continuation) < len(row):
                raise ValueError(
                    f"a context of {len(context)} and a continuation of {len(continuation)} tokens: neither may be "
                    f"empty, and the continuation may have at most {self.max_length}"
                )
        results: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        bar = tqdm(total=len(rows), desc="scoring", disable=disable_tqdm or jax.process_index() > 0)
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            logprobs, greedy = self._score([rows[i] for i in batch])
            for i, values, best in zip(batch, logprobs, greedy, strict=True):
                name, _, continuation = requests[i]
                last = np.s_[-len(continuation) :]
                results[i] = float(np.sum(values[last], dtype=np.float64)), bool(best[last].all())
                if name is not None:
                    self.cache_hook.add_partial("loglikelihood", name, results[i])
            bar.update(len(batch))
            processes.reached(f"request {first + len(batch)}")
        bar.close()
        return results

    def _score(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """`model.score` of rows of different lengths, padded on the left."""
        count = min(batch_bucket(len(rows)), self.batch_size)
        ids, mask = np.zeros((count, len(rows[0])), np.int32), np.zeros((count, len(rows[0])), bool)
        for row, real, tokens in zip(ids, mask, rows + rows[:1] * (count - len(rows)), strict=True):
            row[-len(tokens) :], real[-len(tokens) :] = tokens, True
        logprobs, greedy = self.model.score(ids, mask, return_greedy=True)
        return logprobs[: len(rows)], greedy[: len(rows)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of complete texts, in windows of `max_length`. Windows of all texts share batches.

        As in `hf`, a prefix `</s>` is added even if the text begins with `</s>`, which is then scored too.
        """
        texts = [request.args[0] for request in requests]
        windows: list[Pair] = []
        owners: list[int] = []
        for owner, text in enumerate(texts):
            pairs = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            owners += [owner] * (len(windows) - len(owners))
        values = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        sums = [0.0] * len(texts)
        for owner, (value, _) in zip(owners, values, strict=True):
            sums[owner] += value
        for text, value in zip(texts, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), value)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, which is cut off. A task's options are those of `model.generate`.

        Raises:
          ValueError: an option that `generate` does not have; or there are several processes.
        """
        if jax.process_count() > 1:
            raise ValueError("tasks that generate text are for a single process: choose others for a job of several")
        results = [""] * len(requests)
        groups: dict[str, list[int]] = {}  # by their options
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for group in groups.values():
            contexts, given = [requests[i].args[0] for i in group], requests[group[0]].args[1]
            for i, text in zip(group, self._generate(contexts, given, not disable_tqdm), strict=True):
                results[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return results

    def _generate(self, contexts: list[str], given: dict[str, Any], progress: bool) -> list[str]:
        options: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        until = handle_stop_sequences(options.pop("until"), eos=self.tokenizer.eos_token)
        new = options.pop("max_gen_toks")
        if not options["do_sample"]:  # tasks have such options nevertheless; HF warns
            for name in {*SAMPLING} & set(options):
                options.pop(name)
        if new >= self.max_length:
            raise ValueError(
                f"{new} new tokens leave no room for a prompt in the context of {self.max_length}: give the task "
                "max_gen_toks (in its generation_kwargs), or OPTLM a smaller one"
            )
        prompts = [self.tok_encode(context)[new - self.max_length :] for context in contexts]
        stops, tokenizer = [text for text in until if text], _NewText(self.tokenizer)
        out = self.model.generate(
            prompts,
            max_new_tokens=new,
            stop_strings=stops,
            tokenizer=tokenizer,
            batch_size=self.batch_size,
            progress_bar=None if progress else False,
            **options,
        )
        columns = out.sequences[:, max(map(len, prompts)) :]
        new_tokens = [row[:count] for row, count in zip(columns, out.lengths, strict=True)]
        texts = self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        return [postprocess_generated_text(text, until, None) for text in texts]


class _NewText:
    """A tokenizer whose stop strings may not begin in the prompt, because the harness searches only new text."""

    def __init__(self, tokenizer: OPTTokenizer):
        self._tokenizer = tokenizer

    def stop_strings(self, strings: Sequence[str], prompts: Sequence[Any], vocab_size: int) -> Any:
        return self._tokenizer.stop_strings(strings, [np.zeros(0, np.int32)] * len(prompts), vocab_size)


# The command --------------------------------------------------------------------------------------------------


def find_tasks(names: Sequence[str], include_path: Sequence[str]) -> tuple[TaskManager, list[str]]:
    """The tasks for `run`. The harness's own 14,000 tasks are read (13 s) only if a name is not in `include_path`.

    Raises:
      ValueError, FileNotFoundError: there is no such task, or no such directory.
    """
    if absent := [path for path in include_path if not Path(path).is_dir()]:
        raise FileNotFoundError(f"--include-path {absent[0]}: no such directory")
    names = [part for name in names for part in name.split(",") if part]
    for defaults in (False, True):
        try:
            manager = TaskManager(include_path=list(include_path), include_defaults=defaults)
        except Exception as e:  # of a file that is no task, where the harness expects nothing else
            raise ValueError(f"--include-path {' '.join(include_path)}: the tasks there cannot be read ({e!r})") from e
        missing = [name for name in names if not manager.match_tasks([name])]
        if not missing:
            return manager, manager.match_tasks(names)
    raise ValueError(f"--tasks {missing[0]}: no such task, neither in --include-path nor in lm-eval (lm-eval ls tasks)")


def run(
    model: OPTForCausalLM,
    tokenizer: OPTTokenizer,
    tasks: tuple[TaskManager, list[str]],
    batch_size: int | None = None,
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    log_samples: bool = False,
) -> dict[str, Any]:
    """The results of `lm_eval.simple_evaluate`: "results", "samples" (with `log_samples`), all else as "harness"."""
    make: Any = OPTLM
    lm = make(model, tokenizer=tokenizer, batch_size=batch_size)
    evaluate: Any = simple_evaluate
    report = evaluate(
        model=lm,
        tasks=tasks[1],
        task_manager=tasks[0],
        num_fewshot=num_fewshot,
        batch_size=lm.batch_size,
        limit=int(limit) if limit is not None and limit >= 1 else limit,
        log_samples=log_samples,
    )
    sections = ("results", "samples")
    harness = {name: value for name, value in report.items() if name not in sections}
    return {name: report[name] for name in sections if name in report} | {"harness": harness}


def tables(report: dict[str, Any]) -> str:
    """The results of `run` as the harness's own tables, for the terminal."""
    merged = report["harness"] | report
    return "\n".join(make_table(merged, kind) for kind in ("results", "groups") if merged.get(kind))
