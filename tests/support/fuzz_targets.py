"""The readers to which `fuzz_worker.py` gives damaged files and wild arguments. Not a test.

Each target writes valid files, lets the library read damaged ones, and knows which results are allowed.
"""

import json
import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any


class Target:
    """A part of the library that reads files or takes arguments. The files of a case are in `directory`."""

    writes = ()  # names in the directory that reading may write

    def __init__(self, root: Path):
        self.directory = root / "case"
        self.base = root / "bases" / type(self).__name__
        self.base.mkdir(parents=True)

    def files(self) -> dict[str, bytes]:
        return {str(p.relative_to(self.base)): p.read_bytes() for p in sorted(self.base.rglob("*")) if p.is_file()}

    def put(self, case: Any) -> None:
        name, content = case
        shutil.copytree(self.base, self.directory)
        (self.directory / name).write_bytes(content)

    def read(self, case: Any) -> str | None:
        """Read the case. Returns what is wrong with the result, or None. Raises what the library raises."""
        raise NotImplementedError


class Config(Target):
    def __init__(self, root: Path):
        from support.hf_files import TINY

        super().__init__(root)
        config = TINY | {
            "id2label": {"0": "no", "1": "yes"},
            "label2id": {"no": 0, "yes": 1},
            "dtype": "float16",
            "eos_token_id": [2, 3],
            "quantization_config": {"quant_method": "gptq", "bits": 4},
            "num_labels": 2,
            "problem_type": None,
            "init_std": 0.02,
            "dropout": 0.1,
            "bos_token_id": 2,
            "word_embed_proj_dim": 8,
            "enable_bias": True,
        }
        options = {
            "do_sample": True,
            "top_k": 5,
            "top_p": 0.9,
            "eos_token_id": [2],
            "bad_words_ids": [[3]],
            "max_length": 9,
        }
        contents = {
            "config.json": config,
            "generation_config.json": options,
            "run.json": {"options": {"task": None, "steps": 3}, "model": TINY},
            "model.safetensors.index.json": {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "b.bin"}},
        }
        for name, content in contents.items():
            (self.base / name).write_text(json.dumps(content))

    def put(self, case: Any) -> None:
        super().put(case)
        step = self.directory / "checkpoints" / "3"
        (step / "params").mkdir(parents=True)
        (step / "params" / "_METADATA").write_text("{}")
        if case[0] == "run.json":
            (self.directory / "config.json").unlink()

    def read(self, case: Any) -> str | None:
        from opt_jax import GenerationConfig, OPTConfig
        from opt_jax.checkpoints import hub, pretrained
        from opt_jax.checkpoints.formats import weight_files
        from opt_jax.generation.config import combine, parse

        name, content = case
        if name == "config.json":
            config, _ = pretrained.read_config(self.directory)
            hint = hub.quantization_hint(self.directory)
            written = json.dumps(config.to_hf())
            again = OPTConfig.from_hf(json.loads(written))
            same = json.dumps(again.to_hf()) == written and config == OPTConfig.from_hf(self.directory)
            return (
                None
                if (same or "NaN" in written) and hint.isprintable() and len(hint) < 500
                else "it does not come back"
            )
        if name == "generation_config.json":
            with warnings.catch_warnings(record=True) as notes:  # of fields without effect
                warnings.simplefilter("always")
                config = GenerationConfig.from_pretrained(self.directory)
                try:
                    config.check()
                    combine(parse(content.decode("utf-8", "replace"), name), None, {})
                except ValueError as e:
                    raise ValueError(f"{self.directory}: {e}") from None  # callers add the name of the file
            return next((f"a note: {note.message!r}" for note in notes if not str(note.message).isprintable()), None)
        elif name == "run.json":
            pretrained.read_config(self.directory / "checkpoints" / "3")
        else:
            names = set(weight_files.read_index(self.directory / name).values())
            return None if all(os.path.basename(file) == file for file in names) else f"names {names}"
        return None


class Tokenizers(Target):
    """`fast/` has tokenizer.json, `slow/` has vocab.json and merges.txt."""

    def __init__(self, root: Path):
        from opt_jax import OPTTokenizer

        super().__init__(root)
        words, merges = ["<s>", "<pad>", "</s>", "<unk>"], [("a", "b"), ("ab", "c"), ("\u0120", "a"), ("\u0120a", "b")]
        letters = [*(chr(c) for c in range(33, 127)), "\u0120", "\u010a"]
        vocabulary = {token: i for i, token in enumerate([*words, *letters, *("".join(pair) for pair in merges)])}
        slow, fast = self.base / "slow", self.base / "fast"
        for directory in (slow, fast):
            directory.mkdir()
        (slow / "vocab.json").write_text(json.dumps(vocabulary))
        (slow / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
        (slow / "tokenizer_config.json").write_text(json.dumps({"bos_token": "</s>", "model_max_length": 1000}))
        (slow / "special_tokens_map.json").write_text(
            json.dumps({"eos_token": "</s>", "pad_token": {"content": "<pad>"}})
        )
        (slow / "added_tokens.json").write_text(json.dumps({"<new>": len(vocabulary)}))
        OPTTokenizer.from_pretrained(slow).save_pretrained(fast)
        for name in ("vocab.json", "merges.txt"):
            (fast / name).unlink()
        config = json.loads((fast / "tokenizer_config.json").read_text())
        added = {
            "1": {"content": "<pad>", "special": True},
            str(len(vocabulary)): {"content": "<new>", "lstrip": False},
        }
        config |= {"added_tokens_decoder": added, "extra_special_tokens": ["<new>"], "truncation_side": "right"}
        (fast / "tokenizer_config.json").write_text(json.dumps(config))

    def read(self, case: Any) -> str | None:
        from opt_jax import OPTTokenizer

        name, _ = case
        tokenizer = OPTTokenizer.from_pretrained(self.directory / name.partition("/")[0])
        try:
            ids = tokenizer("ab abc <new></s>\n\u2603", return_tensors=None).input_ids
            tokenizer(["ab", "abc abc"], truncation=True, max_length=2, padding=True, return_tensors=None)
            tokenizer.decode(ids, skip_special_tokens=True)
            tokenizer.batch_decode([ids, [0, 1, 2, 10**6]])
            for index in ids[:5]:
                tokenizer.token_bytes(index)
            _ = repr(tokenizer), len(tokenizer), tokenizer.all_special_ids
            tokenizer.stop_strings(["b"], [], 16)
        except ValueError as e:
            raise ValueError(f"{self.directory}: {e}") from None  # callers add the name of the directory
        return None if all(type(i) is int and i >= 0 for i in ids) else f"ids {ids}"


class Arrays(Target):
    """Token ids as .npy, and the JSON beside them, which names their tokenizer; and a directory of several arrays."""

    def __init__(self, root: Path):
        import numpy as np

        from opt_jax import OPTTokenizer
        from opt_jax.data import shards
        from opt_jax.data.tokens import hash_of_vocabulary

        super().__init__(root)
        self.tokenizer = OPTTokenizer.from_pretrained(root / "bases" / "Tokenizers" / "slow")
        np.save(self.base / "a.npy", np.arange(50, dtype=np.uint16))
        description = {
            "tokens": 50,
            "documents": 1,
            "tokenizer": {"name": "slow", "fingerprint": hash_of_vocabulary(self.tokenizer)},
            "sources": ["x"],
        }
        (self.base / "a.npy.json").write_text(json.dumps(description))
        for name in ("a", "b"):
            (self.base / f"{name}.txt").write_text("a text\n" * 9)
        size, shards._INPUT = shards._INPUT, 1  # a file becomes an array
        try:
            texts = [self.base / "a.txt", self.base / "b.txt"]
            shards.write_arrays(texts, self.base / "many", self.tokenizer, "slow")
        finally:
            shards._INPUT = size
        for text in texts:
            text.unlink()

    def read(self, case: Any) -> str | None:
        from opt_jax.data.arrays import INDEX
        from opt_jax.data.tokens import open_tokens

        name = INDEX if case[0].startswith("many/") else "a.npy"
        tokens = open_tokens((self.directory / case[0]).with_name(name), self.tokenizer)
        length = len(tokens)
        if length > 1000:
            return f"{length} tokens"
        tokens.hash_of_ids()
        for part in tokens.split(0.1, 2) if length else ():
            part.read(0, len(part))
        return None


class Generation(Target):
    """The checks of the options of `generate`."""

    def __init__(self, root: Path):
        import jax
        import numpy as np
        from flax import nnx
        from support.hf_files import TINY

        from opt_jax import OPTConfig, OPTForCausalLM, OPTTokenizer, named_parameters

        super().__init__(root)
        config = OPTConfig.from_hf(TINY)
        self.model = nnx.eval_shape(lambda: OPTForCausalLM(config, rngs=nnx.Rngs(0)))
        for param in named_parameters(self.model).values():
            param.set_value(jax.device_put(np.zeros(param.get_value().shape, np.float32)))
        self.tokenizer = OPTTokenizer.from_pretrained(root / "bases" / "Tokenizers" / "slow")

    def files(self) -> dict[str, bytes]:
        from opt_jax.generation.config import FIELDS

        return dict.fromkeys((*FIELDS, "penalty_alpha", "use_cache", "num_beam_groups", "no_such_option"), b"")

    def put(self, case: Any) -> None:
        self.directory.mkdir()

    def read(self, case: Any) -> str | None:
        from opt_jax.generation.drafts import check_drafts
        from opt_jax.generation.engines import check_fits
        from opt_jax.generation.request import check_batch_size, check_request

        case = {"tokenizer": self.tokenizer} | case
        batch_size, assistant = case.pop("batch_size", None), case.pop("assistant_model", None)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "prompts padded on the right were moved")
            request = check_request(self.model, **case)
        check_batch_size(batch_size, None)
        check_drafts(self.model, request, assistant)
        check_fits(self.model, request, request.rows, request.capacity)
        return None if 1 <= request.max_new_tokens <= self.model.config.max_position_embeddings else "too many tokens"


class Hub(Target):
    """`hub.resolve` of a repository on a server in this process. It may write to the cache only."""

    writes = ("cache",)

    def __init__(self, root: Path):
        from support import hub_server

        super().__init__(root)
        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it logs each retry
        self.server = hub_server.HubServer()
        env = hub_server.environment(self.server.endpoint, root / "home", HF_HUB_DISABLE_PROGRESS_BARS="1")
        os.environ.clear()  # also of HF_XET_HIGH_PERFORMANCE, which importing lm_eval sets
        os.environ.update(env)
        self.server.__enter__()
        self.contents = {"config.json": b"{}", "merges.txt": b"merges", "model.safetensors": b"weights"}

    def files(self) -> dict[str, bytes]:
        """The valid answers of the server: kind -> JSON."""
        from support.hub_server import Repository

        answers: dict[str, bytes] = {}

        def note(kind: str, content: Any) -> Any:
            answers[kind] = json.dumps(content).encode()
            return content

        self.put(("sent", {}))
        self.server.repositories["org/model"] = Repository(dict(self.contents), lie=note)
        self.resolve()  # with the normal timeouts: the first request may be slow
        shutil.rmtree(self.directory)
        return answers

    def put(self, case: Any) -> None:
        from support.hub_server import Repository

        kind, what = case
        self.directory.mkdir()
        self.server.repositories["org/model"] = self.repository = repository = Repository(dict(self.contents))
        if kind == "headers":
            repository.headers = what
            repository.lie = lambda kind, content: (
                [{k: v for k, v in file.items() if k != "oid"} for file in content] if kind == "tree" else content
            )
        elif kind == "statuses":
            repository.statuses, repository.busy = list(what[0]), what[1]
        elif kind == "sent":
            repository.sent = what
        else:
            from support.fuzz_cases import edited

            repository.lie = lambda answer, content: (
                edited(json.dumps(content).encode(), what) if answer == kind else content
            )

    def resolve(self) -> Path:
        from opt_jax.checkpoints import hub

        return hub.resolve("org/model", cache_dir=self.directory / "cache")

    def read(self, case: Any) -> str | None:
        import warnings

        from opt_jax.checkpoints import answers, download

        answers.ANSWER_SECONDS, answers.ANSWERS_SECONDS, answers.STALL_SECONDS, answers.LONGEST_WAIT = 0.5, 1.5, 0.2, 0
        download._WAITS = (0.01,) * 4
        with warnings.catch_warnings(action="ignore"):  # those of huggingface_hub
            folder = self.resolve()
        valid = {name: self.repository.sent.get(name, content) for name, content in self.contents.items()}
        for path in folder.iterdir():
            # Small files have no checksum, and files with the same ETag share a blob.
            if path.read_bytes() != valid.get(path.name) and (case[0] != "headers" or path.suffix == ".safetensors"):
                return f"{path} has another content"
        return None if folder.is_relative_to(self.directory / "cache") else f"it is in {folder}"
