"""benchmarks/gpu.py: the order of the figures, the time limit, the files; and what launches.py and gsm8k.py count."""

import argparse
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import gpu
import gpu_figures
import gsm8k
import launches
import methods

BENCHMARKS = Path(gpu.__file__).parent
CPU = gpu.Machine("CPU", "cpu", float("inf"))
ARGUMENTS = argparse.Namespace(seconds=60.0, only=None, model=None, gsm8k=None)


def figure(name: str, worth: int = 1, seconds: int = 1, script: str = "program.py", **more) -> gpu_figures.Figure:
    return gpu_figures.Figure(name, script, (), worth, seconds, lambda rows: rows, **{"needs": (), **more})


def record(name: str, date: str, seconds: float = 1.0, card: str = "CPU", rows: list | None = None) -> dict:
    return {
        "figure": name, "card": card, "date": date, "versions": {"torch": "2"}, "command": "c", "seconds": seconds,
        "rows": rows or [{"method": "sparse", "/ frozen": 1.04}],
    }  # fmt: skip


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Instead of the benchmarks, programs of this test."""
    monkeypatch.setattr(gpu, "HERE", tmp_path)

    def write(name: str, body: str) -> None:
        lines = ["import json, sys, time", "out = sys.argv[sys.argv.index('--json') + 1]", body]
        (tmp_path / name).write_text("\n".join(lines))

    write("program.py", "open(out, 'w').write(json.dumps([{'arguments': sys.argv[1:-2]}]))")
    return write


def listed(monkeypatch, *some: gpu_figures.Figure) -> None:
    monkeypatch.setattr(gpu, "figures", lambda records=(): list(some))


def test_the_missing_come_first_by_worth_and_then_the_oldest():
    some = [figure("new"), figure("old"), figure("cheap", 1), figure("dear", 5)]
    records = [record("new", "2026-02-01"), record("old", "2026-01-01")]
    assert [f.name for f in gpu.in_order(some, records)] == ["dear", "cheap", "old", "new"]


def test_an_estimate_is_the_time_on_this_machine_before_with_a_margin():
    records = [
        record("a", "2026-01-01", 10.0),
        record("a", "2026-01-02", 20.0),
        record("a", "2026-01-03", 99.0, "H200"),
    ]
    assert gpu.estimate(figure("a", seconds=7), records, CPU) == pytest.approx(24)
    assert gpu.estimate(figure("b", seconds=7), records, CPU) == 7


def test_a_figure_that_cannot_run_has_a_reason():
    card = gpu.Machine("a card", "cuda", 79.0)
    assert gpu.obstacle(figure("a"), card, ARGUMENTS) is None
    for given, machine, reason in [
        ({"needs": ("torch", "no_such_package")}, card, "no_such_package is not installed"),
        ({"needs": ("nothing_a", "nothing_b")}, card, "nothing_a, nothing_b are not installed"),
        ({"only_cuda": True}, CPU, "it needs a GPU"),
        ({"gibibytes": 110}, card, "it needs 110 GiB, a card has 79"),
        ({"sources": True}, card, "it needs --model and --gsm8k"),
    ]:
        assert gpu.obstacle(figure("a", **given), machine, ARGUMENTS) == reason


def test_what_was_measured_is_appended_and_shown(program, monkeypatch, tmp_path):
    listed(monkeypatch, figure("one", 1), figure("two", 2), figure("too long", 3, seconds=1000))
    keep = tmp_path / "results" / "gpu.jsonl"
    added = gpu.run(CPU, ARGUMENTS, [], keep)
    assert [row["figure"] for row in added] == ["two", "one"]
    assert gpu.read_records(keep) == added
    for row in added:
        assert row["card"] == "CPU"
        assert torch.__version__.startswith(row["versions"]["torch"].partition("+")[0])
        assert row["rows"] == [{"arguments": ["--device", "cpu"]}]
        assert row["command"] == "python benchmarks/program.py --device cpu"
    gpu.run(CPU, ARGUMENTS, gpu.read_records(keep), keep)
    assert [row["figure"] for row in gpu.read_records(keep)][:2] == ["two", "one"]
    assert len(gpu.read_records(keep)) == 4


def test_a_program_that_takes_too_long_ends_with_all_that_it_started(program, monkeypatch, tmp_path):
    mark = tmp_path / "mark"
    later = f"import time; time.sleep(6); open({str(mark)!r}, 'w')"
    program("slow.py", f"import subprocess; subprocess.Popen([sys.executable, '-c', {later!r}]); time.sleep(60)")
    listed(monkeypatch, figure("slow", script="slow.py"))
    assert gpu.run(CPU, argparse.Namespace(**{**vars(ARGUMENTS), "seconds": 3.0}), [], tmp_path / "gpu.jsonl") == []
    time.sleep(5)
    assert not mark.exists()
    assert not (tmp_path / "gpu.jsonl").exists()


def test_a_program_that_fails_leaves_the_others(program, monkeypatch, tmp_path, capsys):
    program("broken.py", "raise ValueError('no such thing')")
    listed(monkeypatch, figure("broken", 5, script="broken.py"), figure("right", 1))
    assert [row["figure"] for row in gpu.run(CPU, ARGUMENTS, [], tmp_path / "gpu.jsonl")] == ["right"]
    assert "broken: exit status 1: ValueError: no such thing" in capsys.readouterr().out


def test_records_of_another_machine_are_added_once(tmp_path):
    new, kept = tmp_path / "new.jsonl", tmp_path / "results" / "gpu.jsonl"
    rows = [record("step, 1B, value and output", f"2026-01-0{day}", card="H200") for day in (1, 2)]
    new.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):
        gpu.add([new], kept)
        assert gpu.read_records(kept) == rows
    page = kept.with_suffix(".md").read_text()
    assert "H200, 2026-01-02; torch 2." in page
    assert "2026-01-01" not in page
    assert "| sparse |    1.040 |" in page


def test_tiny_arguments_replace_those_of_a_gpu():
    step = next(f for f in gpu_figures.figures() if f.script == "step_time.py")
    words = gpu.command(step, CPU, ARGUMENTS, Path("out.json"))
    assert words[words.index("--models") + 1] == "llama-20m"
    assert words.count("--models") == words.count("--rounds") == 1
    assert "llama-1b" in gpu.command(step, gpu.Machine("a", "cuda", 80.0), ARGUMENTS, Path("out.json"))


def test_every_figure_has_a_program_that_takes_its_arguments(monkeypatch):
    """The arguments are parsed by the program's own parser."""
    names = [f.name for f in gpu_figures.figures()]
    assert len(names) == len(set(names))
    known = {**vars(ARGUMENTS), "model": Path("model"), "gsm8k": Path("data")}
    seen = set()
    for machine in (CPU, gpu.Machine("a card", "cuda", 200.0)):
        for each in gpu_figures.figures():
            words = gpu.command(each, machine, argparse.Namespace(**known), Path("out.json"))
            parsed = parse(monkeypatch, each.script, words[2:])
            assert parsed.json == Path("out.json")
            if each.methods:
                assert set(parsed.methods) <= set(methods.METHODS)
                assert {"sparse", "frozen", "lora"} & set(parsed.methods)
            seen.add(each.script)
    assert seen == {
        *("step_time.py", "noise.py", "launches.py", "gradient_gpu.py", "memory.py", "experts.py", "gsm8k.py")
    }


class Parsed(Exception):
    pass


def parse(monkeypatch, script: str, words: list[str]) -> argparse.Namespace:
    """The arguments as the program's main parses them. Raises SystemExit if it refuses them."""
    whole = argparse.ArgumentParser.parse_args

    def stop(parser, args=None, namespace=None):
        raise Parsed(whole(parser, words))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        specification = importlib.util.spec_from_file_location(f"_{script[:-3]}", BENCHMARKS / script)
        module = importlib.util.module_from_spec(specification)
        patch.setitem(sys.modules, specification.name, module)
        specification.loader.exec_module(module)
        with pytest.raises(Parsed) as raised:
            module.main()
    return raised.value.args[0]


def test_a_figure_is_measured_by_its_program(tmp_path):
    """The noise, in tiny shapes, by the real program."""
    noise = next(f for f in gpu_figures.figures() if f.name == "Random Position Noise, float32")
    measured, reason = gpu.measure(noise, CPU, ARGUMENTS, 300)
    assert reason == ""
    assert {row["method"] for row in measured["rows"]} == {"lookup", "permutation", "rpn", "share of a demo step"}
    assert all(row["ms"] > 0 for row in measured["rows"])
    assert "--shape 2 16 32" in measured["command"]


# ---- quality


def quality(method: str, rate: float, seed: int, loss: float) -> dict:
    row = {"method": method, "rate": rate, "seed": seed, "loss": loss, "before": 1.4, "trained": 100}
    return record(f"GSM8K, {method}, rate {rate:g}, seed {seed}", "2026-01-01", rows=[row])


def test_other_seeds_run_at_the_best_rate_once_every_rate_has_run():
    def planned(records: list[dict]) -> set[str]:
        return {f.name for f in gpu_figures.figures(records) if f.name.startswith("GSM8K, lora")}

    rates = gsm8k.RATES["lora"]
    done = [quality("lora", rate, 0, loss) for rate, loss in zip(rates, (0.7, 0.6, 0.65), strict=True)]
    first = {f"GSM8K, lora, rate {rate:g}, seed 0" for rate in rates}
    assert planned([]) == planned(done[:2]) == first
    assert planned(done) == first | {f"GSM8K, lora, rate {rates[1]:g}, seed {seed}" for seed in (1, 2)}


def test_the_quality_table_has_mean_and_deviation_over_the_seeds():
    records = [quality("lora", gsm8k.RATES["lora"][1], seed, loss) for seed, loss in enumerate((0.60, 0.62, 0.64))]
    (row,) = gpu_figures.quality_rows([*records, record("another figure", "2026-01-01")][:3])
    assert row["loss"] == pytest.approx(0.62)
    assert row["± loss"] == pytest.approx(0.02)
    assert row["seeds"] == 3
    assert "exact, %" not in row
    for found, exact in zip(records, (0.1, 0.2, 0.3), strict=True):
        found["rows"][0]["exact"] = exact
    (row,) = gpu_figures.quality_rows(records)
    assert (row["exact, %"], row["± exact"]) == (pytest.approx(20), pytest.approx(10))
    assert "GSM8K: loss on held-out answers" in gpu.page(records)


class Words:
    """A tokenizer of words, with a chat template."""

    eos_token_id, pad_token_id = 1, 0

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        return f"user {messages[0]['content']} assistant"

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [2 + sum(map(ord, word)) % 50 for word in text.split()]}


@pytest.fixture
def examples(tmp_path) -> list[gsm8k.Example]:
    rows = [{"question": "word " * n, "answer": "one two " + "three " * (n % 4)} for n in (1, 5, 40, 3, 400, 9)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return gsm8k.read_examples(tmp_path / "train.jsonl", Words(), None)


def test_only_answers_have_labels_and_long_examples_are_left_out(examples):
    assert [len(example.prompt) for example in examples] == [3, 7, 42, 5, 11]
    batch = gsm8k.tensors(examples, 0, "cpu")
    assert batch["input_ids"].shape == (5, 64)
    for row, example in enumerate(examples):
        labels = batch["labels"][row]
        assert labels[labels != -100].tolist() == example.answer
        assert batch["attention_mask"][row].sum() == len(example)
        assert batch["input_ids"][row, : len(example)].tolist() == example.prompt + example.answer


def test_every_example_is_in_one_batch_and_the_order_is_the_seeds(examples):
    for seed in (None, 0, 1):
        batches = gsm8k.batched(examples, 2, seed)
        assert sorted(map(id, itertools.chain(*batches))) == sorted(map(id, examples))
    assert gsm8k.batched(examples, 2, 0) == gsm8k.batched(examples, 2, 0)
    orders = {
        tuple(id(example) for batch in gsm8k.batched(examples, 2, seed) for example in batch) for seed in range(8)
    }
    assert len(orders) > 1


def test_the_loss_is_the_mean_over_tokens_and_training_reduces_it(examples):
    methods.SHAPES["words"] = (64, 2, 4, 2, 96, 64, True)
    try:
        config = methods.llama_config("words")
    finally:
        del methods.SHAPES["words"]
    model = methods.llama(config)
    batches = [gsm8k.tensors(batch, 0, "cpu") for batch in gsm8k.batched(examples, 2)]
    total = count = 0
    for batch in batches:
        n = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            total, count = total + n * model.eval()(**batch).loss.item(), count + n
    before = gsm8k.mean_loss(model, (dict(batch) for batch in batches), "cpu")
    assert before == pytest.approx(total / count, rel=1e-3)
    model = gsm8k.adapted(model, "sparse", seed=0)
    shapes = [m.weight.shape for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert gsm8k.train(model, batches * 5, 1e-1, "cpu") == sum(gsm8k.RANK * sum(shape) for shape in shapes)
    assert gsm8k.mean_loss(model, (dict(batch) for batch in batches), "cpu") < before - 0.1


def words_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {
        word: index
        for index, word in enumerate(["<pad>", "<eos>", "<unk>", "user", "assistant", "one", "two", "####"])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = "user {{ messages[0]['content'] }} assistant"
    return fast


def test_a_run_from_files_to_the_row(tmp_path, monkeypatch):
    words_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setitem(methods.SHAPES, "words", (64, 2, 4, 2, 96, 64, True))
    methods.llama(methods.llama_config("words")).save_pretrained(tmp_path / "model")
    for part, count in (("train", 60), ("test", 3)):
        lines = [json.dumps({"question": "one two", "answer": "two #### one"})] * count
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
    options = {"model": tmp_path / "model", "gsm8k": tmp_path, "rate": 0.1, "batch": 2, "device": "cpu", "answers": 2}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    for method in ("sparse", "lora", "full"):
        out = tmp_path / f"{method}.json"
        monkeypatch.setattr(sys, "argv", ["gsm8k.py", *words, "--method", method, "--json", str(out)])
        gsm8k.main()
        row = json.loads(out.read_text())
        assert row["loss"] < row["before"] - 0.01
        assert row["before"] == pytest.approx(math.log(64), rel=0.1)  # random weights
        assert row["exact"] in (0, 1)  # both problems are the same
    scalars = {m: json.loads((tmp_path / f"{m}.json").read_text())["trained"] for m in ("sparse", "lora", "full")}
    assert scalars["sparse"] == scalars["lora"] < scalars["full"]


class Answering:
    """A model with an answer for each prompt of two: "#### one"."""

    def eval(self):
        return self

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample, **_):
        assert input_ids[:, -1].tolist() == [4, 4], "padded on the left"
        assert attention_mask.sum(1).tolist() == [3, 4]
        return torch.cat([input_ids, torch.tensor([[7, 5, 1]] * 2)], dim=1)


def test_an_answer_is_exact_if_its_number_is_the_reference_s(tmp_path):
    rows = [{"question": "one", "answer": "two #### one"}, {"question": "two two", "answer": "one #### two"}]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, [*rows, rows[0]])))
    assert gsm8k.exact_answers(Answering(), words_tokenizer(), tmp_path / "test.jsonl", 2, "cpu") == 0.5


@pytest.mark.parametrize(
    ("answer", "number"),
    [("He has 3.\n#### 1,234", "1234"), ("#### -5. So", "-5"), ("#### 0.5", "0.5"), ("5", None), ("####", None)],
)
def test_the_number_of_an_answer(answer, number):
    assert gsm8k.final_number(answer) == number


def test_the_rate_warms_up_and_falls_to_zero():
    factor = gsm8k.decay(60)
    assert [factor(0), factor(1)] == [0.5, 1.0]
    assert factor(60) == 0
    assert all(math.isclose(factor(i) - factor(i + 1), 1 / 58) for i in range(2, 59))


# ---- launches


def test_operators_are_counted_once_without_views_and_ours_as_a_whole():
    x = torch.randn(4, 4)

    def some() -> None:
        torch.nn.functional.linear(x, x.t())
        x.view(-1).to(torch.float32).add(1)  # the dtype stays
        x.to(torch.bfloat16)

    assert launches.launches(some, "cpu") == {"aten::mm": 1, "aten::add": 1, "aten::_to_copy": 1}


def test_deltas_are_written_by_one_call_in_a_step(monkeypatch):
    monkeypatch.setitem(methods.SHAPES, "tiny", (128, 2, 4, 2, 192, 64, True))
    base = methods.llama(methods.llama_config("tiny"))
    budget = methods.Budget.of(base, "all-linear", 0.1)
    model = methods.prepare("sparse", base, budget)
    found = launches.phases(model, torch.randint(64, (1, 16)), "cpu")
    weights = len(model.sparsity.weights)
    adamw = launches.of_optimizer([p.numel() for p in methods.trained_parameters(model)], "cpu")
    assert dict(found["step"] - adamw) == {"sparse_zero::write_all_deltas": 1}
    assert dict(found["accumulating"]) == {"aten::add_": weights}


def test_the_programs_need_no_deepspeed(tmp_path):
    """A machine with a GPU may lack it: every program of a figure can be imported without."""
    programs = sorted({each.script[:-3] for each in gpu_figures.figures()})
    site = Path(importlib.util.find_spec("torch").origin).parents[1]
    for path in site.iterdir():
        if not path.name.startswith(("deepspeed", "trl", "datasets", "tensorboard", "matplotlib")):
            (tmp_path / path.name).symlink_to(path)
    code = "; ".join(f"import {name}" for name in programs) + "; print('imported', 'deepspeed' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (BENCHMARKS.parent, BENCHMARKS, tmp_path)))}
    without_site = [sys.executable, "-S", "-c", f"import sys; {code}"]
    ended = subprocess.run(without_site, env=environment, capture_output=True, text=True)
    assert ended.stdout.strip().endswith("imported False"), ended.stderr
