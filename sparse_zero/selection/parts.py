"""The parts of a composite model: the language model, and the towers and projectors around it.

A part is told by its configuration. In transformers, each part of a composite model has its own sub-config, and the
modules of a part keep it as `config`.
"""

import re
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

LANGUAGE, OTHER = "language", "other"

TEXT_CONFIGS = ("text_config", "text_encoder", "encoder", "decoder", "encoder_config", "decoder_config", "generator")
"""What composite configs call those of their text models. An encoder or decoder may also be that of a tower."""


class Parts:
    """Which modules of a model belong to its language model, by module name."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kinds: dict[str, str] = {}
        """LANGUAGE or OTHER. All of a model without sub-configs is one part."""
        self.families: dict[str, str | None] = {}
        """The `model_type` of each module's part."""
        text = _text_configs(_config_of(model))
        configs: dict[str, PreTrainedConfig | None] = {}
        for name, module in model.named_modules():
            above = name.rpartition(".")[0]
            inherited, own = configs.get(above) if name else None, _config_of(module)
            if name and (own is None or type(own) is type(inherited)):
                configs[name], self.kinds[name] = inherited, self.kinds[above]
            else:
                configs[name], self.kinds[name] = own, _kind(module, own, text)
            self.families[name] = getattr(configs[name], "model_type", None)
        self._around_language = {
            ".".join(name.split(".")[:depth])
            for name in self.kinds
            if self.kinds[name] == LANGUAGE
            for depth in range(name.count(".") + 2)
        }

    @property
    def has_language_model(self) -> bool:
        """Whether a part writes text: it has an output embedding or causal attention. Text encoders do not."""
        modules = dict(self.model.named_modules())
        return any(
            getattr(modules[name], "is_causal", False) is True or _has_head(modules[name])
            for name in self._around_language
        )

    def language_modules(self) -> list[str]:
        """The names of the language model's outermost modules; [""] if it is the model itself."""
        return self._outermost(name for name, kind in self.kinds.items() if kind == LANGUAGE)

    def beside_language(self, linear: Iterable[str]) -> list[str]:
        """The names of the outermost modules outside the language model that have linear layers."""
        inside = {".".join(name.split(".")[:depth]) for name in linear for depth in range(name.count(".") + 2)}
        outside = [name for name, kind in self.kinds.items() if kind == OTHER and name not in self._around_language]
        return self._outermost(name for name in outside if name in inside)

    def _outermost(self, names: Iterable[str]) -> list[str]:
        found: dict[str, str] = {}
        for name in names:
            above = (".".join(name.split(".")[:depth]) for depth in range(name.count(".") + 1))
            if not any(prefix in found for prefix in above):
                found[name] = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        return list(dict.fromkeys(found.values()))


def _config_of(module: nn.Module) -> PreTrainedConfig | None:
    config = getattr(module, "config", None)
    return config if isinstance(config, PreTrainedConfig) else None


def _text_configs(config: PreTrainedConfig | None) -> list[PreTrainedConfig]:
    """The configs of the text models in a model, which may be its own."""
    if config is None:
        return []
    named = [getattr(config, name, None) for name in TEXT_CONFIGS]
    found = [sub for sub in named if isinstance(sub, PreTrainedConfig)]
    try:
        text = config.get_text_config()
    except ValueError:  # several text models, each found by its name
        return found
    if text is config and not found:
        # A model around a composite model, e.g. ColPali
        subs = [sub for sub in vars(config).values() if isinstance(sub, PreTrainedConfig)]
        found = [inner for sub in subs if (inner := _inner_text_config(sub)) is not sub]
    return [text, *found]


def _inner_text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    text = getattr(config, "text_config", None)
    return text if isinstance(text, PreTrainedConfig) else config


def _kind(module: nn.Module, config: PreTrainedConfig | None, text: list[PreTrainedConfig]) -> str:
    if config is None:
        return LANGUAGE
    modalities = getattr(module, "input_modalities", "text")
    reads_text = "text" in ((modalities,) if isinstance(modalities, str) else modalities)
    return LANGUAGE if reads_text and any(type(config) is type(sub) for sub in text) else OTHER


def _has_head(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None
