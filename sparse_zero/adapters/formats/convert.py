"""`sparse-zero convert`: convert an adapter of any format to a new directory of another format."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sparse_zero.adapters.files import Adapter, adapter_bytes, check_drawing, check_finite, checked_positions
from sparse_zero.adapters.formats import detect, format_module, model_delta, read
from sparse_zero.adapters.formats.base_model import check_base_model
from sparse_zero.adapters.formats.contents import Contents
from sparse_zero.adapters.formats.model_weights import ModelWeights
from sparse_zero.errors import UserError, refuse_to_overwrite
from sparse_zero.model.fingerprint import differing_parameters, fingerprint


def convert(
    source: str | Path,
    out: str | Path,
    to: str = "sparse-zero",
    base: str | None = None,
    max_density: float = model_delta.MAX_DENSITY,
) -> dict[str, Any]:
    """Convert an adapter, or a fine-tuned model, to another format. If it fails, `out` is unchanged.

    Args:
        source: the directory to convert.
        out: the directory to write; it must not contain files.
        to: the name of the format to write.
        base: the base model's directory or hub id, if `source` does not name it or names another.
        max_density: see `model_delta.read`.

    Returns: facts for the user.

    Raises:
        UserError: `source` cannot be read or does not fit its base model, the format `to` cannot represent it, or
            `out` contains files.
    """
    started, source, out = time.perf_counter(), Path(source), Path(out)
    source_format = detect(source)
    if source_format == to:
        raise UserError(f"{source}: already has the format {format_module(to).TITLE}; copy the directory instead")
    refuse_to_overwrite(out)
    format = format_module(source_format)
    contents = read(source, base, max_density)
    adapter = contents.adapter()
    check_finite(adapter, source)
    if source_format == "sparse-zero":
        _check_positions(adapter, source)
    if base is not None and source_format == "sparse-zero":
        _check_base(contents)
    unfinished = out.with_name(f"{out.name}.unfinished-{os.getpid()}")
    try:
        written = format_module(to).write(adapter, unfinished)
        os.replace(unfinished, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written ({error})") from None
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    size = adapter_bytes(out)
    return {
        "out": str(out),
        "from": format.TITLE,
        "to": format_module(to).TITLE,
        "base_model": adapter.config.base_model_name_or_path,
        "task": adapter.config.task,
        "weights": len(adapter.config.tensors),
        "selected_scalars": sum(values.numel() for values in adapter.deltas.values()),
        "whole_scalars": sum(values.numel() for values in (adapter.whole | adapter.rows).values()),
        **{key: value for key, value in written.items() if key != "notes"},
        "bytes": size,
        "bytes_per_scalar": size / max(1, contents.trained),
        "notes": [*contents.notes, *_of_quantized(adapter), *written.get("notes", ())],
        "seconds": time.perf_counter() - started,
    }


def _of_quantized(adapter: Adapter) -> list[str]:
    """What to know of an adapter whose base model was quantised."""
    kinds = ", ".join(adapter.config.quantized)
    return [f"trained on a base model in {kinds}: put it on one that is quantised in the same way"] if kinds else []


def _check_positions(adapter: Adapter, source: Path) -> None:
    """Raise UserError if positions are drawn differently. Shapes are checked first: drawing may take their size."""
    if adapter.config.base_model_name_or_path is None:
        raise UserError(f"{source}: does not name its base model; pass its directory or hub id with --base")
    check_base_model(adapter, source)
    check_drawing(adapter, source)
    for name in adapter.config.tensors:
        checked_positions(adapter, name, source)


def _check_base(contents: Contents) -> None:
    """Raise UserError if the base model does not have the fingerprint that is saved in a sparse-zero adapter."""
    config = contents.adapter().config
    # The fingerprint of a quantised weight is not that of its plain values
    known = {name: value for name, value in config.base_fingerprint.items() if name not in config.kinds}
    given = ModelWeights.open_local(contents.base, contents.revision, contents.architecture())
    if given is not None and (odd := differing_parameters(fingerprint(given), known)):
        raise UserError(
            f"{contents.origin}: trained on a model with different weights than {contents.base}: '{odd[0]}'; pass the "
            "base model that it was trained on with --base"
        )
