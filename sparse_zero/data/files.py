"""The files of a data set: which reader of `datasets` opens a path.

builder = open_builder(recipe.data)
builder.as_dataset("train")
"""

import glob
import textwrap
from pathlib import Path

from datasets import DatasetBuilder, load_dataset_builder
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.csv.csv import CsvConfig

from sparse_zero.data.file_names import expanded, home, names_of
from sparse_zero.data.package import package_path
from sparse_zero.errors import UserError, did_you_mean
from sparse_zero.recipe.recipe import DataSection

READERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
"""The reader of `datasets` for each kind of file, by the end of its name in lower case."""

COMPRESSIONS = (".gz", ".bz2", ".xz", ".lz4", ".zst", ".zip")
"""Ends of names of compressed files, which `datasets` unpacks into its cache."""

_CSV = {"keep_default_na": False, "na_values": [""]}
"""Only an empty field of a CSV is a missing value. pandas also takes NA, None, null and other words for one, and a
class of that name would vanish."""


def open_builder(data: DataSection) -> DatasetBuilder:
    """Find the data set and prepare it in the cache of `datasets`.

    Raises:
        UserError: there is no such file, its kind is unknown, or `datasets` cannot read it.
    """
    path, files, options = home(package_path(data.path)), data.data_files, {}
    if _names_files(path):
        if files is not None:
            raise UserError(
                f"data.data_files: data.path '{data.path}' is a file as well; set data.path to '{_reader(path)}'"
            )
        # A name such as data[1].csv is a pattern for `datasets`
        path, files = _reader(path), glob.escape(path) if Path(path).exists() else path
    elif path in READERS.values() and files is None:
        # `datasets` would read all files below the working directory
        raise UserError(f"data.data_files is missing: name the files that the '{path}' builder should read")
    files = expanded(files)
    if path == "csv":
        options = _CSV | ({"sep": "\t"} if all(_kind(name) == ".tsv" for name in names_of(files)) else {})
    try:
        builder = load_dataset_builder(path, data.name, data_files=files, revision=data.revision, **options)
        if isinstance(builder.config, CsvConfig) and builder.config.keep_default_na:
            builder = load_dataset_builder(path, data.name, data_files=files, revision=data.revision, **_CSV)
        builder.download_and_prepare()
    except Exception as error:  # `datasets` does not catch the errors of pandas, pyarrow and huggingface_hub
        raise UserError(f"data.path '{data.path}' cannot be loaded: {message_of(error)}") from error
    return builder


def check_path(data: DataSection) -> None:
    """Raise UserError if a file that the section names does not exist, or if no reader is known for it.

    Hub ids and URLs are not looked up.
    """
    path = home(package_path(data.path))
    if not _names_files(path) and path in READERS.values():
        for name in names_of(expanded(data.data_files)):
            if "://" not in name and not glob.has_magic(name) and not Path(name).exists():
                raise UserError(f"data.data_files: no such file '{name}'")


def _names_files(path: str) -> bool:
    """Whether `data.path` is a file, or a pattern of files, rather than a directory, a reader or a hub id.

    Raises:
        UserError: there is no such file, or no reader for it.
    """
    file, kind = Path(path), _kind(path)
    if file.is_dir():
        return False
    if file.exists():
        if kind not in READERS:
            raise UserError(
                f"data.path: '{path}' ends in '{kind}', which no reader is known for; set data.path to "
                f"{', '.join(dict.fromkeys(READERS.values()))}, whichever can read it, and data.data_files to the file"
            )
        return True
    if kind not in READERS:
        return False
    if glob.has_magic(path):
        if not glob.glob(path, recursive=True):
            raise UserError(f"data.path: no file matches '{path}'")
        return True
    near = did_you_mean(path, map(str, file.parent.glob("*")))
    raise UserError(f"data.path: no such file '{path}'{near}")


def _kind(path: str) -> str:
    """The end of a file's name in lower case, without that of its compression."""
    name = Path(path).name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return Path(name).suffix


def _reader(path: str) -> str:
    return READERS[_kind(path)]


def message_of(error: Exception) -> str:
    """The error's message in one line. That of a DatasetGenerationError is in its cause."""
    cause = error.__cause__ if type(error) is DatasetGenerationError and error.__cause__ else error
    return textwrap.shorten(str(cause) or type(cause).__name__, 400, placeholder=" ...")
