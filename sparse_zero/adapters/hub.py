"""Adapters on the Hugging Face hub: found by their id, and pushed. Imports no torch.

adapter_directory("user/adapter", revision="v1")   # a directory in the hub's cache; a local directory wins
"""

import os
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, metadata_load, metadata_save, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from sparse_zero.adapters.edited_cards import with_edits
from sparse_zero.errors import UserError, first_line

_CARD = "README.md"
OWN_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_positions.safetensors", _CARD)
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


def push(
    directory: str | Path,
    repository: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    tags: list[str] | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> str:
    """Upload the files of an adapter to the hub, as one commit.

    What a person wrote into the card on the hub is kept: the card in the directory becomes the one that is uploaded.

    Args:
        directory: the adapter's.
        repository: `user/name`; created if it does not exist.
        tags: added to those of the card.
        private, token, revision, create_pr, commit_message, commit_description: as of huggingface_hub.

    Returns: the address of the commit.

    Raises:
        UserError: the repository cannot be written.
    """
    api = HfApi(token=token)
    try:
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        keep_edits(directory, repository, revision, token)
        if tags:
            metadata = metadata_load(Path(directory, _CARD)) or {}
            metadata["tags"] = list(dict.fromkeys([*metadata.get("tags", ()), *tags]))
            metadata_save(Path(directory, _CARD), metadata)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            revision=revision,
            create_pr=create_pr,
            allow_patterns=list(OWN_FILES),
            # An adapter of another selection has no positions of its own
            delete_patterns=["adapter_positions.safetensors"],
            commit_message=commit_message or "Upload the adapter",
            commit_description=commit_description,
        )
    except Exception as error:  # also those of the HTTP library, which differs with the version
        raise UserError(f"push_to_hub: {repository}: cannot be written ({first_line(error)})") from error
    return str(commit.commit_url)


def keep_edits(
    directory: str | Path, repository: str, revision: str | None = None, token: str | bool | None = None
) -> None:
    """Put what a person wrote into the card on the hub into the card of a directory. Args: as of `push`."""
    card = Path(directory, _CARD)
    try:
        found = hf_hub_download(repository, _CARD, revision=revision, token=token)
    except LocalEntryNotFoundError:  # the hub cannot be reached
        raise
    except (EntryNotFoundError, RevisionNotFoundError, RepositoryNotFoundError):
        return
    text = Path(found).read_text(encoding="utf-8", errors="replace")
    card.write_text(with_edits(card.read_text(encoding="utf-8"), text, repository), encoding="utf-8")
