"""The program of every rank: it finds its rank, joins the others, runs a recipe and reports how it ended.

deepspeed --num_gpus 2 --module sparse_zero.train demo.yaml training.learning_rate=1e-3
torchrun --nproc-per-node 2 -m sparse_zero.train demo.yaml --resume
srun --nodes 2 --ntasks-per-node 4 python -m sparse_zero.train demo.yaml
mpirun -np 8 --hostfile hosts python -m sparse_zero.train demo.yaml
"""

import os
import sys

if (
    __name__ == "__main__"
    and not sys.flags.safe_path
    and sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(__file__))
):
    # `python -m` puts the working directory first, where the user's own files may be called datasets.py or json.py.
    del sys.path[0]

import argparse
import atexit
import contextlib
import gc
import hashlib
import socket
import traceback
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from sparse_zero.checkpoint.resume import complete_resume_option, split_resets
from sparse_zero.errors import UserError, printable
from sparse_zero.quantized.quiet_imports import silence_imports
from sparse_zero.ranks.caches import use_writable_caches
from sparse_zero.ranks.failures import RankInfo, describe_lost_launcher
from sparse_zero.ranks.parent_watch import has_launcher, watch_parent
from sparse_zero.ranks.placement import Placement
from sparse_zero.ranks.rank_log import ignore_lost_console, open_rank_log
from sparse_zero.ranks.stop_signals import STOPPED, Stopped, StopRequest
from sparse_zero.ranks.watchdog_client import WatchdogClient, join_launcher_watchdog, print_outcome
from sparse_zero.recipe.objective import refuse_objective
from sparse_zero.recipe.recipe import Recipe, load_recipe


def main(argv: list[str] | None = None) -> int:
    """Run one rank, and return its exit status.

    0; 2 for an error of the user; STOPPED if a signal stopped the run, which can be resumed; 1 for any other failure,
    of this rank or of another.
    """
    options = _parse(sys.argv[1:] if argv is None else argv)
    if moved := use_writable_caches():
        place = Path(os.environ[moved[0]]).parent
        print(f"sparse-zero: the home directory cannot be written: {', '.join(moved)} in {place}", file=sys.stderr)
    silence_imports()
    # Before the imports of torch and transformers, which take seconds.
    rank = Rank(StopRequest().install_handlers())
    try:
        return rank.run(options)
    except UserError as error:
        return rank.refuse(str(error))
    except Stopped as stopped:
        return rank.stopped(stopped)
    except Exception as error:
        return rank.fail(error)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sparse_zero.train", description="One rank of a training run.")
    parser.add_argument("recipe", help="a YAML file, or a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override any key of the recipe")
    parser.add_argument("--merge", action="store_true", help="also write the merged model to OUTPUT_DIR/merged")
    parser.add_argument("--find-rate", action="store_true", help="try five learning rates on a few steps each")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="DIR",
        help="resume from a checkpoint; auto: the newest complete one",
    )
    parser.add_argument(
        "--reset",
        type=split_resets,
        action="extend",
        default=[],
        metavar="NAMES",
        help="with --resume: take these from the recipe instead of from the checkpoint",
    )
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    return parser.parse_args(complete_resume_option(argv))


class Rank:
    """This process as a rank of the run, and its messages to the user."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop
        self._placement: Placement | None = None
        self._client: WatchdogClient | None = None
        self._log: Path | None = None
        self._parent, self._has_launcher = os.getppid(), has_launcher(os.environ)
        self._output: Path | None = None
        """The run's directory, absolute."""
        # A log file will replace the descriptors 1 and 2.
        self._console = os.dup(2)

    def run(self, options: argparse.Namespace) -> int:
        recipe = load_recipe(options.recipe, options.overrides)
        self._output = Path(str(recipe.training["output_dir"])).resolve()
        self._placement = Placement.from_environment()
        if self._placement is None and recipe.training.get("deepspeed"):
            # Without a rank in the environment, DeepSpeed would look for MPI.
            self._placement = Placement.single_process()
        with _uncollected():
            if self._placement is not None:
                self._join(self._placement, recipe)
            from sparse_zero.training import run

        run.limit_output(is_first_of_host=self._is_first_of_host)
        if options.find_rate:
            refuse_objective(recipe.training, "--find-rate")
            from sparse_zero.training.rate_search import find_rate

            find_rate(recipe, options.recipe, options.overrides)
        else:
            run.train(
                recipe,
                options.recipe,
                merge=options.merge,
                resume=options.resume,
                stop=self._stop,
                reset=options.reset,
                make=_trainer_of(recipe),
                overrides=options.overrides,
            )
        self._leave(0)
        return 0

    def _join(self, placement: Placement, recipe: Recipe) -> None:
        launch, training = recipe.launch, recipe.training
        placement.export()
        if placement.world_size > 1:
            directory = Path(str(training["output_dir"])) / "logs"
            self._log = open_rank_log(directory, placement.rank, placement.world_size)
        else:
            ignore_lost_console()
        me = RankInfo(placement.rank, socket.gethostname(), os.getpid(), str(self._log) if self._log else None)
        settings: dict[str, Any] = {"silence_seconds": launch.silence_seconds, "console": self._console}
        self._client = join_launcher_watchdog(placement, me, self._stop, **settings)

        from sparse_zero.ranks import rendezvous

        store = rendezvous.open_store(placement, launch.rendezvous_seconds)
        is_watched = self._client is not None
        if not is_watched and placement.world_size > 1:
            self._client = rendezvous.join_rank_zero_watchdog(
                store,
                placement,
                me,
                self._stop,
                print_outcome,
                Path(str(training["output_dir"])) / "launch",
                **settings,
            )
        if self._has_launcher:
            watch_parent(self._parent, lambda process: self._lose_launcher(me, process), os.environ)
        rendezvous.init_process_group(
            store,
            placement,
            use_cpu=bool(training.get("use_cpu")),
            backend=training.get("ddp_backend"),
            must_match=facts_that_must_match(recipe),
            # The launcher of watched ranks has counted the hosts, and may use fewer after a failure.
            nodes=None if is_watched or launch.nodes == "auto" else launch.nodes,
            rendezvous_seconds=launch.rendezvous_seconds,
            timeout_seconds=float(training.get("ddp_timeout", 1800)),
        )

    def _lose_launcher(self, me: RankInfo, process: int) -> None:
        """Ask all ranks to save and stop: the launcher of this rank, a process of that id, has ended."""
        if self._client is not None:
            self._client.report_lost_launcher(process)
        else:
            self._print_error(f"{describe_lost_launcher(me, process)}; the rank is asked to save and stop")
            self._stop.request()

    @property
    def _is_first_of_host(self) -> bool:
        if self._placement is None:
            return os.environ.get("LOCAL_RANK", "0") == "0"
        return self._placement.local_rank == 0

    def refuse(self, message: str) -> int:
        """End all ranks with an error of the user's, which one rank prints."""
        if self._client is not None:
            self._client.report_failure(message, status=2)
        elif self._is_first_of_host:
            # Every rank of a host has the same error.
            self._print_error(message)
        return 2

    def _print_error(self, message: str) -> None:
        with contextlib.suppress(OSError):
            os.write(self._console, f"sparse-zero: error: {printable(message)}\n".encode())

    def fail(self, error: Exception) -> int:
        """End all ranks with this rank's exception, unless another failure caused it."""
        if self._client is None:
            raise error
        text = traceback.format_exc()
        if self._log:
            with self._log.open("a") as log:
                log.write(text)
        self._client.report_failure(f"{type(error).__name__}: {error}", text, status=1)
        return 1

    def stopped(self, stopped: Stopped) -> int:
        if self._placement is None or self._placement.rank == 0:
            print(f"sparse-zero: stopped at step {stopped.step}: {self._saved(stopped)}", file=sys.stderr)
        self._leave(STOPPED)
        return STOPPED

    def _saved(self, stopped: Stopped) -> str:
        if not stopped.checkpoint:
            return "nothing to save"
        if Path(stopped.checkpoint).parent.resolve() != self._output:
            return f"nothing to save; resume with --resume {stopped.checkpoint}"
        return f"saved {stopped.checkpoint}; resume with --resume"

    def _leave(self, status: int) -> None:
        from sparse_zero.training import run

        if self._client is not None:
            self._client.leave(status)
        run.destroy_process_group()


def _trainer_of(recipe: Recipe) -> Any:
    """What makes the trainer of a recipe with an objective; None if it has none."""
    if recipe.training.get("objective") is None:
        return None
    from sparse_zero.training.trl_arguments import config_class

    config_class(recipe.training["objective"])  # says if TRL is not installed
    from sparse_zero.trl.build import build_trl_trainer

    return build_trl_trainer


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection, then or later, of what the libraries create when they are imported: a fifth of the
    time of a rank's start, and nothing of it is ever freed.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def facts_that_must_match(recipe: Recipe) -> dict[str, str]:
    """What must be equal on all hosts for their ranks to compute the same."""
    versions = {name: version(name) for name in ("sparse-zero", "torch", "transformers", "deepspeed")}
    return versions | {"a recipe of checksum": hashlib.sha256(_contents(recipe).encode()).hexdigest()[:12]}


def _contents(recipe: Recipe) -> str:
    """The recipe, with its files' contents instead of their paths, which may differ between hosts. Without the values
    of variables: its checksum is in torch's store, where everyone can read it.
    """
    return recipe.with_contents().model_dump_json(exclude={"launch": {"environment"}})


def _end(status: int) -> NoReturn:
    """Exit as Python does, but without the destructors of C++: threads of gloo or NCCL that a library's process group
    still owns would abort the process.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _end(main())
