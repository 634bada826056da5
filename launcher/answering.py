"""The subcommands whose result is text of a model: `sparse-zero chat` and `sparse-zero generate`."""

import argparse
from pathlib import Path
from typing import Any

from launcher import report
from launcher.accelerator import set_accelerator
from sparse_zero.errors import UserError, printable


def chat(arguments: argparse.Namespace) -> int:
    """Talk to a model, or answer one prompt."""
    if arguments.json and arguments.prompt is None:
        raise UserError("--json prints one answer: pass what to answer with --prompt")
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise UserError("--prompt: is empty")
    set_accelerator()
    with report.only_json_on_stdout(arguments.json):
        from sparse_zero.generation import chat as talking
        from sparse_zero.generation.language_model import check_generation, open_model

        check_generation(arguments.max_new_tokens, arguments.temperature)
        report.hide_progress()
        model = open_model(arguments.model, arguments.revision, arguments.trust_remote_code)
        talking.check_comparison(model, arguments.compare)
        length, temperature = arguments.max_new_tokens, arguments.temperature
        if arguments.json:
            facts = talking.answer_once(model, arguments.prompt, length, temperature, arguments.compare)
    if arguments.json:
        report.print_json(facts)
        return 0
    lines = talking.typed_lines() if arguments.prompt is None else [" ".join(arguments.prompt.split("\n"))]
    talking.talk(model, lines, length, temperature, _show_pair if arguments.compare else None)
    return 0


def generate(arguments: argparse.Namespace) -> int:
    """Answer a recipe's evaluation prompts into a file."""
    from sparse_zero.recipe.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.examples is not None and arguments.examples < 1:
        raise UserError(f"--examples {arguments.examples}: must be at least 1")
    out = Path(arguments.out)
    if out.exists():
        raise UserError(f"{out}: already exists; name another file with --out")
    set_accelerator()
    with report.only_json_on_stdout(arguments.json):
        from sparse_zero.generation import answers
        from sparse_zero.generation.language_model import check_generation

        check_generation(arguments.max_new_tokens, arguments.temperature)
        report.hide_progress()
        model = answers.open_for(recipe, arguments.adapter, arguments.revision)
        prompts = answers.prompts_of(recipe, model, arguments.examples)
        rows = answers.write_answers(
            model,
            prompts,
            out,
            arguments.max_new_tokens,
            arguments.temperature,
            int(recipe.training.get("per_device_eval_batch_size", 8)),
            arguments.compare,
        )
        for number, row in enumerate(rows, 1):
            if number <= arguments.show:
                _show_row(row)
    facts = {"out": str(out), "model": model.name, "answers": len(prompts)}
    if arguments.json:
        report.print_json(facts)
    else:
        report.print_facts(f"{arguments.recipe} answered", facts)
    return 0


def _show_pair(before: str, after: str) -> None:
    report.print_beside({"base model": before, "adapter": after})


def _show_row(row: dict[str, Any]) -> None:
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    print(f"\n{printable(prompt)}")
    shown = {"base model": row["base_answer"]} if "base_answer" in row else {}
    report.print_beside({**shown, "answer": row["answer"], "reference": row["reference"]})
