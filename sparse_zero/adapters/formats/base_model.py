"""Whether an adapter can be of its base model, and the model's config of its weights, before either is loaded."""

from pathlib import Path

from transformers.utils.peft_utils import find_adapter_config_file

from sparse_zero.adapters.files import Adapter
from sparse_zero.adapters.formats.architecture import Architecture, architecture_for
from sparse_zero.data.gguf import model_path
from sparse_zero.errors import UserError

SCALARS_PER_BYTE = 8
"""The most scalars in a byte of a saved weight: a bit for each."""

NEW_SCALARS = 2**24
"""Scalars that a model may have besides those of its files, in a head that is new."""


def check_base_model(adapter: Adapter, origin: str | Path, trust_remote_code: bool = False) -> Architecture:
    """Check an adapter's names and shapes against the config of its base model, and that against the weights.

    Args:
        adapter: an adapter that names its base model.
        origin: the adapter's directory, for errors.
        trust_remote_code: see `load_model`.

    Raises:
        UserError: the base model is not found, or one does not fit the other.
    """
    try:
        architecture = architecture_for(adapter, trust_remote_code)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    config = adapter.config
    check_size(Path(model_path(config.base_model_name_or_path, config.revision)), architecture)
    return architecture


def check_no_adapter(base: str, revision: str | None, origin: str | Path) -> None:
    """Raise UserError if a base model has an adapter of its own: from_pretrained would load it with PEFT, which can
    import modules that its config names.

    Args: base, revision: as of `load_model`; origin: the adapter's directory, for errors.
    """
    try:
        found = find_adapter_config_file(model_path(base, revision), revision=revision)
    except (OSError, ValueError):
        return
    if found is not None:
        raise UserError(f"{origin}: its base model {base} has an adapter of its own ({found}); merge that one first")


def check_size(directory: Path, architecture: Architecture) -> None:
    """Raise UserError if a model's config claims more scalars than its files can hold: they would be allocated.

    Args: directory: the model; nothing is checked if it is a hub id.
    """
    files = [path for pattern in ("*.safetensors", "*.bin") for path in directory.glob(pattern) if path.is_file()]
    held = sum(path.stat().st_size for path in files) * SCALARS_PER_BYTE
    if files and architecture.total > held + NEW_SCALARS:
        raise UserError(
            f"{directory}: config.json claims {architecture.total:,} scalars, more than the {len(files)} files of "
            "weights can hold; it is damaged"
        )
