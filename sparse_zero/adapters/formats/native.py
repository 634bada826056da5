"""sparse-zero's own format. The files are read and written by `sparse_zero.adapters.files`."""

from pathlib import Path
from typing import Any

from sparse_zero.adapters.files import CONFIG_NAME, Adapter, read_adapter, write_adapter
from sparse_zero.adapters.formats.contents import Contents, SelectedScalars
from sparse_zero.adapters.model_card import model_card
from sparse_zero.adapters.reading import read_json

TITLE = "sparse-zero"


def matches(directory: Path) -> bool:
    path = directory / CONFIG_NAME
    # PEFT's adapters have a file of this name too
    return path.is_file() and read_json(path).get("adapter_type") == "sparse-zero"


def read(directory: Path, base: str | None) -> Contents:
    adapter = read_adapter(directory)
    if base is not None:
        update = {"base_model_name_or_path": base, "revision": None}
        adapter.config = adapter.config.model_copy(update=update)
    config = adapter.config
    selected, rows = {}, {}
    for name in config.tensors:
        selection = adapter.selection(name)
        if name in adapter.rows:
            rows[name] = selection.whole_rows, adapter.rows[name]
        if name in adapter.deltas:
            selected[name] = SelectedScalars(None, adapter.deltas[name], selection.shape)
    rules = sorted({entry.rule for entry in config.tensors.values()})
    return Contents(
        origin=directory,
        format="sparse-zero",
        base=config.base_model_name_or_path,
        selected=selected,
        whole=adapter.whole,
        rows=rows,
        revision=config.revision,
        task=config.task,
        dtype=config.dtype,
        rule=f"{', '.join(rules)}; {config.sparse.drawn}; seed {config.sparse.seed}",
        settings=config.model_settings,
        new_tokens=config.new_tokens,
        results=config.results,
        versions=config.library_versions,
        total=config.total_parameters,
        own=adapter,
    )


def write(adapter: Adapter, directory: Path) -> dict[str, Any]:
    write_adapter(adapter, directory, model_card(adapter.config))
    return {}
