"""SparseZeroConfig: a SparseConfig as a configuration of PEFT."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftType, TaskType
from pydantic import ValidationError
from transformers.utils import http_user_agent

from sparse_zero.adapters.files import CARD_NAME, CONFIG_NAME, POSITIONS_NAME, WEIGHTS_NAME, Adapter, write_adapter
from sparse_zero.adapters.model_card import model_card
from sparse_zero.adapters.schema import PEFT_TYPE, checked_config, reason_of
from sparse_zero.errors import UserError, did_you_mean
from sparse_zero.selection.config import SparseConfig

DIRECTORY = "_directory"
"""The entry of an adapter's configuration with the directory that it was read from."""

_SETTINGS = SparseConfig.model_fields
_OF_PEFT = ("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version")
_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""By task, the modules that PEFT's classes add to `modules_to_save`, if there is one, and replace by copies."""
_OTHER_NAMES = {"target_modules": "targets", "r": "rank_equivalent", "random_seed": "seed"}
"""How other methods of PEFT call a setting."""


@dataclass(init=False, repr=False, eq=False)
class SparseZeroConfig(PeftConfig):
    """The settings of `SparseConfig` and of PEFT's PeftConfig.

        SparseZeroConfig(density=0.01, targets="all-linear", task_type="CAUSAL_LM")

    A configuration that was read from an adapter's directory stands for the adapter: a model gets its positions and
    values. Each setting is an attribute, but `modules_to_save` for task_type SEQ_CLS, TOKEN_CLS and QUESTION_ANS: PEFT
    would add its own copies of the head. Use `config.sparse.modules_to_save`.

    Args:
        **settings: those of `SparseConfig`, and of PeftConfig: base_model_name_or_path, revision, task_type,
            inference_mode.

    Raises:
        UserError: a setting is not known, or has an invalid value.
    """

    sparse: SparseConfig

    def __init__(self, **settings: Any) -> None:
        directory = settings.pop(DIRECTORY, None)
        if settings.get("adapter_type") == "sparse-zero":
            settings = _settings_of_file(settings, directory)
        settings.pop("peft_type", None)
        own = {key: settings.pop(key) for key in _OF_PEFT if key in settings}
        vars(self)["sparse"] = _sparse_config(settings)
        super().__init__(peft_type=PeftType(PEFT_TYPE), **own)
        # What belongs to an adapter on disk or in a model. No fields: PEFT prints and saves those
        self.directory: str | None = directory
        self.is_new = directory is not None
        """Whether the values are those of `directory`, and PEFT has not loaded them again."""
        self.to_write: Adapter | None = None

    def __getattr__(self, name: str) -> Any:
        sparse = vars(self).get("sparse")
        if name not in _SETTINGS or sparse is None:
            raise AttributeError(f"{type(self).__name__} has no attribute '{name}'")
        if name == "modules_to_save" and self.task_name in HEADS:
            raise AttributeError("modules_to_save: use config.sparse.modules_to_save")
        return getattr(sparse, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SETTINGS:
            vars(self)["sparse"] = _sparse_config(self.sparse.model_dump() | {name: value})
        else:
            super().__setattr__(name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SparseZeroConfig) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}={value!r}" for key, value in self.to_dict().items() if value is not None)
        return f"{type(self).__name__}({shown})"

    @property
    def task_name(self) -> str | None:
        return None if self.task_type is None else TaskType(self.task_type).value

    def to_dict(self) -> dict[str, Any]:
        """All settings, as JSON has them."""
        own = {key: getattr(self, key) for key in _OF_PEFT}
        own["task_type"] = self.task_name
        return {"peft_type": PEFT_TYPE, **own, **self.sparse.model_dump(mode="json")}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json. Called by PEFT when it saves a model, also the adapter's other files.

        Args:
            save_directory: created if necessary.
            **kwargs: of PEFT; ignored.
        """
        adapter, self.to_write = self.to_write, None
        if adapter is not None:
            write_adapter(adapter, save_directory, model_card(adapter.config))
            return
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "SparseZeroConfig":
        """Read the configuration of an adapter; those of a hub repository are downloaded as a whole.

        Args:
            pretrained_model_name_or_path: a directory or hub id.
            subfolder: the adapter's directory within it.
            **kwargs: revision, cache_dir, token, local_files_only and force_download, of the hub.

        Raises:
            UserError: the file is damaged, or of another kind of adapter.
        """
        directory = _local(str(pretrained_model_name_or_path), subfolder, kwargs)
        return super().from_pretrained(str(directory))


def _local(name: str, subfolder: str | None, kwargs: Mapping[str, Any]) -> Path:
    directory = Path(name) / (subfolder or "")
    if (directory / CONFIG_NAME).is_file() or Path(name).exists():
        return directory
    files = [f"{subfolder}/{file}" if subfolder else file for file in (CONFIG_NAME, WEIGHTS_NAME, POSITIONS_NAME)]
    options = {key: kwargs[key] for key in _HUB_OPTIONS if kwargs.get(key) is not None}
    options = {"user_agent": http_user_agent()} | options | {"allow_patterns": [*files, CARD_NAME]}
    return Path(snapshot_download(name, **options)) / (subfolder or "")


def _settings_of_file(content: Mapping[str, Any], directory: str | None) -> dict[str, Any]:
    """The settings in an adapter's configuration. Raises UserError if it is damaged."""
    content = dict(content)
    inference = {"inference_mode": content.pop("inference_mode")} if "inference_mode" in content else {}
    config = checked_config(content, Path(directory or "") / CONFIG_NAME)
    return {
        **config.sparse.model_dump(),
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision,
        "task_type": config.task_type,
        **inference,
    }


def _sparse_config(settings: Mapping[str, Any]) -> SparseConfig:
    settings = dict(settings)
    if isinstance(indices := settings.get("trainable_token_indices"), dict):
        # PEFT's form with the names of embeddings. Here the rows of all embeddings of tokens are meant
        settings["trainable_token_indices"] = sorted({index for rows in indices.values() for index in rows})
    for name in settings:
        if name not in _SETTINGS:
            other = _OTHER_NAMES.get(name)
            hint = f"; it is called '{other}' here" if other else did_you_mean(name, (*_SETTINGS, *_OF_PEFT))
            raise UserError(f"SparseZeroConfig: unknown setting '{name}'{hint}")
    try:
        return SparseConfig(**settings)
    except ValidationError as error:
        raise UserError(f"SparseZeroConfig: {reason_of(error)}") from None
