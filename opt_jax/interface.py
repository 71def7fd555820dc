"""Methods that lead from the models and `OPTConfig` to other rooms, with the names of `transformers`.

The functions are imported when a method is first looked up. A method has the signature and docstring of its function.
"""

import functools
import importlib
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

from opt_jax.checkpoints import hf_scripts

if TYPE_CHECKING:
    from opt_jax.checkpoints import pretrained, publish, saving
    from opt_jax.checkpoints.formats import config_json
    from opt_jax.generation import generate as generating
    from opt_jax.generation.config import GenerationConfig
    from opt_jax.model import embeddings, interventions

# For `OPTConfig`.
unchangeable = hf_scripts.unchangeable(
    "write from_pretrained(..., {name}={value}), or a new config: dataclasses.replace(config, {name}={value})",
    hf_scripts.CONFIG,
)


Model = TypeVar("Model", bound="ModelMethods")


class Delegate:
    """A method whose code is a function elsewhere in this package.

    Args:
      module: the function's module.
      name: the function's name.
      of_class: whether it is a class method.
    """

    def __init__(self, module: str, name: str, of_class: bool = False):
        self.module, self.name, self.of_class = module, name, of_class

    def __get__(self, instance: Any, owner: type) -> Any:
        function = getattr(importlib.import_module(f"opt_jax.{self.module}"), self.name)
        receiver = owner if self.of_class else instance
        return function if receiver is None else MethodType(function, receiver)


class ConfigMethods:
    """Methods of `OPTConfig`. Fields of its file that are not part of the architecture are attributes, too."""

    model_type = "opt"

    if TYPE_CHECKING:
        from_dict = classmethod(config_json.from_hf)
        to_dict = config_json.to_hf
        from_hf = classmethod(config_json.from_hf)
        from_pretrained = classmethod(config_json.from_pretrained)
        to_hf = config_json.to_hf
        save_pretrained = config_json.save_pretrained
    else:

        def __new__(cls, *_: Any, **fields: Any) -> Any:
            hf_scripts.check_fields(cls, fields)
            return super().__new__(cls)

        def __getattr__(self, name: str) -> Any:
            if name in ("id2label", "label2id"):
                return importlib.import_module("opt_jax.checkpoints.formats.config_json").labels(self)[name]
            if name in (extra := self.__dict__.get("extra", {})):
                return extra[name]
            raise hf_scripts.no_attribute(type(self).__name__, name, hf_scripts.CONFIG)

        from_hf = from_dict = Delegate("checkpoints.formats.config_json", "from_hf", of_class=True)
        from_pretrained = Delegate("checkpoints.formats.config_json", "from_pretrained", of_class=True)
        to_hf = to_dict = Delegate("checkpoints.formats.config_json", "to_hf")
        save_pretrained = Delegate("checkpoints.formats.config_json", "save_pretrained")


def _collects(method: Any) -> bool:
    """Whether qwix has wrapped a method for one of its calibrations. Only the wrapper's closure knows the provider."""
    cells = [cell.cell_contents for cell in method.__closure__ or ()]
    providers = [cell.args[0] for cell in cells if isinstance(cell, functools.partial) and cell.args]
    return any(base.__name__ == "CalibrationProvider" for provider in providers for base in type(provider).__mro__)


class ModelMethods:
    """Methods of all models."""

    if TYPE_CHECKING:
        from_pretrained = classmethod(pretrained.load_pretrained)
        save_pretrained = saving.save_pretrained
        push_to_hub = publish.push_model
        num_parameters = embeddings.num_parameters
        get_input_embeddings = embeddings.get_input_embeddings
        get_output_embeddings = embeddings.get_output_embeddings
        resize_token_embeddings = embeddings.resize_token_embeddings
        run_with_cache = interventions.run_with_cache
        run_with_hooks = interventions.run_with_hooks
    else:
        from_pretrained = Delegate("checkpoints.pretrained", "load_pretrained", of_class=True)
        save_pretrained = Delegate("checkpoints.saving", "save_pretrained")
        push_to_hub = Delegate("checkpoints.publish", "push_model")
        num_parameters = Delegate("model.embeddings", "num_parameters")
        get_input_embeddings = Delegate("model.embeddings", "get_input_embeddings")
        get_output_embeddings = Delegate("model.embeddings", "get_output_embeddings")
        resize_token_embeddings = Delegate("model.embeddings", "resize_token_embeddings")
        run_with_cache = Delegate("model.interventions", "run_with_cache")
        run_with_hooks = Delegate("model.interventions", "run_with_hooks")
        __repr__ = __str__ = Delegate("model.embeddings", "summary")

        def __getattr__(self, name: str) -> Any:
            raise hf_scripts.no_attribute(type(self).__name__, name, hf_scripts.MODEL)

    def _is_watched(self) -> bool:
        """Whether a tool that sees nothing inside `jax.jit` looks at this call: nnx.capture, or a provider of qwix.

        Raises:
          ValueError: a collector of qwix, which sees nothing inside `lax.scan` either, looks at stacked layers.
        """
        model: Any = self
        wrapped = vars(type(self)).get("__call__") if hasattr(type(self), "_unquantized_type") else None
        if wrapped is not None and _collects(wrapped) and hasattr(model.base_model.decoder.layers, "fc1"):
            raise ValueError("qwix collects nothing from stacked layers: use opt_jax.unstack_layers(model)")
        return wrapped is not None or hasattr(self, "__captures__")

    def _with_hooks(self, inputs: Any) -> Any:
        """The output of a base model for a call with `hooks`."""
        return importlib.import_module("opt_jax.model.hooked_call").run(self, inputs)

    def __copy__(self) -> Any:
        """A model with the same arrays and modules of its own: resizing one's embeddings leaves the other alone."""
        return importlib.import_module("flax.nnx").clone(self)

    @property
    def generation_config(self) -> "GenerationConfig":
        """The defaults of `generate`: those of the checkpoint's generation_config.json, or what was assigned."""
        return importlib.import_module("opt_jax.generation.request").config_of(self)

    @generation_config.setter
    def generation_config(self, config: "GenerationConfig | None") -> None:
        importlib.import_module("opt_jax.generation.request").assign_config(self, config)

    @classmethod
    def from_config(cls: type[Model], config: Any, **options: Any) -> Model:
        """A model with newly drawn parameters: the constructor, under the name of `transformers`."""
        constructor: Any = cls
        return constructor(config, **hf_scripts.known("from_config", options, hf_scripts.LOADING))

    def eval(self) -> Any:
        """The model itself: it has no training mode, and dropout only in calls with a `dropout_key`."""
        return self

    def train(self, mode: bool = True) -> Any:
        """The model itself for `mode=False`; as `eval`.

        Raises:
          ValueError: mode is True.
        """
        if mode:
            raise ValueError(f"a model has no training mode: {hf_scripts.MODEL['training']}")
        return self

    def _known_arguments(self: Any, options: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call; ValueError for those that only `transformers` has, and for hooks with a mistake."""
        options = hf_scripts.known("a model's call", options, hf_scripts.CALL)
        if options.get("hooks") is not None:
            interventions = importlib.import_module("opt_jax.model.interventions")
            options["hooks"] = interventions.as_hooks(self.config, options["hooks"])
        return options

    @classmethod
    def _keys(cls, config: Any, rngs: Any) -> Any:
        """The `rngs` of a constructor; ValueError if they are missing, or `config` is none."""
        name = cls.__name__
        if hasattr(config, "to_dict") and not isinstance(config, ConfigMethods):
            raise ValueError(f"{name} takes an opt_jax.OPTConfig: write OPTConfig.from_dict(config.to_dict())")
        if not isinstance(config, ConfigMethods):
            raise ValueError(f"{name} takes an OPTConfig, not a {type(config).__name__}: {name}.from_pretrained loads")
        if rngs is None:
            raise ValueError(f"{name}(config) draws its parameters: pass rngs=nnx.Rngs(0), with `from flax import nnx`")
        return rngs


class OutputMethods:
    """Methods of what models return."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise hf_scripts.no_attribute(type(self).__name__, name, hf_scripts.OUTPUT)


class GenerationMethods:
    """Methods of the causal language model."""

    if TYPE_CHECKING:
        generate = generating.generate
        prefill = generating.prefill

        def score(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Any:
            """See `opt_jax.generation.scoring.score`."""

    else:
        generate = Delegate("generation.generate", "generate")
        prefill = Delegate("generation.generate", "prefill")
        score = Delegate("generation.scoring", "score")
