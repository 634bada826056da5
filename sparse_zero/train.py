"""What every rank is started as: it listens to signals, then runs a recipe and turns its end into an exit status.

deepspeed --num_gpus 2 --module sparse_zero.train configs/demo.yaml training.learning_rate=1e-3
torchrun --nproc-per-node 2 -m sparse_zero.train configs/demo.yaml --resume
"""

import argparse
import os
import sys

from sparse_zero.errors import UserError
from sparse_zero.resumption import settle_resume
from sparse_zero.stopping import STOPPED, Stopped, StopRequest


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 2 for what the user has to correct; STOPPED where a signal asked for an end and the
    run can go on with --resume.
    """
    parser = argparse.ArgumentParser(prog="python -m sparse_zero.train", description="One rank of a training run.")
    parser.add_argument("recipe", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override any key of the recipe")
    parser.add_argument("--merge", action="store_true", help="also write the merged model, as OUTPUT_DIR/merged")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="DIR",
        help="go on from a checkpoint; auto: the newest complete",
    )
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    options = parser.parse_args(settle_resume(sys.argv[1:] if argv is None else argv))
    # Before the imports, which take seconds.
    stop = StopRequest().listen()
    from sparse_zero import run
    from sparse_zero.recipe import load_recipe

    is_first_of_host = os.environ.get("LOCAL_RANK", "0") == "0"
    run.keep_quiet(main=is_first_of_host)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        run.train(recipe, options.recipe, merge=options.merge, resume=options.resume, stop=stop)
    except UserError as error:
        # Every rank of a host meets the same error: one of them says so.
        if is_first_of_host:
            print(f"sparse-zero: error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            saved = f"saved in {stopped.checkpoint}; go on with --resume" if stopped.checkpoint else "nothing to save"
            print(f"sparse-zero: stopped at step {stopped.step}: {saved}", file=sys.stderr)
        run.leave()
        return STOPPED
    run.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
