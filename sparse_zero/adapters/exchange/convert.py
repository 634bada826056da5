"""`sparse-zero convert`: from a directory of any format to a new one of any format that can be written."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sparse_zero.adapters.exchange import format_of, model_delta, recognise
from sparse_zero.adapters.exchange.checkpoint import Checkpoint
from sparse_zero.adapters.exchange.contents import Contents
from sparse_zero.adapters.exchange.files import adapter_bytes
from sparse_zero.errors import UserError, refuse_to_overwrite
from sparse_zero.model.fingerprint import differences, fingerprint


def convert(
    source: str | Path,
    out: str | Path,
    to: str = "sparse-zero",
    base: str | None = None,
    max_density: float = model_delta.MAX_DENSITY,
) -> dict[str, Any]:
    """Write what `source` holds as a directory of the format `to`, complete or not at all.

    Args: base: the base model's directory or hub id, where `source` does not say it or says another;
        max_density: see `model_delta.read`.
    Returns: facts for the user. Raises UserError: see `sparse_zero.adapters.exchange`; `out` holds files already.
    """
    started, source, out = time.perf_counter(), Path(source), Path(out)
    kind = recognise(source)
    if kind == to:
        raise UserError(f"{source}: is a {format_of(to).TITLE} adapter already: copy the directory")
    refuse_to_overwrite(out)
    format = format_of(kind)
    contents = format.read(source, base, max_density) if kind == "model" else format.read(source, base)
    adapter = contents.adapter()
    if base is not None and kind == "sparse-zero":
        _refuse_other_base(contents)
    unfinished = out.with_name(f"{out.name}.unfinished-{os.getpid()}")
    try:
        written = format_of(to).write(adapter, unfinished)
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
        "to": format_of(to).TITLE,
        "base_model": adapter.config.base_model_name_or_path,
        "task": adapter.config.task,
        "weights": len(adapter.config.tensors),
        "selected_scalars": sum(values.numel() for values in adapter.deltas.values()),
        "whole_scalars": sum(values.numel() for values in (adapter.whole | adapter.rows).values()),
        **written,
        "bytes": size,
        "bytes_per_scalar": size / max(1, contents.trained),
        "notes": contents.notes,
        "seconds": time.perf_counter() - started,
    }


def _refuse_other_base(contents: Contents) -> None:
    """Our own adapters know their base model's weights."""
    known = contents.adapter().config.base_fingerprint
    given = Checkpoint.at_hand(contents.base, contents.revision, contents.architecture())
    if given is not None and (odd := differences(fingerprint(given), known)):
        raise UserError(
            f"{contents.origin}: was made for a model with other weights than {contents.base}: '{odd[0]}'; "
            "--base names the one that it was trained on"
        )
