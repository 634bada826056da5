"""Adapters on the Hugging Face hub: found by their id, and pushed. Imports no torch.

adapter_directory("user/adapter", revision="v1")   # a directory in the hub's cache; a local directory wins
"""

import os
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from sparse_zero.errors import UserError, first_line

OWN_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_positions.safetensors", "README.md")
"""The files of an adapter."""

_DOWNLOADED = (*OWN_FILES, "adapter_*", "sparse_deltas.*", "*_init.*", "config.json", "model*.safetensors*")
"""Those of an adapter of any format, and of a model that was fine-tuned."""


def is_hub_id(name: str | Path) -> bool:
    """Whether a name is that of a repository on the hub, `user/name`, and of nothing on this machine."""
    name = str(name)
    if os.path.lexists(name) or name.count("/") != 1 or name.startswith((".", "~")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def adapter_directory(name: str | Path, revision: str | None = None) -> Path:
    """The directory of an adapter: `name` itself if it is a directory, else that of a download from the hub.

    Args:
        name: a directory, or a hub id.
        revision: a branch, tag or commit of the hub's repository.

    Raises:
        UserError: there is no such directory, and no such repository.
    """
    if not is_hub_id(name):
        if not os.path.isdir(name):
            raise UserError(f"{name}: no such adapter directory")
        return Path(name)
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=list(_DOWNLOADED)))
    except Exception as error:  # also those of the HTTP library, which differs with the version
        raise UserError(
            f"{name}: no such adapter directory, and it cannot be downloaded from the hub ({first_line(error)})"
        ) from error


def push(directory: str | Path, repository: str) -> str:
    """Upload the files of an adapter to the hub, as one commit.

    Args:
        directory: the adapter's.
        repository: `user/name`; created if it does not exist.

    Returns: the address of the commit.

    Raises:
        UserError: the repository cannot be written.
    """
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            allow_patterns=list(OWN_FILES),
            # An adapter of another selection has no positions of its own
            delete_patterns=["adapter_positions.safetensors"],
            commit_message="Upload the adapter",
        )
    except Exception as error:  # also those of the HTTP library, which differs with the version
        raise UserError(f"push_to_hub: {repository}: cannot be written ({first_line(error)})") from error
    return str(commit.commit_url)
