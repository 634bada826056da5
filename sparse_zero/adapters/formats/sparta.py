"""Adapters of SpaRTA's reference implementation (peft-sparta 0.0.3, arXiv 2502.15975).

config.json                     the base model's config, with `sparta_pretrained_model`
sparse_deltas.safetensors       for each parameter NAME of the model `indices.NAME`, int32 (n, dimensions), and
                                `deltas.NAME` (n,), with n = 0 if nothing was selected; or sparse_deltas.pt, a dict
                                of the dicts `indices` and `deltas`
head_init, new_embeddings_init  .safetensors or .pt: the initial values of a new head and of new tokens' embeddings
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparse_zero.adapters.files import Adapter, check_dtype, row_mask
from sparse_zero.adapters.formats.architecture import Architecture, architecture_for, configuration
from sparse_zero.adapters.formats.contents import Contents, SelectedScalars
from sparse_zero.adapters.formats.deltas import difference
from sparse_zero.adapters.formats.files import write_json, write_safetensors
from sparse_zero.adapters.formats.model_weights import ModelWeights
from sparse_zero.adapters.reading import class_name_of, optional, read_json, read_pickled, read_safetensors
from sparse_zero.adapters.schema import checked_settings
from sparse_zero.data.gguf import model_path
from sparse_zero.data.models import add_tokens, load_tokenizer, task_of
from sparse_zero.errors import UserError

TITLE = "peft-sparta"
DELTAS, HEAD, EMBEDDINGS = "sparse_deltas", "head_init", "new_embeddings_init"
HEAD_NAME = "score.weight"
BASE_KEY = "sparta_pretrained_model"
SINGLE_LABEL = "single_label_classification"


def matches(directory: Path) -> bool:
    return any((directory / f"{DELTAS}.{ending}").is_file() for ending in ("safetensors", "pt"))


def read(directory: Path, base: str | None) -> Contents:
    path = directory / "config.json"
    settings = read_json(path)
    indices, deltas = _read_deltas(directory)
    name_of_class = class_name_of(settings, path)
    dtype = optional(settings, "dtype", str, path) or optional(settings, "torch_dtype", str, path)
    selected = {
        name: SelectedScalars(indices[name], values)
        for name, values in deltas.items()
        if values.numel() or indices[name].numel()
    }
    contents = Contents(
        origin=directory,
        format="sparta",
        base=base or optional(settings, BASE_KEY, str, path),
        selected=selected,
        task=task_of(name_of_class),
        class_name=name_of_class,
        dtype=dtype,
        rule="each scalar at random (Bernoulli)",
        sparse={"selection": "bernoulli"},
        settings=checked_settings(settings, path),
        config=configuration(directory),
        known=len(deltas),
    )
    contents.check_tensors()
    if (head := _read_init(directory, HEAD)) is not None:
        contents.whole[HEAD_NAME] = head.float() + _dense(contents, HEAD_NAME, head).float()
    if (embeddings := _read_init(directory, EMBEDDINGS)) is not None:
        _read_new_rows(contents, embeddings)
    return contents


def _read_deltas(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    path = directory / f"{DELTAS}.safetensors"
    if path.is_file():
        tensors = read_safetensors(path)
        kinds = {key.partition(".")[0] for key in tensors}
        found = [
            {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{kind}.")}
            for kind in ("indices", "deltas")
        ]
    else:
        path = path.with_suffix(".pt")
        content = read_pickled(path)
        parts = [content, *content.values()] if isinstance(content, dict) else [None]
        if not all(isinstance(part, dict) and all(isinstance(key, str) for key in part) for part in parts):
            raise UserError(f"{path}: damaged: not a dict of indices and deltas")
        kinds = set(content)
        found = [content.get(kind, {}) for kind in ("indices", "deltas")]
    if kinds != {"indices", "deltas"}:
        raise UserError(f"{path}: damaged: contains {', '.join(sorted(kinds)) or 'nothing'}, not indices and deltas")
    if odd := sorted(found[0].keys() ^ found[1].keys()):
        raise UserError(f"{path}: damaged: '{odd[0]}' has only one of indices and deltas")
    if odd := [name for part in found for name, value in part.items() if not isinstance(value, torch.Tensor)]:
        raise UserError(f"{path}: damaged: '{odd[0]}' is not a tensor")
    return found[0], found[1]


def _read_init(directory: Path, name: str) -> torch.Tensor | None:
    path = directory / f"{name}.safetensors"
    if path.is_file():
        tensor = read_safetensors(path).get(name.removesuffix("_init"))
        if tensor is None:
            raise UserError(f"{path}: damaged: has no '{name.removesuffix('_init')}'")
    elif (path := path.with_suffix(".pt")).is_file():
        tensor = read_pickled(path)
    else:
        return None
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2:
        raise UserError(f"{path}: damaged: not a matrix")
    check_dtype(path, name, tensor)
    return tensor


def _dense(contents: Contents, name: str, like: torch.Tensor) -> torch.Tensor:
    """Remove the deltas of a parameter from `contents`, and return them as a dense float32 tensor shaped as `like`."""
    dense = like.new_zeros(like.shape, dtype=torch.float32)
    entry = contents.selected.pop(name, None)
    if entry is not None:
        at, limit = entry.indices, torch.tensor(like.shape)
        fits = at.shape == (entry.values.numel(), like.dim())
        if not fits or bool((at < 0).any() or (at >= limit).any()):
            raise UserError(
                f"{contents.origin}: damaged: the indices of '{name}' are not valid for its shape {list(like.shape)}"
            )
        dense[at.unbind(1)] = entry.values.float()
    return dense


def _read_new_rows(contents: Contents, init: torch.Tensor) -> None:
    """Read the embeddings of new tokens as fully trained rows: the base model does not have these rows."""
    architecture = contents.architecture()
    embedding = architecture.model.get_input_embeddings()
    name = next(n for n, target in architecture.targets.items() if target.parameter is embedding.weight)
    first = embedding.weight.shape[0] - init.shape[0]
    entry, rows = contents.selected.pop(name, None), init.float()
    if first < 0 or init.shape[1] != embedding.weight.shape[1] or (entry is not None and entry.indices.dim() != 2):
        shape = list(embedding.weight.shape)
        raise UserError(f"{contents.origin}: damaged: the new embeddings do not fit '{name}', {shape}")
    if entry is not None:
        new = entry.indices[:, 0] >= first
        contents.selected[name] = SelectedScalars(entry.indices[new] - torch.tensor([first, 0]), entry.values[new])
        rows = rows + _dense(contents, name, init)
        if not new.all():
            contents.selected[name] = SelectedScalars(entry.indices[~new], entry.values[~new])
    contents.rows[name] = (tuple(range(first, first + len(rows))), rows)
    if (contents.origin / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(str(contents.origin))
        contents.new_tokens = tokenizer.convert_ids_to_tokens(list(contents.rows[name][0]))


def write(adapter: Adapter, directory: Path) -> dict[str, Any]:
    """Write an adapter. The reference's loaders need an entry for each parameter of the model."""
    architecture = architecture_for(adapter)
    classifier = architecture.task == "sequence-classification"
    _check_supported(adapter, architecture, classifier)
    config, base = adapter.config, adapter.config.base_model_name_or_path
    open_base = functools.cache(lambda: ModelWeights.open(base, config.revision, architecture))
    some = next(iter((adapter.deltas | adapter.whole | adapter.rows).values()))
    tensors = {}
    for name, target in architecture.targets.items():
        at, values = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=some.dtype)
        if name == HEAD_NAME and classifier:
            # The initial head is written as zeros, so that the deltas are exactly the values
            values = adapter.whole[name].flatten()
            at = torch.arange(values.numel())
        elif name in adapter.whole:
            values = difference(open_base().require([name]).tensor(name), adapter.whole[name]).flatten()
            at = torch.arange(values.numel())
        elif name in adapter.rows:
            at, values = _with_rows(adapter, name, architecture, open_base)
        elif name in adapter.deltas:
            at, values = adapter.positions(name), adapter.deltas[name]
        tensors[f"indices.{name}"] = _coordinates(at, tuple(target.shape))
        tensors[f"deltas.{name}"] = values
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / f"{DELTAS}.safetensors", tensors)
    if classifier:
        zeros = torch.zeros_like(adapter.whole[HEAD_NAME])
        write_safetensors(directory / f"{HEAD}.safetensors", {"head": zeros})
    for name in adapter.rows:
        rows = _new_rows(adapter, name, architecture)
        if len(rows):
            # Not safetensors: the loader of peft-sparta 0.0.3 passes it a torch.device, which it does not accept
            torch.save(rows, directory / f"{EMBEDDINGS}.pt")
            architecture.config.vocab_size += len(rows)
    if config.new_tokens:
        tokenizer = load_tokenizer(config.tokenizer or base, None if config.tokenizer else config.revision)
        add_tokens(tokenizer, config.new_tokens)
        tokenizer.save_pretrained(directory)
    architecture.config.save_pretrained(directory)
    # The loader needs entries that transformers does not save because they have their default values
    settings = read_json(directory / "config.json") | architecture.labels
    settings |= {BASE_KEY: model_path(base, config.revision), "architectures": [architecture.class_name]}
    if classifier:
        settings["problem_type"] = SINGLE_LABEL
    write_json(directory / "config.json", settings)
    return {}


def _check_supported(adapter: Adapter, architecture: Architecture, classifier: bool) -> None:
    """Raise UserError for adapters that the reference's loaders do not support."""
    if architecture.task is None:
        raise UserError(
            f"{architecture.class_name}: {TITLE} only loads causal language models and sequence classifiers"
        )
    odd = [n for n in architecture.targets if not n.startswith(architecture.prefix) and n != HEAD_NAME]
    if classifier and (HEAD_NAME not in architecture.targets or odd):
        raise UserError(
            f"'{(odd or [HEAD_NAME])[0]}': {TITLE} only loads classifiers whose head is a linear layer `score` "
            f"without bias, unlike {architecture.class_name}; use `--to shira` or `--to supertuning`"
        )
    if classifier and (kind := adapter.config.model_settings.get("problem_type") or SINGLE_LABEL) != SINGLE_LABEL:
        raise UserError(f"problem_type {kind}: {TITLE} only loads {SINGLE_LABEL}")
    if classifier and HEAD_NAME not in adapter.whole:
        raise UserError(f"'{HEAD_NAME}' was not fully trained, which {TITLE} requires")
    for name in adapter.rows:
        selection = adapter.selection(name)
        known, size = architecture.shape(name)[0], selection.shape[0]
        if size == known:
            continue
        if not classifier:
            raise UserError(
                f"'{name}' has {size - known} rows of new tokens, which {TITLE} only loads for sequence classifiers; "
                "use `sparse-zero merge`"
            )
        if set(range(known, size)) - set(selection.whole_rows):
            raise UserError(f"'{name}' has new rows that were not fully trained, which {TITLE} does not support")
        if len(adapter.config.new_tokens) != size - known:
            raise UserError(
                f"'{name}' has {size - known} rows of new tokens, but the adapter names "
                f"{len(adapter.config.new_tokens)} tokens; {TITLE} needs a tokenizer with all of them"
            )


def _new_rows(adapter: Adapter, name: str, architecture: Architecture) -> torch.Tensor:
    """The values of rows that the base model does not have: (rows, columns)."""
    known = architecture.shape(name)[0]
    new = [index for index, row in enumerate(adapter.selection(name).whole_rows) if row >= known]
    return adapter.rows[name][new]


def _with_rows(
    adapter: Adapter, name: str, architecture: Architecture, open_base: Callable[[], ModelWeights]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and deltas of a weight with fully trained rows, for the rows that the base model has."""
    selection, (known, columns) = adapter.selection(name), architecture.shape(name)
    flat, rows = adapter.positions(name), adapter.rows[name]
    old = [index for index, row in enumerate(selection.whole_rows) if row < known]
    if old:
        before = open_base().require([name]).tensor(name)[[selection.whole_rows[index] for index in old]]
        rows = difference(before, rows[old])
    inside = row_mask(selection, flat)
    values = rows.new_zeros(flat.numel())
    if name in adapter.deltas:
        values[~inside] = adapter.deltas[name].to(values.dtype)
    kept = flat < known * columns
    values[inside & kept] = rows[: len(old)].flatten()
    return flat[kept], values[kept]


def _coordinates(flat: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The coordinates of flat positions: int32 (n, dimensions)."""
    return torch.stack(torch.unravel_index(flat, shape), dim=1).to(torch.int32)
