"""The arguments of the subcommands of `run_commands`. Imports no torch."""

import argparse

from launcher.parser import add_recipe
from sparse_zero.checkpoint.resume import RESETS, split_resets


def add_train(commands) -> argparse.ArgumentParser:
    train = commands.add_parser(
        "train",
        help="start the ranks of a run",
        description="Start the ranks that the recipe's `launch` section describes, and wait for them.\n"
        "SIGINT, SIGTERM and SIGUSR1 make the ranks save a checkpoint and exit with status 75; a second\n"
        "signal kills them. Otherwise the exit status is that of the ranks.",
        epilog="examples:\n"
        "  sparse-zero train demo.yaml training.learning_rate=1e-3 sparse.density=0.01\n"
        "  sparse-zero train demo.yaml --resume\n"
        "  sparse-zero train demo.yaml training.learning_rate=1e-4 --resume --reset learning_rate\n"
        "  sparse-zero train demo.yaml launch.processes_per_node=2 --dry-run",
    )
    add_recipe(train)
    train.add_argument("--merge", action="store_true", help="also write the merged model after training")
    train.add_argument(
        "--find-rate",
        action="store_true",
        help="instead of training, try five learning rates on a few steps each and say which one has the lowest loss",
    )
    train.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="DIR",
        help="resume from this checkpoint; without DIR (or with auto) from the run's newest complete checkpoint, "
        "if there is one",
    )
    train.add_argument(
        "--reset",
        type=split_resets,
        action="extend",
        default=[],
        metavar="NAMES",
        help=f"with --resume: take these from the recipe instead of from the checkpoint ({', '.join(RESETS)})",
    )
    train.add_argument(
        "--dry-run", action="store_true", help="print the command that would start the ranks, and start nothing"
    )
    return train


def add_submit(commands) -> argparse.ArgumentParser:
    submit = commands.add_parser(
        "submit",
        help="submit a run as a Slurm job",
        usage="sparse-zero submit RECIPE [key=value ...] [--merge] [--dry-run] [--json] [--SBATCH-OPTION VALUE ...]",
        description="Write a batch script to the run's directory, and submit it. Give options of sbatch by\n"
        "their long names, here or in the recipe's `launch.slurm`; the others follow from the recipe.\n"
        "Before the time limit, and when it is preempted, the job saves a checkpoint and is requeued.",
        epilog="examples:\n"
        "  sparse-zero submit demo.yaml --partition gpu --gres gpu:4 --time 04:00:00\n"
        "  sparse-zero submit demo.yaml training.seed=1 launch.nodes=2 --account=A --exclusive --dry-run",
    )
    add_recipe(submit)
    submit.add_argument("--merge", action="store_true", help="also write the merged model after training")
    submit.add_argument(
        "--dry-run", action="store_true", help="print the script and the command to submit it, and write nothing"
    )
    return submit


def add_check(commands) -> argparse.ArgumentParser:
    check = commands.add_parser(
        "check",
        help="check a recipe without loading data or weights",
        description="Ask the libraries that will read the recipe whether its settings are right: the Trainer's\n"
        "arguments, DeepSpeed's file, trackers, the attention kernel, names of metrics, data files, and the targets\n"
        "and the budget on the model's configuration. `train` and `train --dry-run` do the same first.",
        epilog="example:\n  sparse-zero check demo.yaml sparse.targets=[v_proj]",
    )
    add_recipe(check)
    return check


def add_doctor(commands) -> argparse.ArgumentParser:
    doctor = commands.add_parser(
        "doctor",
        help="check the hosts, the network and Slurm before a run",
        description="Check that the hosts have everything that a recipe's run needs, and measure the links between\n"
        "its ranks; without a recipe, check this machine. The exit status is 1 if the run would fail.",
        epilog="examples:\n  sparse-zero doctor\n  sparse-zero doctor demo.yaml launch.hostfile=hosts --no-ranks",
    )
    add_recipe(doctor, nargs="?")
    doctor.add_argument("--no-ranks", action="store_true", help="do not start ranks to measure their links")
    return doctor


def add_plan(commands) -> argparse.ArgumentParser:
    plan = commands.add_parser(
        "plan",
        help="predict the memory and the communication of each rank",
        description="Predict the memory and the communication of each rank at each ZeRO stage, and which stages\n"
        "fit an accelerator. Only the model's configuration is read: `model.name` may be a directory\n"
        "that contains nothing but a config.json.",
        epilog="examples:\n"
        "  sparse-zero plan demo.yaml --ranks 4\n"
        "  sparse-zero plan causal-lm-chat.yaml --ranks 64 --nodes 8 --gpu-memory H100 --bandwidth 50",
    )
    add_recipe(plan)
    plan.add_argument("--ranks", type=int, required=True, metavar="N", help="the number of ranks")
    plan.add_argument("--nodes", type=int, default=1, metavar="M", help="the number of nodes (default: 1)")
    plan.add_argument(
        "--gpu-memory", metavar="GIB_OR_CARD", help="memory per rank: GiB, or a card: H100, A100-40, ..."
    )
    plan.add_argument("--bandwidth", type=float, metavar="GB/S", help="send bandwidth per rank, in 10^9 bytes/s")
    return plan
