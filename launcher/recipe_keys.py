"""`sparse-zero keys`: describes the keys of a recipe, from the schema that validates recipes."""

import shutil
import textwrap
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sparse_zero.errors import UserError, did_you_mean
from sparse_zero.recipe.recipe import Recipe


def all_keys(schema: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yields every key with its section, as in `sparse.density`, and its field. A section precedes its keys.

    Args: prefix: the section, with a dot at its end.
    """
    for name, field in schema.model_fields.items():
        yield prefix + name, field
        if section := _section(field):
            yield from all_keys(section, f"{prefix}{name}.")


def describe(wanted: str | None) -> str:
    """The text that `sparse-zero keys` prints. Args: wanted: a key or a section; None: all keys.

    Raises UserError: there is no such key.
    """
    known = dict(all_keys())
    if wanted is not None and wanted.startswith("training."):
        raise UserError(
            f"{wanted}: the keys of `training` are the arguments of transformers.TrainingArguments, "
            "async_save, chunked_loss, objective, trl, reward_funcs, method, lora and budget"
        )
    if wanted is not None and wanted not in known:
        raise UserError(f"{wanted}: there is no such key in a recipe{did_you_mean(wanted, known)}")
    chosen = (name for name in known if wanted is None or name == wanted or name.startswith(f"{wanted}."))
    return "\n".join(_entry(name, known[name]) for name in chosen)


def _entry(name: str, field: FieldInfo) -> str:
    section = _section(field)
    text = field.description or (section.__doc__ if section else None) or ""
    # In YAML, None is null
    text = " ".join(text.split()).replace("None:", "null:")
    value = f"{_name(field.annotation)}{_range(field)}{_default(field)}"
    head = f"{name}{', required' * field.is_required()}" if section else f"{name}: {value}"
    width = min(shutil.get_terminal_size().columns, 100)
    paragraph = textwrap.fill(text, width, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join([*([""] if section else []), head, *([paragraph] if text else [])])


def _range(field: FieldInfo) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    limits = [
        f"{sign} {getattr(each, name)}"
        for each in field.metadata
        for name, sign in signs.items()
        if hasattr(each, name)
    ]
    return f" ({', '.join(limits)})" if limits else ""


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kinds = [field.annotation, *get_args(field.annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _name(kind: Any) -> str:
    """A type in the notation of a recipe: a literal as its values, None as `null`."""
    if kind is type(None):
        return "null"
    if isinstance(kind, str):
        return kind
    arguments = get_args(kind)
    origin = getattr(kind, "__origin__", None)
    if not arguments:
        return getattr(kind, "__name__", str(kind))
    if origin in (list, dict):
        return f"{origin.__name__}[{', '.join(map(_name, arguments))}]"
    if hasattr(kind, "__metadata__"):
        return _name(arguments[0])
    return " | ".join(map(_name, arguments))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ", required"
    default = field.get_default(call_default_factory=True)
    return f" = {'null' if default is None else str(default).lower() if isinstance(default, bool) else default}"
