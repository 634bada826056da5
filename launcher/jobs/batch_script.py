"""The text of a batch script that runs `sparse-zero train` within a Slurm job. `sparse-zero submit` and the files in
sparse_zero/recipe/configs (written by launcher.jobs.render) are made of this one.

Whether a job goes on after a stop depends on who asked for it. What Slurm 22.05 does, as tried:

                                     the script gets   the ranks get   Slurm then
    time limit is near (--signal)    USR1              -               lets it run
    time limit                       TERM              TERM            ends it: Reason=TimeLimit
    preempted, with a grace time     -                 TERM            lets it run until the grace time is over
    preempted, PreemptMode=REQUEUE   TERM              TERM            queues it again itself
    preempted, PreemptMode=CANCEL    TERM              TERM            ends it: PreemptTime is set
    scancel                          TERM              TERM            ends it; a requeue would bring it back
    scancel --batch --signal=TERM    TERM              -               lets it run
"""

import re
import shlex
from collections.abc import Sequence

from launcher.ways.slurm import option_words
from sparse_zero.errors import UserError
from sparse_zero.recipe.launch import SlurmOptions

ANY_SCRIPT = r"""#!/bin/bash
@ABOUT@
@OPTIONS@

job=$SLURM_JOB_ID
# The plain number of one task of an array stands for the whole array.
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi

# The run is told to save and end by USR1 only. Slurm sends TERM to every process of a job that it ends, and the second
# TERM would tell the run not to wait for its ranks.
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

# A signal ends `wait`, not the run.
wait "$run"
while kill -0 "$run" 2>/dev/null; do wait "$run"; done
wait "$run"
status=$?

# Queueing a job again ends it; that TERM must not hit what follows.
trap '' USR1 TERM
can_go_on() {
    case "$status $asked" in
    # 75: stopped and saved. 138: USR1 came before the run could listen.
    "75 " | "75 USR1" | "138 USR1") ;;
    # A TERM is the user's, unless it came with the time limit or a preemption.
    "75 TERM" | "137 "* | "138 "* | "143 "*)
        scontrol --oneliner show job "$job" | grep -Eq "Reason=TimeLimit|PreemptTime=[0-9]"
        ;;
    *) false ;;
    esac
}
if can_go_on; then
    if scontrol requeue "$job"; then
        echo "sparse-zero: job $job is queued again, to go on from its newest checkpoint"
    else
        echo "sparse-zero: job $job cannot be queued again; submit it anew to go on from its newest checkpoint"
    fi
elif [ "$status" -ne 0 ] && [ "$asked" = TERM ]; then
    echo "sparse-zero: job $job was told to end, and is queued again only if Slurm does that itself"
fi
exit "$status"
"""


def batch_script(
    about: str, options: SlurmOptions, train: str, prologue: Sequence[str] = (), preparation: str = ""
) -> str:
    """Args: about: becomes the comment at the top. options: sbatch's by their long names; true: a flag.
    train: `sparse-zero train RECIPE ...` as shell text. prologue: shell lines that must succeed before it.
    preparation: shell lines before that, for scripts with arguments of their own.

    Raises UserError: an option of more than one line.
    """
    parts = {
        "ABOUT": "\n".join(f"# {line}".rstrip() for line in about.split("\n")),
        "OPTIONS": "\n".join(f"#SBATCH {word}" for word in option_words(options, _quoted)),
        "PREPARATION": "".join(f"\n{part.strip()}\n" for part in (preparation, _checked(prologue)) if part),
        "TRAIN": train,
    }
    return re.sub("@([A-Z]+)@", lambda place: parts[place[1]], ANY_SCRIPT)


def _quoted(name: str, value: str) -> str:
    if "\n" in value:
        raise UserError(f"--{name}: an option of sbatch is one line, not {value!r}")
    # Other than a shell, sbatch takes a backslash within quotes as the escape of what follows.
    return shlex.quote(value).replace("\\", "\\\\")


def _checked(prologue: Sequence[str]) -> str:
    return "\n".join(["set -e", *prologue, "set +e"]) if prologue else ""
