"""benchmarks/share_quality.py without a training run: what is tuned and tested, what is trained, data, page."""

import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import cola
import share_quality as quality
import share_quality_plan as planning
import share_quality_table as page
from noise_quality import append_row, collate, measure

from sparse_zero import UserError

FULL_SCALE, SMALL = planning.FULL_SCALE, planning.Scale(500, 2)
SCATTERED = planning.Cell("scattered", 0.01)


def finished(run: planning.Run, score: float = 0.5) -> dict[str, dict]:
    row = {"score": score, "loss": 0.6, "seconds": 60.0, "device": "CPU", "trainable": round(1e6 * run.density)}
    return {run.key: {**asdict(run), **row, "versions": {"torch": "2"}, "date": "2026-01-01"}}


def tuned(scale: planning.Scale = FULL_SCALE, cells: tuple = planning.CELLS, best: int = 1) -> dict[str, dict]:
    """The tuning runs of these cells without drawn columns; the best rate is this one of three."""
    done: dict[str, dict] = {}
    for task in planning.TASKS:
        for cell in cells:
            if cell.method not in planning.DRAWN:
                for index, run in enumerate(planning.rate_runs(task, cell, scale, {})):
                    done |= finished(run, 0.9 if index == best else 0.1)
    return done


def test_a_cell_is_tuned_on_validation_sentences_and_then_tested() -> None:
    first = planning.plan({})
    assert {(run.split, run.seed) for run in first} == {("validation", planning.TUNING_SEED)}
    assert [run.cell.method for run in first[:6]] == ["full"] * 3 + ["head"] * 3
    done = tuned(cells=planning.CELLS[:1])
    assert planning.plan(done)[3] == replace(first[1], split="test", seed=0)


def test_all_cells_have_the_first_seed_before_others_have_the_second() -> None:
    done = tuned()
    tests = [run for run in planning.plan(done) if run.split == "test"]
    assert [run.seed for run in tests] == sorted(run.seed for run in tests)
    cells = {(run.task, run.method, run.density) for run in tests}
    assert len(cells) == 2 * (2 + 5 * 4 - 1)
    assert len(tests) == len(cells) * len(planning.SEEDS)
    assert all(run.learning_rate == run.cell.rates[1] for run in tests)
    assert {run.size for run in tests if run.task == "cola"} == {4000}


def test_drawn_columns_have_the_rate_of_scattered_scalars_until_they_are_tuned() -> None:
    done, cell = tuned(), planning.Cell("whole", 0.01)
    assert planning.chosen_rate("cola", cell, FULL_SCALE, done) == (3e-3, False)
    runs = planning.rate_runs("cola", cell, FULL_SCALE, {})
    assert set(runs) <= set(planning.plan(done)[-len(planning.TASKS) * 9 * 3 :])
    for run, score in zip(runs, (0.4, 0.3, 0.2), strict=True):
        done |= finished(run, score)
    done |= finished(replace(runs[0], learning_rate=3e-4), 0.3)
    assert planning.chosen_rate("cola", cell, FULL_SCALE, done) == (1e-3, True)
    assert {run.learning_rate for run in planning.tests("cola", cell, FULL_SCALE, done)} == {1e-3}


def test_the_next_rate_is_tried_where_the_best_is_at_the_edge() -> None:
    cell = planning.Cell("full", 1)

    def rates(scores: dict[float, float]) -> tuple[float, ...]:
        done: dict[str, dict] = {}
        example = planning.rate_runs("cola", cell, FULL_SCALE, {})[0]
        for rate, score in scores.items():
            done |= finished(replace(example, learning_rate=rate), score)
        return tuple(run.learning_rate for run in planning.rate_runs("cola", cell, FULL_SCALE, done))

    assert rates({3e-5: 0.1, 1e-4: 0.2}) == (3e-5, 1e-4, 3e-4)
    assert rates({3e-5: 0.1, 1e-4: 0.3, 3e-4: 0.2}) == (3e-5, 1e-4, 3e-4)
    assert rates({3e-5: 0.1, 1e-4: 0.2, 3e-4: 0.3}) == (3e-5, 1e-4, 3e-4, 1e-3)
    assert rates({3e-5: 0.1, 1e-4: 0.2, 3e-4: 0.3, 1e-3: 0.4, 3e-3: 0.5}) == (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    assert rates({3e-5: 0.4, 1e-4: 0.2, 3e-4: 0.3}) == (1e-5, 3e-5, 1e-4, 3e-4)


def test_a_second_seed_decides_between_close_rates() -> None:
    done, (low, middle, high) = {}, planning.rate_runs("cola", SCATTERED, FULL_SCALE, {})
    for run, score in ((low, 0.1), (middle, 0.75), (high, 0.74)):
        done |= finished(run, score)
    second = planning.deciding_runs("cola", SCATTERED, FULL_SCALE, done)
    assert second == [replace(run, seed=planning.SECOND_SEED) for run in (middle, high)]
    assert planning.chosen_rate("cola", SCATTERED, FULL_SCALE, done) == (middle.learning_rate, True)
    assert set(second) <= set(planning.plan(done))
    for run, score in zip(second, (0.5, 0.7), strict=True):
        done |= finished(run, score)
    assert planning.chosen_rate("cola", SCATTERED, FULL_SCALE, done) == (high.learning_rate, True)


def test_a_smaller_experiment_has_its_own_rates() -> None:
    done = tuned() | tuned(SMALL)
    assert planning.scales(done) == [FULL_SCALE, SMALL]
    assert planning.chosen_rate("cola", SCATTERED, SMALL, tuned()) is None
    assert {run.size for run in planning.plan(done, SMALL, ["cola"])} == {2000}
    assert planning.plan(done, SMALL, ["rotten-tomatoes"])[0].size == 500


@pytest.fixture
def model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=64, **sizes))


@pytest.mark.parametrize("cell", [cell for cell in planning.CELLS if cell.share in (0, 0.03, 1)], ids=str)
def test_what_is_trained(cell, model) -> None:
    pytest.importorskip("peft")
    total = sum(parameter.numel() for parameter in model.parameters())
    run = planning.rate_runs("cola", cell, FULL_SCALE, {})[0]
    trained = {n: p.numel() for n, p in quality.adapted(model, run).named_parameters() if p.requires_grad}
    head = 64 * 2 + 2
    wanted = {0: head, 1: total}.get(cell.share, cell.share * total)
    rank_one = 2 * (4 * 2 * 64 + 2 * (64 + 128)) + 2 * 64
    assert sum(trained.values()) == pytest.approx(wanted, abs=rank_one / 2 if cell.method == "lora" else 64)
    assert any("classifier" in name for name in trained)


def test_lora_of_the_smallest_share_is_on_the_attention(model) -> None:
    pytest.importorskip("peft")
    run = planning.rate_runs("cola", planning.Cell("lora", 0.001), FULL_SCALE, {})[0]
    adapted = quality.adapted(model, run)
    layers = {
        name.split(".lora_")[0].rpartition(".layer.")[2] for name, _ in adapted.named_parameters() if "lora_" in name
    }
    names = ("self.query", "self.key", "self.value", "output.dense")
    assert layers == {f"{layer}.attention.{name}" for layer in (0, 1) for name in names}


def test_data_of_cola(tmp_path: Path, monkeypatch) -> None:
    lines = [f"s\t{n % 2}\t*\tsentence {n}\n" for n in range(40)]
    (tmp_path / "in_domain_train.tsv").write_text("1\tlabel\t2\tsentence\n" + "".join(lines))
    for name, text in (("in", "inside"), ("out_of", 'a " quote')):
        (tmp_path / f"{name}_domain_dev.tsv").write_text(f"s\t1\t\t{text}\n")
    assert cola.examples(tmp_path, cola.TEST) == (["inside", 'a " quote'], [1, 1])
    run = replace(planning.rate_runs("cola", SCATTERED, FULL_SCALE, {})[0], size=20, held_out=10)
    ids, labels = [[n] for n in range(42)], [0] * 42
    monkeypatch.setattr(cola, "_encoded", lambda directory, base, length: (ids, labels, 40))
    validation, test = (cola.sentences(replace(run, split=split), tmp_path) for split in ("validation", "test"))
    other = cola.sentences(replace(run, seed=1), tmp_path)
    assert (len(validation.training), len(validation.held_out), test.held_out) == (20, 10, [40, 41])
    assert validation.training == test.training != other.training
    assert other.held_out == validation.held_out
    assert not set(validation.held_out) & {*validation.training, *other.training, 40, 41}
    with pytest.raises(UserError, match="31 training sentences: CoLA has 30; lower --size"):
        cola.sentences(replace(run, size=31), tmp_path)
    with pytest.raises(
        UserError, match=r"in_domain_train.tsv: No such file or directory; --data is the folder of CoLA"
    ):
        cola.examples(tmp_path / "elsewhere", cola.TRAINING)


def test_scores_of_the_held_out_sentences(model) -> None:
    """Accuracy and loss against torch; the correlation by its definition."""
    ids = [[n + 1] * (n % 5 + 1) for n in range(30)]
    labels = [n % 3 % 2 for n in range(30)]
    found = measure(model, list(range(30)), ids, labels, torch.autocast("cpu", enabled=False), "cpu")
    with torch.no_grad():
        logits = torch.cat([model(**collate([n], ids, labels, "cpu")).logits for n in range(30)])
    known, guessed = torch.tensor(labels), logits.argmax(1)
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, known)), abs=1e-4)
    assert found["accuracy"] == pytest.approx(float((known == guessed).float().mean()))
    if guessed.unique().numel() == 2:
        assert found["matthews"] == pytest.approx(float(torch.corrcoef(torch.stack([known, guessed]))[0, 1]), abs=1e-4)


def test_the_page_has_means_differences_rates_and_what_was_cut(tmp_path: Path) -> None:
    done = tuned(SMALL)
    for run in planning.plan(done, SMALL, ["rotten-tomatoes"]):
        if run.split == "test" and run.seed < 2:
            more = 0.01 + 0.02 * run.seed if run.method == "whole" else 0
            done |= finished(run, 0.6 + 0.02 * run.seed + more)
    for run in done.values():
        append_row(tmp_path / "r.jsonl", run)
    assert quality.read_results(tmp_path / "r.jsonl") == done
    text = page.write_page(done, tmp_path / "r.jsonl")
    assert (tmp_path / "r.md").read_text() == text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    by_name = {row[0]: row[1:] for row in rows[::-1]}
    assert by_name["scattered scalars"] == ["61.0 ± 1.4 (2)"] * 5
    assert by_name["whole - scattered"] == ["+2.0 ± 1.0"] * 5
    assert by_name["within a tenth of the columns"][-1] == "-"
    assert by_name["trained, scattered"] == ["1,000", "3,000", "10,000", "30,000", "100,000"]
    assert by_name["Rotten Tomatoes, LoRA, as many scalars"][0] == "0.003 (0.001 to 0.01)"
    assert by_name["CoLA, whole columns"][2] == "0.003 ="
    assert "A smaller experiment than the benchmark's own (`--size 500 --epochs 2`)" in text
    assert "drawn columns that were not tuned" in text
    assert "**0.01: 90.0 (0.600)**, 0.03: 10.0" in text


def test_the_plot_has_of_each_task_the_scale_with_the_most_tests(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    shown = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **settings: shown.append(self))
    done = tuned() | tuned(SMALL)
    done |= finished(planning.tests("cola", SCATTERED, FULL_SCALE, done)[0])
    for run in planning.plan(done, SMALL, ["rotten-tomatoes"]):
        if run.split == "test":
            done |= finished(run)
    page.plot(done, tmp_path / "p.png")
    [figure] = shown
    assert [panel.get_title() for panel in figure.axes] == [
        "Rotten Tomatoes, 500 sentences, 2 epochs",
        "CoLA, 4,000 sentences, 2 epochs",
    ]
    assert [len(line.get_xdata()) for line in figure.axes[0].lines[:1]] == [5]


def test_time_is_estimated_by_the_tasks_last_runs() -> None:
    runs = planning.plan({}, SMALL)
    done = finished(runs[0])
    assert quality.seconds_of(runs[1], done, "CPU") == 60
    assert quality.seconds_of(replace(runs[1], size=1000), done, "CPU") == 120
    assert quality.seconds_of(runs[1], done, "GPU") == 0


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    done, path = quality.read_results(), quality.CACHE.with_suffix(".md")
    assert (path.read_text() if path.exists() else None) == (page.markdown(done) if done else None)
