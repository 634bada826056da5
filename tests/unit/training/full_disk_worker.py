"""Trains a recipe on a file system that is filled after its training or in it, then makes room and resumes.

Runs in a mount namespace of its own: full_disk_worker.py RECIPE DIRECTORY KIBIBYTES STEP. So many KiB are left free
when it is filled, after the training if STEP is 0. Prints a JSON object for each of the two runs: its status, and the
sizes of the files of its directory.
"""

import json
import sys
from pathlib import Path

from sparse_zero import SparseTrainer, train


def fill(directory: Path, left: int) -> Path:
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            file.truncate(max(0, file.tell() - left))
    return filler


def main(recipe: str, directory: Path, left: int, step: int) -> None:
    evaluate, training_step = SparseTrainer.evaluate, SparseTrainer.training_step

    def evaluate_and_fill(self, *args, **kwargs):
        metrics = evaluate(self, *args, **kwargs)
        if not self.is_in_train and not step:
            fill(directory, left)
        return metrics

    def train_and_fill(self, *args, **kwargs):
        if step == self.state.global_step:
            fill(directory, left)
        return training_step(self, *args, **kwargs)

    output = directory / "out"
    words = [recipe, f"training.output_dir={output}", "--merge"]
    SparseTrainer.evaluate = evaluate_and_fill
    if step:
        SparseTrainer.training_step = train_and_fill
    report(train.main(words), output)
    (directory / "filler").unlink()
    SparseTrainer.evaluate, SparseTrainer.training_step = evaluate, training_step
    report(train.main([*words, "--resume"]), output)


def report(status: int, output: Path) -> None:
    files = {str(path.relative_to(output)): path.stat().st_size for path in output.rglob("*") if path.is_file()}
    print(json.dumps({"status": status, "files": files}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), 1024 * int(sys.argv[3]), int(sys.argv[4]))
