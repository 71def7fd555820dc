"""What `fuzz_worker.py` gives damaged files and wild arguments to. Not a test.

Each target says which valid files there are, lets the library read the damaged ones, and knows what may come of it.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

_OCDBT = b"\x0c\xdb"  # how manifests and nodes of TensorStore's database begin


class Target:
    """What reads files, or takes arguments; the files of a case lie in `directory`, which nothing else may change."""

    writes = ()  # names in the directory that reading may add

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
        """What is wrong with what was read; raises what reading raises."""
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
        from opt_jax.checkpoints import download, hub, pretrained
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
            config = GenerationConfig.from_pretrained(self.directory)
            try:
                config.check()
                combine(parse(content.decode("utf-8", "replace"), name), None, {})
            except ValueError as e:
                raise ValueError(f"{self.directory}: {e}") from None  # which file, its caller knows
        elif name == "run.json":
            pretrained.read_config(self.directory / "checkpoints" / "3")
        else:
            names = set(download.read_index(self.directory / name).values())
            return None if all(os.path.basename(file) == file for file in names) else f"names {names}"
        return None


class Tokenizers(Target):
    """`fast/` has a tokenizer.json, `slow/` the two files that came before it."""

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
            raise ValueError(f"{self.directory}: {e}") from None  # which files, its caller knows
        return None if all(type(i) is int and i >= 0 for i in ids) else f"ids {ids}"


class Model(Target):
    """The arrays of a model directory. A file `NAME@params` is a value in the database of `params`; of a file
    `NAME@sealed` the checksum is made right after the damage, so that more than its comparison is tried."""

    def __init__(self, root: Path):
        import ml_dtypes
        import numpy as np

        from opt_jax.checkpoints import orbax
        from opt_jax.checkpoints.arrays import LazyArray

        super().__init__(root)
        rng = np.random.default_rng(0)
        self.arrays = {
            "m.embedding": rng.standard_normal((40, 8)).astype(np.float16),
            "m.layers.kernel": rng.standard_normal((2, 16, 20)).astype(np.float32),
            "m.norm": rng.standard_normal(5).astype(ml_dtypes.bfloat16),
        }
        arrays = {name: LazyArray(a.shape, a.dtype, a.__getitem__) for name, a in self.arrays.items()}
        orbax.write_arrays(self.base / "params", arrays)
        self._leave_uncompressed()
        self.whole = {name: (a.dtype, a.shape, a.load().tobytes()) for name, a in self.open(self.base).items()}

    @staticmethod
    def open(directory: Path) -> dict[str, Any]:
        from opt_jax.checkpoints import orbax

        return orbax.open_arrays(directory / "params")

    def _leave_uncompressed(self) -> None:
        """Write the database anew, or damage would hit little but Zstandard."""
        store = self.database(self.base)
        contents = {key: store.read(key).result().value for key in store.list().result()}
        (self.base / "params" / "manifest.ocdbt").unlink()
        for directory in ("d", "ocdbt.process_0"):
            shutil.rmtree(self.base / "params" / directory)
        store = self.database(self.base, config={"compression": None})
        for key, content in contents.items():
            store.write(key, content).result()

    def database(self, directory: Path, **more: Any) -> Any:
        import tensorstore as ts

        return ts.KvStore.open({"driver": "ocdbt", "base": f"file://{directory}/params/"} | more).result()

    def files(self) -> dict[str, bytes]:
        used = super().files()
        used |= {f"{name}@sealed": content for name, content in used.items() if content[:2] == _OCDBT}
        store = self.database(self.base)
        metadata = [key.decode() for key in store.list().result() if key.endswith(b"zarr.json")]
        used |= {f"{key}@params": store.read(key).result().value for key in metadata}
        zarr2 = {
            "zarr_format": 2,
            "shape": [5],
            "chunks": [5],
            "dtype": "<f4",
            "compressor": {"id": "zlib"},
            "fill_value": None,
            "filters": None,
            "order": "C",
            "dimension_separator": ".",
        }
        return used | {"m.norm/.zarray@params": json.dumps(zarr2).encode()}

    def put(self, case: Any) -> None:
        name, content = case
        key, at, _ = name.partition("@")
        if name.endswith("@sealed"):
            content = content[:4] + len(content).to_bytes(8, "little") + content[12:-4]
            content += _crc32c(content).to_bytes(4, "little")
        if name.endswith("@sealed") or not at:
            return super().put((key, content))
        shutil.copytree(self.base, self.directory)
        store = self.database(self.directory)
        if key.endswith(".zarray"):
            store.delete_range(type(store).KeyRange("m.norm/zarr.json", "m.norm/zarr.json\0")).result()
        store.write(key, content).result()

    def read(self, case: Any) -> str | None:
        import warnings

        name, _ = case
        with warnings.catch_warnings(action="ignore" if "@" in name else "error", category=UserWarning):
            arrays = self.open(self.directory)
        if name.endswith("@sealed"):
            [array.load() for path, array in arrays.items() if array.shape == self.whole.get(path, (0, 0, 0))[1]]
            return None
        if "@" not in name and arrays.keys() != self.whole.keys():
            return f"arrays {sorted(arrays)}"
        changed = name.partition("/")[0].replace(".layers.", ".layers.0.") if "@" in name else None
        for path, array in arrays.items():
            dtype, shape, content = self.whole.get(path, (None, None, None))
            if array.shape == shape:  # others are refused before they are read (check_parameters)
                values = array.load().tobytes()
                if (array.dtype, values) != (dtype, content) and not (
                    "@" in name and changed and path[:5] == changed[:5]
                ):
                    return f"{path} has other values"
        return None


class Adapter(Target):
    """A PEFT adapter, put onto a base of one layer."""

    def __init__(self, root: Path):
        import numpy as np
        from safetensors.numpy import save_file

        from opt_jax import OPTConfig
        from opt_jax.checkpoints.arrays import LazyArray
        from opt_jax.checkpoints.pretrained import expected_shapes
        from opt_jax.model.heads import OPTForCausalLM

        super().__init__(root)
        sizes: Any = dict(vocab_size=9, hidden_size=4, ffn_dim=8, num_hidden_layers=1, num_attention_heads=1)
        self.config, rng = OPTConfig(**sizes, max_position_embeddings=4), np.random.default_rng(0)
        arrays = {path: np.ones(shape, np.float32) for path, shape in expected_shapes(OPTForCausalLM, self.config)}
        self.arrays = {path: LazyArray(a.shape, a.dtype, a.__getitem__) for path, a in arrays.items()}
        name = "base_model.model.model.decoder.layers.0.fc1."
        tensors = {
            f"{name}lora_A.weight": rng.standard_normal((2, 4)).astype(np.float32),
            f"{name}lora_B.weight": rng.standard_normal((8, 2)).astype(np.float32),
            f"{name}bias": rng.standard_normal(8).astype(np.float32),
        }
        save_file(tensors, self.base / "adapter_model.safetensors")
        settings = dict(
            peft_type="LORA",
            task_type="CAUSAL_LM",
            base_model_name_or_path="base",
            r=4,
            lora_alpha=8,
            rank_pattern={"fc1": 2},
            alpha_pattern={"fc.": 3},
            target_modules=r".*\.fc1",
            exclude_modules=["fc2"],
            modules_to_save=None,
            layers_to_transform=[0],
            use_rslora=False,
            use_dora=False,
            init_lora_weights=True,
        )
        (self.base / "adapter_config.json").write_text(json.dumps(settings))

    def read(self, case: Any) -> str | None:
        from opt_jax.checkpoints.formats import peft

        opened = peft.open_adapter(self.directory)
        arrays, config = opened.onto(self.arrays, self.config, "base", causal=True)
        for path, array in arrays.items():
            if array.load().shape != array.shape or array.shape != self.arrays[path].shape:
                return f"{path} has shape {array.shape}"
        return None if config == self.config else f"{config}"


class Training(Target):
    """A checkpoint of a training run."""

    data = {"step": 3, "more": [1, {"a": None}]}

    def __init__(self, root: Path):
        super().__init__(root)
        with self.checkpoints(self.base) as checkpoints:
            checkpoints.save(3, self.state(3))

    @staticmethod
    def state(step: int) -> Any:
        import jax
        import numpy as np

        from opt_jax.training.step import TrainState

        model: Any = {"layers.kernel": np.arange(60, dtype=np.float32).reshape(2, 3, 10) + step}
        fields = (np.int32(step), model, {"m": np.full((3, 10), 0.5, np.float32)}, np.bool_(False))
        return TrainState(*jax.device_put(fields))

    @staticmethod
    def checkpoints(directory: Path) -> Any:
        from opt_jax.training.checkpoints import Checkpoints

        return Checkpoints(directory, keep=3, data_state=lambda step: Training.data)

    def files(self) -> dict[str, bytes]:
        return {name: content for name, content in super().files().items() if "ocdbt.process_" not in name}

    def read(self, case: Any) -> str | None:
        import jax
        import numpy as np

        shardings = jax.tree.map(lambda x: x.sharding, self.state(0))
        with self.checkpoints(self.directory) as checkpoints:
            step, state, data = checkpoints.restore_newest(jax.eval_shape(lambda: self.state(0)), shardings, print)
        same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), state, self.state(3))
        fine = step == 3 and all(jax.tree.leaves(same)) and (data == self.data or "crc32" not in case[1].decode())
        return None if fine else f"step {step}, {same}, {data}"


class Arrays(Target):
    """Token ids as .npy, and what says which tokenizer made them."""

    def __init__(self, root: Path):
        import numpy as np

        from opt_jax import OPTTokenizer
        from opt_jax.data.tokens import hash_of_vocabulary

        super().__init__(root)
        self.tokenizer = OPTTokenizer.from_pretrained(root / "bases" / "Tokenizers" / "slow")
        np.save(self.base / "a.npy", np.arange(50, dtype=np.uint16))
        fingerprint = hash_of_vocabulary(self.tokenizer)
        made_by = {
            "tokens": 50,
            "documents": 1,
            "tokenizer": {"name": "slow", "fingerprint": fingerprint},
            "sources": ["x"],
        }
        (self.base / "a.npy.json").write_text(json.dumps(made_by))

    def read(self, case: Any) -> str | None:
        from opt_jax.data.tokens import open_tokens

        tokens = open_tokens(self.directory / "a.npy", self.tokenizer)
        length = len(tokens)
        if length > 1000:
            return f"{length} tokens"
        tokens.hash_of_ids()
        for part in tokens.split(0.1, 2) if length else ():
            part.read(0, len(part))
        return None


class Generation(Target):
    """The checks of what `generate` is asked for."""

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
        request = check_request(self.model, **case)
        check_batch_size(batch_size, None)
        check_drafts(self.model, request, assistant)
        check_fits(self.model, request, request.rows, request.capacity)
        return None if 1 <= request.max_new_tokens <= self.model.config.max_position_embeddings else "too many tokens"


class Hub(Target):
    """`hub.resolve` of a repository on a server in this process; only the cache may be written to."""

    writes = ("cache",)

    def __init__(self, root: Path):
        from support import hub_server

        super().__init__(root)
        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it says each time that it tries again
        self.server = hub_server.HubServer()
        env = hub_server.environment(self.server.endpoint, root / "home", HF_HUB_DISABLE_PROGRESS_BARS="1")
        os.environ.clear()  # of HF_XET_HIGH_PERFORMANCE, too, which lm_eval sets when it is imported
        os.environ.update(env)
        self.server.__enter__()
        self.contents = {"config.json": b"{}", "merges.txt": b"merges", "model.safetensors": b"weights"}

    def files(self) -> dict[str, bytes]:
        """What the server answers, as it is asked."""
        from support.hub_server import Repository

        answers: dict[str, bytes] = {}

        def note(kind: str, content: Any) -> Any:
            answers[kind] = json.dumps(content).encode()
            return content

        self.put(("sent", {}))
        self.server.repositories["org/model"] = Repository(dict(self.contents), lie=note)
        self.resolve()  # with the waits that users have: the first request may be slow on a busy machine
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
        with warnings.catch_warnings(action="ignore"):  # huggingface_hub's own
            folder = self.resolve()
        whole = {name: self.repository.sent.get(name, content) for name, content in self.contents.items()}
        for path in folder.iterdir():
            # Of small files only the server knows what is in them; those with the same ETag are one.
            if path.read_bytes() != whole.get(path.name) and (case[0] != "headers" or path.suffix == ".safetensors"):
                return f"{path} has another content"
        return None if folder.is_relative_to(self.directory / "cache") else f"it is in {folder}"


def _crc32c(content: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in content:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


TARGETS = (Config, Tokenizers, Model, Adapter, Training, Arrays, Generation, Hub)
