"""The arguments of `sparse-zero chat` and `sparse-zero generate`. Imports no torch."""

import argparse


def add_chat(commands) -> argparse.ArgumentParser:
    chat = commands.add_parser(
        "chat",
        help="talk to an adapter or a model",
        description="Answer what you type, or each line of stdin. MODEL is an adapter, a merged model, a base model\n"
        "or a GGUF file: a directory, a hub id, or package://PACKAGE/PATH. The line /new begins another\n"
        "conversation. A model without a chat template continues each line.",
        epilog="examples:\n"
        "  sparse-zero chat runs/smollm2-chat/adapter --compare\n"
        "  sparse-zero chat user/adapter --revision v1 --prompt 'What is 3 times 17?' --json",
    )
    chat.add_argument("model", metavar="MODEL", help="an adapter or a model")
    chat.add_argument("--prompt", metavar="TEXT", help="answer this, and exit")
    chat.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the model's repository contains"
    )
    _add_shared(chat, "answer with the base model and with the adapter, side by side")
    return chat


def add_generate(commands) -> argparse.ArgumentParser:
    generate = commands.add_parser(
        "generate",
        help="answer a recipe's evaluation prompts into a file",
        description="Answer the prompts of a recipe's evaluation examples with the recipe's model, or with an\n"
        "adapter, and write a line of JSON for each: prompt, reference and answer.",
        epilog="example:\n"
        "  sparse-zero generate smollm2-gsm8k.yaml --adapter runs/smollm2-gsm8k/adapter --out answers.jsonl",
    )
    generate.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a shipped recipe (`sparse-zero recipes`)")
    generate.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override a key of the recipe, as in data.eval_size=20"
    )
    generate.add_argument(
        "--adapter", metavar="DIR", help="an adapter's directory or hub id (default: the base model)"
    )
    generate.add_argument("--out", required=True, metavar="FILE", help="the file to write; must not exist")
    generate.add_argument("--examples", type=int, metavar="N", help="the number of prompts (default: all)")
    generate.add_argument("--show", type=int, default=0, metavar="N", help="also print the first N answers")
    _add_shared(generate, "also write the base model's answers")
    return generate


def _add_shared(command: argparse.ArgumentParser, compare: str) -> None:
    command.add_argument("--compare", action="store_true", help=compare)
    command.add_argument("--revision", metavar="REV", help="of the repository on the hub")
    command.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="the most tokens of an answer (default: 256)"
    )
    command.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="above 0: sample; 0: the most probable token each time (default)",
    )
