"""The README's figure and table show what the committed results of the benchmarks say."""

import json
import re
import statistics
import sys

import pytest
from docs_pages import ROOT

BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
sys.path.insert(0, str(BENCHMARKS))

import step_figure  # noqa: E402

METHODS = ("sparse", "lora", "full")


def rows_of_the_readme() -> dict[str, list[str]]:
    """Cells of the table by the text of their first one, without the footnote."""
    table = re.findall(r"^\| (.+?) \[\d\] \| (.+) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    return {first: rest.split(" | ") for first, rest in table}


def read(name: str) -> list[dict]:
    text = (RESULTS / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]


def found(rows: list[dict], part: str, **wanted) -> dict:
    return next(row for row in rows if wanted.items() <= row[part].items())


def test_the_figure_is_what_the_program_draws() -> None:
    assert step_figure.FIGURE.read_text(encoding="utf-8") == step_figure.figure()


def test_the_table_has_six_rows() -> None:
    assert len(rows_of_the_readme()) == 6


def full(model: str) -> str:
    """The time of a step of full fine-tuning over that of the frozen model. It does not depend on the targets."""
    wanted = {"model": model, "density": 0.01, "dtype": "bfloat16"}
    rows = [row for row in read("step_time_gpu.json") if wanted.items() <= row["setting"].items()]
    rows.sort(key=lambda row: row["setting"]["targets"] != "all-linear")
    return f"{rows[0]['methods']['full']['over_frozen']['median']:.2f}"


@pytest.mark.parametrize(
    ("name", "size", "column", "form"),
    [
        ("time of a step, 1B, all linear layers", "1B", "/ frozen", "{:.2f}"),
        ("time of a step, 7B, all linear layers", "7B", "/ frozen", "{:.2f}"),
        ("memory of that step beyond weights and optimizer, GiB", "7B", "GiB of a step", "{:.1f}"),
    ],
)
def test_time_and_memory_of_a_step(name: str, size: str, column: str, form: str) -> None:
    rows, _ = step_figure.measured(read("gpu.jsonl"), size)
    ours, whole, lora, in_bfloat16 = (
        form.format(rows[method][column]) for method in ("columns", "whole", "lora", "lora-bf16")
    )
    cells = [f"{ours} (whole: {whole})", f"{lora} (bfloat16: {in_bfloat16})"]
    of_full = full(f"llama-{size.lower()}") if column == "/ frozen" else "not run"
    assert rows_of_the_readme()[name] == [*cells, of_full]


def test_the_columns_on_the_page_about_choosing() -> None:
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    methods = ("frozen", "whole", "columns", "sparse", "sparse-16", "lora-bf16", "lora")
    for size, tokens in (("1B", "4 x 2,048"), ("7B", "2 x 2,048")):
        rows, _ = step_figure.measured(read("gpu.jsonl"), size)
        times = [f"{rows[method]['/ frozen']:.3f}" if method in rows else "-" for method in methods[1:]]
        memory = [f"{rows[method]['GiB of a step']:.2f}" if method in rows else "-" for method in methods]
        for first, cells in ((f"{size}, {tokens} tokens: step", ["1", *times]), ("memory, GiB", memory)):
            assert f"| {first} | {' | '.join(cells)} |" in page


def memory(dtype: str) -> list[dict]:
    return found(read("memory.json"), "options", model="llama-120m", targets="all-linear", dtype=dtype)["runs"]


def mebibytes(runs: list[dict], method: str, way: str, count: int, part: str) -> float:
    run = next(run for run in runs if (run["method"], run["way"], run["count"]) == (method, way, count))
    return max(rank[part] for rank in run["ranks"]) / 2**20


def test_peak_memory_of_a_step() -> None:
    shown = [
        " / ".join(f"{mebibytes(memory(dtype), method, 'zero2', 4, 'peak'):,.0f}" for dtype in ("bfloat16", "float32"))
        for method in METHODS
    ]
    assert rows_of_the_readme()["peak memory of each of 4 ranks, ZeRO stage 2, 120M, bfloat16 / float32, MiB"] == shown


def test_optimizer_state_of_a_rank() -> None:
    sizes = [mebibytes(memory("float32"), method, "zero2", 4, "optimizer") for method in METHODS]
    shown = [f"{size:,.1f}" if size < 100 else f"{size:,.0f}" for size in sizes]
    assert rows_of_the_readme()["optimizer state of each of 4 ranks, ZeRO stage 2, MiB"] == shown


def accuracy(method: str, size: int) -> str:
    """Mean and standard deviation in percent of the runs without noise on test sentences."""
    rows = read("lora_quality.jsonl" if method == "lora" else "noise_quality.jsonl")
    wanted = {"method": method, "noise": "none", "size": size, "split": "test", "precision": "bfloat16"}
    scores = [100 * row["accuracy"] for row in rows if wanted.items() <= row.items()]
    assert len(scores) == 5
    return f"{statistics.fmean(scores):.1f} ± {statistics.stdev(scores):.1f}"


def test_accuracy_in_the_readme() -> None:
    cells = rows_of_the_readme()["test accuracy after 4,000 sentences, MiniLM-L6, %"]
    assert cells == [accuracy(method, 4000) for method in METHODS]


def test_accuracy_on_the_page_about_choosing() -> None:
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    for method, name in zip(METHODS, ("sparse", "LoRA", "full fine-tuning"), strict=True):
        cells = " | ".join(accuracy(method, size) for size in (250, 1000, 4000))
        assert f"| {name} | {cells} |" in page
