"""What `sparse-zero` prints, read back."""

import json

from launcher.cli import main


def dry_run(capsys, *words):
    assert main(["train", *words, "--dry-run", "--json"]) == 0
    command = json.loads(capsys.readouterr().out)
    return command["command"], command["environment"]


def one_error(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("sparse-zero: error: ")
    return err
