"""Writes the shipped batch scripts from the template of `sparse-zero submit`: python -m launcher.jobs.render"""

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
Submit it from the directory that is to contain runs/, with the environment of sparse-zero active: sbatch passes PATH
to the job. Options given to sbatch override those below; each node needs as many tasks as ranks.
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
# One word per line, without a shell's quotes.
if ! words=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$sweep" | xargs -r -n 1 printf '%s\\n') || [ -z "$words" ]; then
    echo "$sweep: line $SLURM_ARRAY_TASK_ID is empty, missing, or has a quote without its other half" >&2
    exit 2
fi
mapfile -t overrides <<<"$words"
name=$(basename "${recipe%.*}")"""


def scripts() -> dict[str, str]:
    """The text of each script, by file name."""
    return {
        "single-node.sbatch": batch_script(
            f"""One node, one rank for each of its GPUs.

  sbatch --gres=gpu:4 --ntasks-per-node=4 single-node.sbatch demo.yaml training.learning_rate=1e-3

Two minutes before the time limit the run saves a checkpoint, and the job is requeued to resume from it.
{COMMON}""",
            OPTIONS,
            'sparse-zero train "$@"',
            preparation=ONE_ARGUMENT,
        ),
        "multi-node.sbatch": batch_script(
            f"""Several nodes, one rank for each GPU.

  sbatch --nodes=4 --gres=gpu:8 --ntasks-per-node=8 multi-node.sbatch demo.yaml

The environment and the run's directory must be on a disk that all nodes share.
Two minutes before the time limit the run saves a checkpoint, and the job is requeued to resume from it.
{COMMON}""",
            OPTIONS | {"nodes": 2, "exclusive": True},
            'sparse-zero train "$@"',
            preparation=ONE_ARGUMENT,
        ),
        "preemptible.sbatch": batch_script(
            f"""For a partition whose jobs may be preempted: a preempted job is requeued and resumes.

  sbatch --partition=NAME --gres=gpu:4 --ntasks-per-node=4 preemptible.sbatch demo.yaml

A preempted job has its partition's GraceTime, or the cluster's KillWait, to save a checkpoint. In case that is too
short, the run also writes one every 100 steps, in the background.
{COMMON}""",
            OPTIONS,
            'sparse-zero train "$1" training.save_strategy=steps training.save_steps=100 \\\n'
            '    training.save_total_limit=2 training.async_save=true "${@:2}"',
            preparation=ONE_ARGUMENT,
        ),
        "array.sbatch": batch_script(
            f"""A sweep: task N of an array trains with the overrides in line N of a text file, in runs/RECIPE/N.

  printf '%s\\n' training.learning_rate=1e-3 'training.learning_rate=3e-3 sparse.density=0.02' > sweep.txt
  sbatch --array=1-2 --gres=gpu:1 array.sbatch demo.yaml sweep.txt [section.key=value ...]

Each task is saved and requeued separately. --array=1-100%8 runs at most 8 tasks at a time.
{COMMON}""",
            OPTIONS | {"output": "%x-%A_%a.log"},
            'sparse-zero train "$recipe" "training.output_dir=runs/$name/$SLURM_ARRAY_TASK_ID" "$@" \\\n'
            '    "${overrides[@]}"',
            preparation=SWEEP,
        ),
    }


if __name__ == "__main__":
    for name, text in scripts().items():
        (shipped.directory() / name).write_text(text, encoding="utf-8")
