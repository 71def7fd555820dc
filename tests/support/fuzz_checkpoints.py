"""The targets of `fuzz_worker.py` that read arrays on disk: models and checkpoints of runs. Not a test."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from support.fuzz_targets import Target

_OCDBT = b"\x0c\xdb"  # the first bytes of manifests and nodes of TensorStore's database


class Model(Target):
    """The arrays of a model directory.

    `NAME@params` stands for a value in the database of `params`. `NAME@sealed` stands for a file whose checksum is
    computed after the damage, so that the damage is read.
    """

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
        self.valid = {name: (a.dtype, a.shape, a.load().tobytes()) for name, a in self.open(self.base).items()}

    @staticmethod
    def open(directory: Path) -> dict[str, Any]:
        from opt_jax.checkpoints import orbax

        return orbax.open_arrays(directory / "params")

    def _leave_uncompressed(self) -> None:
        """Write the database without compression. Otherwise Zstandard would notice nearly all damage."""
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
            [array.load() for path, array in arrays.items() if array.shape == self.valid.get(path, (0, 0, 0))[1]]
            return None
        if "@" not in name and arrays.keys() != self.valid.keys():
            return f"arrays {sorted(arrays)}"
        changed = name.partition("/")[0].replace(".layers.", ".layers.0.") if "@" in name else None
        for path, array in arrays.items():
            dtype, shape, content = self.valid.get(path, (None, None, None))
            if array.shape == shape:  # check_parameters refuses other shapes before they are read
                values = array.load().tobytes()
                if (array.dtype, values) != (dtype, content) and not (
                    "@" in name and changed and path[:5] == changed[:5]
                ):
                    return f"{path} has other values"
        return None


class Flax(Target):
    """A `flax_model.msgpack`, whose arrays have no checksums: damage of their bytes is read as it is."""

    def __init__(self, root: Path):
        import ml_dtypes
        import numpy as np
        from flax import serialization

        super().__init__(root)
        kernel, scale = np.arange(24, dtype=np.float32).reshape(4, 6), np.ones(3, ml_dtypes.bfloat16)
        chunks = {"0": np.arange(10, dtype=np.float16), "1": np.arange(5, dtype=np.float16)}
        chunked = {"__msgpack_chunked_array__": True, "shape": {"0": 5, "1": 3}, "chunks": chunks}
        tree = {"model": {"a": {"kernel": kernel, "scale": scale}, "b": {"embedding": chunked}, "empty": {}}}
        (self.base / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))

    def read(self, case: Any) -> str | None:
        from opt_jax.checkpoints.formats.flax_msgpack import read_flax

        name, content = case
        for path, array in read_flax(self.directory / name).items():
            stored = array.load().tobytes()
            if stored not in content and not (
                stored[:20] in content and stored[20:] in content
            ):  # the first chunk has 20
                return f"{path} has other bytes than the file"
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


class Quantized(Target):
    """The settings of a GPTQ checkpoint, and of its conversion to Orbax in `orbax/`: all numbers, or an error."""

    def __init__(self, root: Path):
        from support.gptq_files import write_gptq

        from convert.source import open_directory
        from convert.to_orbax import convert

        super().__init__(root)
        sizes = dict(hidden_size=8, ffn_dim=16, word_embed_proj_dim=8)
        write_gptq(self.base, group_size=8, desc_act=True, config=sizes)
        convert(open_directory(self.base), self.base / "orbax")
        self.valid = {name: self.floats(self.base / name) for name in (".", "orbax")}

    def files(self) -> dict[str, bytes]:
        return {name: content for name, content in super().files().items() if name.endswith("config.json")}

    @staticmethod
    def floats(directory: Path) -> dict[str, bytes]:
        from opt_jax.checkpoints import pretrained
        from opt_jax.checkpoints.formats.quantized import QuantizedArray
        from opt_jax.model.heads import OPTForCausalLM

        with warnings.catch_warnings(action="ignore"):
            config, _ = pretrained.read_config(directory)
            arrays, checks = pretrained.open_parameters(directory, config)
            pretrained.check_parameters(OPTForCausalLM, config, arrays, directory)
        for check in checks:
            check()
        lazy = (a.dequantized("float32") if isinstance(a, QuantizedArray) else a for a in arrays.values())
        return {path: array.load().tobytes() for path, array in zip(arrays, lazy, strict=True)}

    def read(self, case: Any) -> str | None:
        place = str(Path(case[0]).parent)
        return None if self.floats(self.directory / place) == self.valid[place] else "it has other numbers"


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


def _crc32c(content: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in content:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF
