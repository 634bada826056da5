"""The parts of a composite model: the language model, and the towers and projectors around it.

A part is told by its configuration. In transformers, each part of a composite model has its own sub-config, and the
modules of a part keep it as `config`.
"""

import re
from collections.abc import Iterable, Iterator

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

TEXT_CONFIGS = (
    *("text_config", "text_encoder", "encoder", "decoder", "encoder_config", "decoder_config", "generator"),
    *("llm_config", "language_config", "patcher_config", "global_config"),
)
"""What composite configs call those of their text models; BLT, which reads bytes, has four. An encoder or decoder may
also be that of a tower."""


class Parts:
    """Which modules of a model belong to its text models, and which to other parts. By module name."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.is_text: dict[str, bool] = {}
        """False for towers, projectors and heads. A model without a config is one text model."""
        self.configs: dict[str, PreTrainedConfig | None] = {}
        """The config of each module's part."""
        text = _text_configs(_config_of(model))
        for name, module in self.modules.items():
            above, own = name.rpartition(".")[0], _config_of(module)
            if name and (own is None or type(own) is type(self.configs[above])):
                self.configs[name], self.is_text[name] = self.configs[above], self.is_text[above]
            else:
                self.configs[name], self.is_text[name] = own, _is_text(module, own, text)
        self._mark_what_feeds_the_text_model()
        self._around_text = {above for name, is_text in self.is_text.items() if is_text for above in _path(name)}

    def _mark_what_feeds_the_text_model(self) -> None:
        """If the text model is the model itself: modules that hold a tower, but not the embedding of the tokens."""
        embedding = _embedding_of(self.modules[""]) if self.is_text[""] else None
        embeddings = {above for name, module in self.modules.items() if module is embedding for above in _path(name)}
        holders = {above for name in self.own_configs() if not self.is_text[name] for above in _path(name)}
        if embeddings:
            for name in self.modules:
                if any(above in holders - embeddings for above in _path(name)):
                    self.is_text[name] = False

    def family(self, name: str) -> str | None:
        """The `model_type` of a module's part."""
        return getattr(self.configs[name], "model_type", None)

    def own_configs(self) -> list[str]:
        """The names of the modules that have another config than the whole model: towers and text models."""
        root = type(self.configs[""])
        return [name for name, config in self.configs.items() if type(config) is not root]

    def has_towers(self, linear: Iterable[str]) -> bool:
        """Whether a linear layer lies in a part with a config of its own that is no text model.

        A model that reads nothing but text has no tower, as far as its classes say what they read.
        """
        own = self.own_configs()
        if all(set(_modalities(self.modules[name])) == {"text"} for name in ("", *own)):
            return False
        return any(not self.is_text[name] for name in set(own).intersection(linear))

    @property
    def has_language_model(self) -> bool:
        """Whether a text model writes text. Encoders, such as CLIP's, have neither a head nor causal attention."""
        text = [name for name, is_text in self.is_text.items() if is_text]
        return any(
            getattr(self.modules[name], "is_causal", False) is True or _is_decoder(self.configs[name]) for name in text
        ) or any(map(self._has_head, self._around_text))

    def text_models(self) -> list[str]:
        """The names of the outermost modules of text models; [""] if it is the model itself."""
        return _outermost(name for name, is_text in self.is_text.items() if is_text)

    def beside_text(self, linear: Iterable[str]) -> list[str]:
        """The names of the outermost modules outside text models that have linear layers."""
        heads = {id(self.modules[name].get_output_embeddings()) for name in self._around_text if self._has_head(name)}
        inside = {above for name in linear for above in _path(name)}
        outside = (name for name in self.modules if name in inside and name not in self._around_text)
        return _outermost(name for name in outside if id(self.modules[name]) not in heads)

    def _has_head(self, name: str) -> bool:
        module = self.modules[name]
        return isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None


def outermost_of(parts: Iterable[str], linear: Iterable[str]) -> list[str]:
    """The outermost of some modules that contain one of the linear layers."""
    inside = {above for name in linear for above in _path(name)}
    return _outermost(name for name in parts if name in inside)


def _outermost(names: Iterable[str]) -> list[str]:
    """Those that are in none of the others, with * for the numbers of layers. `names` is in the order of the model."""
    found: list[str] = []
    for name in names:
        if set(found).isdisjoint(_path(name)):
            found.append(name)
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in found))


def _path(name: str) -> Iterator[str]:
    """The names of a module and of those around it, from the whole model, "", on."""
    yield ""
    parts = name.split(".") if name else []
    for depth in range(1, len(parts) + 1):
        yield ".".join(parts[:depth])


def _config_of(module: nn.Module) -> PreTrainedConfig | None:
    config = getattr(module, "config", None)
    return config if isinstance(config, PreTrainedConfig) else None


def _embedding_of(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    except NotImplementedError:  # e.g. a model of sounds
        return None


def _sub_configs(config: PreTrainedConfig, names: Iterable[str]) -> list[PreTrainedConfig]:
    found = (getattr(config, name, None) for name in names)
    return [sub for sub in found if isinstance(sub, PreTrainedConfig)]


def _text_configs(config: PreTrainedConfig | None) -> list[PreTrainedConfig]:
    """The configs of the text models in a model, which may be its own."""
    if config is None:
        return []
    found = _sub_configs(config, TEXT_CONFIGS)
    # T5Gemma 2's encoder reads images, and has a text model
    found += [inner for sub in found for inner in _sub_configs(sub, ["text_config"])]
    try:
        text = config.get_text_config()
    except ValueError:  # several text models, each found by its name
        return found
    if text is config and not found:
        # A decoder by any name, or that in a composite model within this one, e.g. ColPali
        subs = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
        found = [sub for sub in subs if _is_decoder(sub)]
        found += [inner for sub in subs for inner in _sub_configs(sub, ["text_config"])]
    return [text, *found]


def _is_text(module: nn.Module, config: PreTrainedConfig | None, text: list[PreTrainedConfig]) -> bool:
    if config is None:
        return True
    if not isinstance(module, PreTrainedModel):
        return False  # a resampler or head with the text model's config
    return "text" in _modalities(module) and any(type(config) is type(sub) for sub in text)


def _modalities(module: nn.Module) -> tuple[str, ...]:
    found = getattr(module, "input_modalities", "text")
    return (found,) if isinstance(found, str) else tuple(found)


def _is_decoder(config: PreTrainedConfig | None) -> bool:
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
