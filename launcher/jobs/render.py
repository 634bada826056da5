"""Writes the shipped batch scripts from the text that `sparse-zero submit` uses too: python -m launcher.jobs.render"""

from launcher.jobs.batch_script import batch_script
from sparse_zero.recipe import shipped

OPTIONS = {
    "job-name": "sparse-zero",
    "output": "%x-%j.log",
    "open-mode": "append",
    "nodes": 1,
    "ntasks-per-node": 1,
    "cpus-per-task": 4,
    "time": "04:00:00",
    "signal": "B:USR1@120",
    "requeue": True,
}

COMMON = """
Run it from the project's folder. Options given to sbatch replace those below; each node needs as many tasks as ranks.
`sparse-zero submit RECIPE` writes such a script for a recipe, and submits it."""

ONE_ARGUMENT = """
if [ $# -lt 1 ]; then
    echo "usage: sbatch SCRIPT RECIPE [section.key=value ...]" >&2
    exit 2
fi"""

SWEEP = """
if [ $# -lt 2 ] || [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
    echo "usage: sbatch --array=1-LINES SCRIPT RECIPE SWEEP [section.key=value ...]" >&2
    exit 2
fi
recipe=$1 sweep=$2
shift 2
# One word on each line, with a shell's quotes taken off.
if ! words=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$sweep" | xargs -r -n 1 printf '%s\\n') || [ -z "$words" ]; then
    echo "$sweep: line $SLURM_ARRAY_TASK_ID is empty, missing, or has a quote without its other half" >&2
    exit 2
fi
mapfile -t overrides <<<"$words"
name=$(basename "${recipe%.*}")"""


def scripts() -> dict[str, str]:
    """The text of each script by its file's name."""
    return {
        "single-node.sbatch": batch_script(
            f"""One node, one rank for each of its GPUs:

  sbatch --gres=gpu:4 --ntasks-per-node=4 single-node.sbatch demo.yaml training.learning_rate=1e-3

Two minutes before the time limit the run saves a checkpoint, and the job is queued again to go on from there.
{COMMON}""",
            OPTIONS,
            '.venv/bin/sparse-zero train "$@"',
            preparation=ONE_ARGUMENT,
        ),
        "multi-node.sbatch": batch_script(
            f"""Several nodes, one rank for each GPU:

  sbatch --nodes=4 --gres=gpu:8 --ntasks-per-node=8 multi-node.sbatch demo.yaml

The environment in .venv and the run's directory must lie where all nodes see them.
Two minutes before the time limit the run saves a checkpoint, and the job is queued again to go on from there.
{COMMON}""",
            OPTIONS | {"nodes": 2, "exclusive": True},
            '.venv/bin/sparse-zero train "$@"',
            preparation=ONE_ARGUMENT,
        ),
        "preemptible.sbatch": batch_script(
            f"""For a partition whose jobs give way to others: whatever ends the job, it is queued again and goes on.

  sbatch --partition=NAME --gres=gpu:4 --ntasks-per-node=4 preemptible.sbatch demo.yaml

A job that gives way has its partition's GraceTime, or the cluster's KillWait, to save a checkpoint. In case that does
not suffice, one is written every 100 steps besides, in the background.
{COMMON}""",
            OPTIONS,
            '.venv/bin/sparse-zero train "$1" training.save_strategy=steps training.save_steps=100 \\\n'
            '    training.save_total_limit=2 training.async_save=true "${@:2}"',
            preparation=ONE_ARGUMENT,
        ),
        "array.sbatch": batch_script(
            f"""A sweep: task N of the array trains with the overrides of line N of a text file, in runs/RECIPE/N.

  printf '%s\\n' training.learning_rate=1e-3 'training.learning_rate=3e-3 sparse.density=0.02' > sweep.txt
  sbatch --array=1-2 --gres=gpu:1 array.sbatch demo.yaml sweep.txt [section.key=value ...]

Each task is saved and queued again for itself, and --array=1-100%8 lets no more than 8 run at a time.
{COMMON}""",
            OPTIONS | {"output": "%x-%A_%a.log"},
            '.venv/bin/sparse-zero train "$recipe" "training.output_dir=runs/$name/$SLURM_ARRAY_TASK_ID" "$@" \\\n'
            '    "${overrides[@]}"',
            preparation=SWEEP,
        ),
    }


if __name__ == "__main__":
    for name, text in scripts().items():
        (shipped.directory() / name).write_text(text)
