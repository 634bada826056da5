"""Tiny random models of nearly every family of the installed transformers, with inputs for them."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers
from overrides import OVERRIDES, Override
from shrink import VOCABULARY, shrink
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LARGEST = 30_000_000
"""Scalars of a model. Families that stay larger need an entry in OVERRIDES."""

TASKS = (
    *("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM"),
    *("CTC", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "SEMANTIC_SEGMENTATION", "OBJECT_DETECTION"),
    *("DEPTH_ESTIMATION", "VIDEO_CLASSIFICATION", "PRETRAINING"),
)
MROPE = r"qwen2_vl|qwen2_5_vl|qwen2_5_omni|colqwen2|glm4v|glm46v|glm_image|glmga|glm_ocr|paddleocr"


class NotBuiltError(Exception):
    """The family has no model class, or no tiny model of it can be built."""


def families() -> list[str]:
    """Every `model_type` of the auto classes that has a model class, in alphabetical order."""
    return sorted(family for family in CONFIG_MAPPING if override(family).model_class or _mappings(family))


def model_class(family: str) -> type[PreTrainedModel]:
    """The class of the first of TASKS that the family has, or else its base model.

    Raises:
        NotBuiltError: transformers names classes that it does not have.
    """
    if name := override(family).model_class:
        return getattr(transformers, name)
    for mapping in _mappings(family):
        try:
            found = mapping[CONFIG_MAPPING[family]]
        except ValueError:
            continue
        return found[0] if isinstance(found, tuple | list) else found
    raise NotBuiltError("no model class")


def _mappings(family: str) -> list[Mapping]:
    """The auto classes' mappings that have the family, in the order of TASKS."""
    config = CONFIG_MAPPING[family]
    tasks = list(TASKS)
    if getattr(config, "is_encoder_decoder", False):
        tasks = ["SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM", *tasks]
    elif getattr(config, "is_decoder", None) is False:
        tasks = ["MASKED_LM", *tasks]
    if "text_config" in getattr(config, "sub_configs", {}):
        tasks = ["IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", *tasks]
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING") for task in tasks] + [modeling_auto.MODEL_MAPPING]
    return [mapping for mapping in mappings if config in mapping]


def override(family: str) -> Override:
    return OVERRIDES.get(family, Override())


def tiny_config(family: str) -> PreTrainedConfig:
    """The default config, shrunk."""
    kind = CONFIG_MAPPING[family]
    settings = shrink(kind().to_dict(), override(family).config, bool(re.search(MROPE, family)))
    settings.pop("model_type", None)
    config = kind(**settings)
    for part in _configs(config):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    return config


def tiny_family(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model in evaluation mode, float32, in which no parameter is constant.

    Raises:
        NotBuiltError: there is no model class, or the default config cannot be shrunk.
    """
    model_type = model_class(family)
    torch.manual_seed(seed)
    try:
        config = tiny_config(family)
        with torch.device("meta"):
            size = sum(p.numel() for p in model_type(tiny_config(family)).parameters())
        if size > LARGEST:
            raise NotBuiltError(f"{size:,} parameters")
        model = model_type._from_config(config).float().eval()
    except NotBuiltError:
        raise
    except Exception as error:
        raise NotBuiltError(one_line(error)) from error
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                scale = 0.15 if parameter.dim() >= 2 else 0.05
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


Run = Callable[[torch.nn.Module], list[torch.Tensor]]


def run_of(family: str, model: PreTrainedModel) -> Run:
    """A function that runs a copy of the model on the same inputs and returns its floating-point outputs.

    A composite model reads an image as well, through `get_image_features`, if it takes one that way.
    """
    inputs = _inputs(family, model)
    image = _image_features_input(model, inputs)

    def run(copy: torch.nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(0)
        found = [copy(**{name: _clone(value) for name, value in inputs.items()})]
        if image is not None:
            found.append(copy.get_image_features(pixel_values=image.clone()))
        return list(_tensors(found))

    if image is not None:
        try:
            with torch.no_grad():
                run(model)
        except Exception:
            # Its images need sizes or grids that only its processor makes: the language model runs alone
            image = None
    return run


def _inputs(family: str, model: PreTrainedModel) -> dict[str, Any]:
    config, names = model.config, _arguments(model.forward)
    generator = torch.Generator().manual_seed(3)
    try:
        text = config.get_text_config()
    except ValueError:
        text = config
    vocabulary = max(6, min(getattr(text, "vocab_size", None) or VOCABULARY, 58))
    size, channels = _setting(config, 32, "image_size"), _setting(config, 3, "num_channels", "in_channels", "in_chans")
    tokens = torch.randint(5, vocabulary, (2, 12), generator=generator)
    image = torch.randn(2, channels, size, size, generator=generator)
    main = model.main_input_name
    if main not in names:
        main = next((name for name in ("input_ids", "pixel_values", "input_features") if name in names), main)
    inputs: dict[str, Any] = {}
    if main == "pixel_values_videos":
        inputs[main] = image[:, None].repeat(1, 4, 1, 1, 1)
    elif main == "input_values":
        inputs[main] = torch.randn(2, 4000, generator=generator)
    elif main == "input_features":
        inputs[main] = _sound(model, generator)
    elif main != "pixel_values":
        inputs[main] = tokens
    if "pixel_values" in names and (main == "pixel_values" or hasattr(model, "get_text_features")):
        inputs["pixel_values"] = image
        if re.search(r"video|vivit|timesformer|xclip", config.model_type):
            inputs["pixel_values"] = image[:, None].repeat(1, _setting(config, 4, "num_frames"), 1, 1, 1)
    if "input_ids" in names and "input_values" not in inputs:
        inputs["input_ids"] = tokens
        if "attention_mask" in names and "input_features" not in inputs:
            inputs["attention_mask"] = torch.ones_like(tokens)
    if "bbox" in names:
        boxes = torch.randint(0, 50, (2, 12, 4), generator=generator)
        inputs["bbox"] = torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], -1)
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = tokens[:, :7].clone()
    for name in ("input_features_mask", "audio_mel_mask"):
        if name in names and main == "input_features":
            inputs[name] = torch.ones(2, inputs[main].shape[1], dtype=torch.bool)
    if "grid_thw" in names and not {"input_ids", "input_features"} & names:
        inputs = _patches(model, names)
    fixed = {"use_cache": False, "return_dict": True}
    inputs |= {name: value for name, value in fixed.items() if name in names}
    return override(family).inputs(model, inputs) if override(family).inputs else inputs


def _patches(model: PreTrainedModel, names: set[str]) -> dict[str, torch.Tensor]:
    """Two images of 4 x 4 patches each, flattened as for Qwen2-VL's vision tower."""
    config = model.config
    length = _setting(config, 3, "in_channels", "in_chans", "num_channels") * _setting(config, 8, "patch_size") ** 2
    length *= _setting(config, 1, "temporal_patch_size")
    main = "hidden_states" if "hidden_states" in names else "pixel_values"
    patches = torch.randn(32, length, generator=torch.Generator().manual_seed(3))
    more = {"merge_sizes": torch.tensor([1, 1])} if "merge_sizes" in names else {}
    return {main: patches, "grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])} | more


def _sound(model: PreTrainedModel, generator: torch.Generator) -> torch.Tensor:
    """Log-mel features: (batch, bins, time) for Whisper and its descendants, else (batch, time, bins)."""
    bins = _setting(model.config, 16, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
    if re.search("whisper|audio", type(model).__name__, re.IGNORECASE):
        return torch.randn(2, bins, 2 * _setting(model.config, 32, "max_source_positions"), generator=generator)
    return torch.randn(2, 64, bins, generator=generator)


def _image_features_input(model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor | None:
    reader = getattr(model, "get_image_features", None)
    if reader is None or "pixel_values" in inputs or "pixel_values" not in _arguments(reader):
        return None
    size, channels = _setting(model.config, 32, "image_size"), _setting(model.config, 3, "num_channels")
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(5))


def _arguments(function: Callable) -> set[str]:
    return set(inspect.signature(function).parameters)


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)


def _setting(config: PreTrainedConfig, default: int, *names: str) -> int:
    """The first of some settings that any part has; the first number of a list."""
    for part in _configs(config):
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, list | tuple) and value:
                value = value[0]
            if isinstance(value, int):
                return value
    return default


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors in the outputs of a model."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
