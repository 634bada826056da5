"""The subcommands that read or write adapters. Each imports the libraries it needs when it runs."""

import argparse
from pathlib import Path

from launcher import report
from launcher.accelerator import set_accelerator
from sparse_zero.errors import UserError, refuse_to_overwrite


def evaluate(arguments: argparse.Namespace) -> int:
    """Evaluate an adapter on a recipe's evaluation examples."""
    from sparse_zero.recipe.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    adapter = _adapter_directory(arguments.adapter, arguments.revision)
    set_accelerator()
    with report.only_json_on_stdout(arguments.json):
        from sparse_zero.training.evaluate import evaluate

        metrics = evaluate(recipe, adapter)
    if arguments.json:
        report.print_json(metrics)
    else:
        report.print_facts(f"{arguments.adapter} on {arguments.recipe}", metrics)
    return 0


def merge(arguments: argparse.Namespace) -> int:
    """Write base model + adapter as a plain model directory."""
    adapter = _adapter_directory(arguments.adapter, arguments.revision)
    refuse_to_overwrite(Path(arguments.out))
    set_accelerator()
    with report.only_json_on_stdout(arguments.json):
        from sparse_zero.adapters.merging import write_merged

        facts = write_merged(
            adapter,
            Path(arguments.out),
            arguments.scale,
            arguments.force,
            arguments.trust_remote_code,
            quantize=arguments.quantize,
            prompts=arguments.prompt,
        )
    if arguments.json:
        report.print_json(facts)
    else:
        report.print_facts(f"{arguments.adapter} merged", facts)
        print(f"next: {_loader(facts.get('task'))}.from_pretrained({arguments.out!r})")
    return 0


def combine(arguments: argparse.Namespace) -> int:
    """Write a weighted combination of adapters as a new adapter."""
    adapters = [_adapter_directory(name) for name in arguments.adapters]
    refuse_to_overwrite(Path(arguments.out))
    with report.only_json_on_stdout(arguments.json):
        from sparse_zero.adapters.combine import combine_adapters

        combined = combine_adapters(
            adapters,
            arguments.out,
            arguments.weights,
            arguments.combination_type,
            arguments.density,
            arguments.seed,
        )
    facts = {
        "out": arguments.out,
        "base_model": combined.config.base_model_name_or_path,
        "combination_type": arguments.combination_type,
        "trainable_parameters": combined.config.trainable_parameters,
    }
    if arguments.json:
        report.print_json(facts)
    else:
        report.print_facts(f"{len(adapters)} adapters combined", facts)
    return 0


def convert(arguments: argparse.Namespace) -> int:
    """Write an adapter, or the changes of a fine-tuned model, in another format."""
    source = _adapter_directory(arguments.adapter, arguments.revision)
    with report.only_json_on_stdout(arguments.json):
        from sparse_zero.adapters.formats.convert import convert

        facts = convert(source, Path(arguments.out), arguments.to, arguments.base, arguments.max_density)
    if arguments.json:
        report.print_json(facts)
    else:
        report.print_facts(f"{arguments.adapter} converted", {k: v for k, v in facts.items() if k != "notes"})
        report.print_notes(facts["notes"])
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    """Describe an adapter."""
    adapter = _adapter_directory(arguments.adapter, arguments.revision)
    with report.only_json_on_stdout(arguments.json):
        from sparse_zero.adapters.inspection import describe

        facts = describe(adapter, arguments.base)
    if arguments.json:
        report.print_json(facts)
    else:
        report.print_description(arguments.adapter, facts)
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Turn the shards of a checkpoint into an adapter."""
    checkpoint = Path(arguments.checkpoint)
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: no such checkpoint")
    refuse_to_overwrite(Path(arguments.out))
    set_accelerator()
    with report.only_json_on_stdout(arguments.json):
        from sparse_zero.checkpoint.export import export

        facts = export(checkpoint, Path(arguments.out))
    if arguments.json:
        report.print_json(facts)
    else:
        report.print_facts(f"{arguments.checkpoint} exported", facts)
    return 0


def _adapter_directory(name: str, revision: str | None = None) -> Path:
    """Checks the path before torch is imported; downloads what is on the hub."""
    from sparse_zero.adapters.hub import adapter_directory

    path = Path(name)
    if (path / "adapter" / "adapter_config.json").is_file() and not (path / "adapter_config.json").exists():
        raise UserError(f"{name}: is the directory of a run; its adapter is {path / 'adapter'}")
    return adapter_directory(name, revision)


def _loader(task: str | None) -> str:
    classes = {"sequence-classification": "AutoModelForSequenceClassification", "causal-lm": "AutoModelForCausalLM"}
    return classes.get(task, "AutoModel")
