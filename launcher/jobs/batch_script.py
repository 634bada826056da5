"""The batch script that runs `sparse-zero train` in a Slurm job.

`sparse-zero submit` writes it, and launcher.jobs.render makes the shipped scripts from it.

Whether a stopped job is requeued depends on who stopped it. Slurm 22.05, as tested:

                                     the script gets   the ranks get   then Slurm
    time limit is near (--signal)    USR1              -               lets the job run
    time limit                       TERM              TERM            ends it: Reason=TimeLimit
    preempted, with a grace time     -                 TERM            lets it run until the grace time is over
    preempted, PreemptMode=REQUEUE   TERM              TERM            requeues it
    preempted, PreemptMode=CANCEL    TERM              TERM            ends it: PreemptTime is set
    scancel                          TERM              TERM            ends it; a requeue would start it again
    scancel --batch --signal=TERM    TERM              -               lets it run
"""

import re
import shlex
from collections.abc import Sequence

from launcher.ways.slurm import option_words
from sparse_zero.errors import UserError
from sparse_zero.recipe.launch import SlurmOptions
from sparse_zero.recipe.names import has_control_character

ANY_SCRIPT = r"""#!/bin/bash
@ABOUT@
@OPTIONS@

job=$SLURM_JOB_ID
# For Slurm, a task's SLURM_JOB_ID may mean the whole array.
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi

# The run gets USR1 only, which makes it save and exit. Slurm sends TERM to every process of a job that it ends, and a
# second TERM would make the run kill its ranks.
asked= run= early=
pass_on() {
    asked=$1
    if [ -n "$run" ]; then kill -s USR1 "$run" 2>/dev/null; else early=yes; fi
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM
@PREPARATION@
@TRAIN@ \
    launch.launcher=slurm launch.nodes="$SLURM_JOB_NUM_NODES" \
    launch.processes_per_node="${SLURM_NTASKS_PER_NODE:-auto}" --resume &
run=$!
if [ -n "$early" ]; then kill -s USR1 "$run" 2>/dev/null; fi

# A signal interrupts `wait`, not the run.
wait "$run"
while kill -0 "$run" 2>/dev/null; do wait "$run"; done
wait "$run"
status=$?

# A requeue ends this job with a TERM, which must not interrupt the lines below.
trap '' USR1 TERM
may_requeue() {
    case "$status $asked" in
    # 75: stopped and saved. 138: USR1 arrived before the run had a handler for it.
    "75 " | "75 USR1" | "138 USR1") ;;
    # A TERM is the user's, unless the time limit or a preemption caused it.
    "75 TERM" | "137 "* | "138 "* | "143 "*)
        scontrol --oneliner show job "$job" | grep -Eq "Reason=TimeLimit|PreemptTime=[0-9]"
        ;;
    *) false ;;
    esac
}
if may_requeue; then
    if scontrol requeue "$job"; then
        echo "sparse-zero: job $job is requeued, and will resume from its newest checkpoint"
    else
        echo "sparse-zero: job $job cannot be requeued; submit it again to resume from its newest checkpoint"
    fi
elif [ "$status" -ne 0 ] && [ "$asked" = TERM ]; then
    echo "sparse-zero: job $job was told to stop, and is requeued only if Slurm itself does so"
fi
exit "$status"
"""


def batch_script(
    about: str, options: SlurmOptions, train: str, prologue: Sequence[str] = (), preparation: str = ""
) -> str:
    """The text of a batch script.

    Args:
        about: the comment at the top.
        options: the options of sbatch by their long names; true: a flag.
        train: `sparse-zero train RECIPE ...` as shell text.
        prologue: shell lines that must succeed before `train`.
        preparation: shell lines before the prologue, for scripts that have arguments.

    Raises:
        UserError: an option contains a line break or another control character.
    """
    parts = {
        "ABOUT": "\n".join(f"# {line}".rstrip() for line in about.split("\n")),
        "OPTIONS": "\n".join(f"#SBATCH {word}" for word in option_words(options, _quoted)),
        "PREPARATION": "".join(f"\n{part.strip()}\n" for part in (preparation, _checked(prologue)) if part),
        "TRAIN": train,
    }
    return re.sub("@([A-Z]+)@", lambda place: parts[place[1]], ANY_SCRIPT)


def _quoted(name: str, value: str) -> str:
    if has_control_character(value):
        raise UserError(f"--{name}: an option of sbatch must be one line, not {value!r}")
    # Unlike a shell, sbatch treats a backslash inside quotes as an escape.
    return shlex.quote(value).replace("\\", "\\\\")


def _checked(prologue: Sequence[str]) -> str:
    return "\n".join(["set -e", *prologue, "set +e"]) if prologue else ""
