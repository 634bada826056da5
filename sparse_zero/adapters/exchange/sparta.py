"""The reference implementation's adapters (peft-sparta 0.0.3).

config.json                     the base model's configuration, with `sparta_pretrained_model`
sparse_deltas.safetensors       for every parameter NAME of the model `indices.NAME`, int32 (n, dimensions), and
                                `deltas.NAME` (n,), of length 0 where nothing was selected; or sparse_deltas.pt, a dict
                                of the dicts `indices` and `deltas`
head_init, new_embeddings_init  .safetensors or .pt: what a new head, and the embeddings of new tokens, were before
"""

from pathlib import Path
from typing import Any

import torch

from sparse_zero.adapters.exchange.architecture import Architecture, architecture_for, configuration, task_of
from sparse_zero.adapters.exchange.checkpoint import Checkpoint
from sparse_zero.adapters.exchange.contents import Contents, Selected
from sparse_zero.adapters.exchange.deltas import difference
from sparse_zero.adapters.exchange.files import (
    read_json,
    read_pickled,
    read_safetensors,
    write_json,
    write_safetensors,
)
from sparse_zero.adapters.files import Adapter, row_mask
from sparse_zero.data.models import add_tokens, load_tokenizer
from sparse_zero.data.package import package_path
from sparse_zero.errors import UserError

TITLE = "peft-sparta"
DELTAS, HEAD, EMBEDDINGS = "sparse_deltas", "head_init", "new_embeddings_init"
HEAD_NAME = "score.weight"
BASE_KEY = "sparta_pretrained_model"
SINGLE_LABEL = "single_label_classification"


def recognise(directory: Path) -> bool:
    return any((directory / f"{DELTAS}.{ending}").is_file() for ending in ("safetensors", "pt"))


def read(directory: Path, base: str | None) -> Contents:
    settings = read_json(directory / "config.json")
    indices, deltas = _read_deltas(directory)
    name_of_class = next(iter(settings.get("architectures") or ()), None)
    selected = {
        name: Selected(indices[name], values)
        for name, values in deltas.items()
        if values.numel() or indices[name].numel()
    }
    contents = Contents(
        origin=directory,
        format="sparta",
        base=base or settings.get(BASE_KEY),
        selected=selected,
        task=task_of(name_of_class),
        class_name=name_of_class,
        dtype=settings.get("dtype") or settings.get("torch_dtype"),
        rule="each scalar by chance (Bernoulli)",
        sparse={"selection": "bernoulli"},
        settings={k: settings[k] for k in ("id2label", "label2id", "problem_type", "pad_token_id") if settings.get(k)},
        config=configuration(directory),
    )
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
        if not isinstance(content, dict) or not all(isinstance(part, dict) for part in content.values()):
            raise UserError(f"{path}: damaged: not a dict of indices and deltas")
        kinds = set(content)
        found = [content.get(kind, {}) for kind in ("indices", "deltas")]
    if kinds != {"indices", "deltas"}:
        raise UserError(f"{path}: damaged: holds {', '.join(sorted(kinds)) or 'nothing'}, not indices and deltas")
    if odd := sorted(found[0].keys() ^ found[1].keys()):
        raise UserError(f"{path}: damaged: '{odd[0]}' has only one of indices and deltas")
    if odd := [name for part in found for name, value in part.items() if not isinstance(value, torch.Tensor)]:
        raise UserError(f"{path}: damaged: '{odd[0]}' is no tensor")
    return found[0], found[1]


def _read_init(directory: Path, name: str) -> torch.Tensor | None:
    path = directory / f"{name}.safetensors"
    if path.is_file():
        tensor = read_safetensors(path).get(name.removesuffix("_init"))
        if tensor is None:
            raise UserError(f"{path}: damaged: '{name.removesuffix('_init')}' is not in it")
        return tensor
    path = path.with_suffix(".pt")
    tensor = read_pickled(path) if path.is_file() else None
    if tensor is not None and (not isinstance(tensor, torch.Tensor) or tensor.dim() != 2):
        raise UserError(f"{path}: damaged: not a matrix")
    return tensor


def _dense(contents: Contents, name: str, like: torch.Tensor) -> torch.Tensor:
    """The deltas of a parameter as a matrix of the shape of `like`, taken out of `contents`."""
    dense = like.new_zeros(like.shape, dtype=torch.float32)
    entry = contents.selected.pop(name, None)
    if entry is not None:
        at, limit = entry.indices.long(), torch.tensor(like.shape)
        fits = at.shape == (entry.values.numel(), like.dim())
        if not fits or bool((at < 0).any() or (at >= limit).any()):
            raise UserError(f"{contents.origin}: damaged: the indices of '{name}' do not fit its {list(like.shape)}")
        dense[at.unbind(1)] = entry.values.float()
    return dense


def _read_new_rows(contents: Contents, init: torch.Tensor) -> None:
    """Embeddings that were appended for new tokens are ours to hold whole: the base model does not have them."""
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
        contents.selected[name] = Selected(entry.indices[new].long() - torch.tensor([first, 0]), entry.values[new])
        rows = rows + _dense(contents, name, init)
        if not new.all():
            contents.selected[name] = Selected(entry.indices[~new], entry.values[~new])
    contents.rows[name] = (tuple(range(first, first + len(rows))), rows)
    if (contents.origin / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(str(contents.origin))
        contents.new_tokens = tokenizer.convert_ids_to_tokens(list(contents.rows[name][0]))


def write(adapter: Adapter, directory: Path) -> dict[str, Any]:
    """The reference's loaders ask for every parameter of the model, and know one kind of head: a linear `score`."""
    architecture = architecture_for(adapter)
    classifier = architecture.task == "sequence-classification"
    _refuse(adapter, architecture, classifier)
    config, base = adapter.config, adapter.config.base_model_name_or_path
    some = next(iter((adapter.deltas | adapter.whole | adapter.rows).values()))
    tensors = {}
    for name, target in architecture.targets.items():
        at, values = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=some.dtype)
        if name == HEAD_NAME and classifier:
            # From a head of zeros the deltas are the values, bit for bit.
            values = adapter.whole[name].flatten()
            at = torch.arange(values.numel())
        elif name in adapter.whole:
            weights = Checkpoint.open(base, config.revision, architecture).require([name])
            values = difference(weights.tensor(name), adapter.whole[name]).flatten()
            at = torch.arange(values.numel())
        elif name in adapter.rows:
            at, values = _with_rows(adapter, name, architecture)
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
            # The loader of peft-sparta 0.0.3 hands safetensors a torch.device, which it refuses; a .pt file it reads.
            torch.save(rows, directory / f"{EMBEDDINGS}.pt")
            architecture.config.vocab_size += len(rows)
    if config.new_tokens:
        tokenizer = load_tokenizer(config.tokenizer or base, None if config.tokenizer else config.revision)
        add_tokens(tokenizer, config.new_tokens)
        tokenizer.save_pretrained(directory)
    architecture.config.save_pretrained(directory)
    # The loader wants to read what transformers leaves out of a configuration because it is the default.
    settings = read_json(directory / "config.json") | architecture.labels
    settings |= {BASE_KEY: package_path(base), "architectures": [architecture.class_name]}
    if classifier:
        settings["problem_type"] = SINGLE_LABEL
    write_json(directory / "config.json", settings)
    return {}


def _refuse(adapter: Adapter, architecture: Architecture, classifier: bool) -> None:
    if architecture.task is None:
        raise UserError(
            f"{architecture.class_name}: the reference loads causal and sequence-classification models only"
        )
    odd = [n for n in architecture.targets if not n.startswith(architecture.prefix) and n != HEAD_NAME]
    if classifier and (HEAD_NAME not in architecture.targets or odd):
        raise UserError(
            f"'{(odd or [HEAD_NAME])[0]}': the reference's loader knows classifiers with one linear `score` without a "
            f"bias, and {architecture.class_name} is not of that kind; `--to shira` or `--to supertuning` can write it"
        )
    if classifier and (kind := adapter.config.model_settings.get("problem_type") or SINGLE_LABEL) != SINGLE_LABEL:
        raise UserError(f"problem_type {kind}: the reference's loader knows {SINGLE_LABEL} only")
    if classifier and HEAD_NAME not in adapter.whole:
        raise UserError(f"'{HEAD_NAME}' was not trained whole, and the reference's loader needs all of it")
    for name in adapter.rows:
        draw = adapter.draw(name)
        known, size = architecture.shape(name)[0], draw.shape[0]
        if size == known:
            continue
        if not classifier:
            raise UserError(
                f"'{name}' has {size - known} rows of new tokens, and the reference's loader gives room to those of "
                "sequence classifiers only; `sparse-zero merge` can write them"
            )
        if set(range(known, size)) - set(draw.whole_rows):
            raise UserError(f"'{name}' has new rows that were not trained whole, which the reference cannot hold")
        if len(adapter.config.new_tokens) != size - known:
            raise UserError(
                f"'{name}' has {size - known} rows of new tokens, and the adapter names "
                f"{len(adapter.config.new_tokens)} tokens; the reference's loader needs a tokenizer that knows them"
            )


def _new_rows(adapter: Adapter, name: str, architecture: Architecture) -> torch.Tensor:
    """(rows, columns) of those that the base model does not have."""
    known = architecture.shape(name)[0]
    new = [place for place, row in enumerate(adapter.draw(name).whole_rows) if row >= known]
    return adapter.rows[name][new]


def _with_rows(adapter: Adapter, name: str, architecture: Architecture) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and deltas of a weight with rows that were trained whole, in those rows that the base model has."""
    config, draw, (known, columns) = adapter.config, adapter.draw(name), architecture.shape(name)
    flat, rows = adapter.positions(name), adapter.rows[name]
    old = [place for place, row in enumerate(draw.whole_rows) if row < known]
    if old:
        weights = Checkpoint.open(config.base_model_name_or_path, config.revision, architecture).require([name])
        before = weights.tensor(name)[[draw.whole_rows[place] for place in old]]
        rows = difference(before, rows[old])
    inside = row_mask(draw, flat)
    values = rows.new_zeros(flat.numel())
    if name in adapter.deltas:
        values[~inside] = adapter.deltas[name].to(values.dtype)
    kept = flat < known * columns
    values[inside & kept] = rows[: len(old)].flatten()
    return flat[kept], values[kept]


def _coordinates(flat: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns: int32 (n, dimensions)"""
    return torch.stack(torch.unravel_index(flat, shape), dim=1).to(torch.int32)
