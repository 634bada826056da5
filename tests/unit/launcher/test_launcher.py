"""The `sparse-zero` command without any rank: arguments, commands that would start ranks, errors, output."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from launcher import commands, processes, report
from launcher.cli import main
from launcher.ways import devices
from sparse_zero.errors import UserError

BIN = Path(sys.executable).parent


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch, tmp_path):
    """Eight cores, no accelerator, none of the variables that change the command."""
    for name in ("OMP_NUM_THREADS", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # so that what a test leaves in it is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(devices, "count_accelerators", lambda: 0)
    monkeypatch.setattr(devices, "usable_cores", lambda: 8)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {name: m}\ndata: {path: d, columns: {text: t, label: l}}\n")
    return path.name


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


# Arguments


@pytest.mark.parametrize("words", [["--help"], ["plan", "--help"], ["train", "RECIPE", "--dry-run"]])
def test_answers_without_importing_the_heavy_libraries(words, recipe):
    words = [recipe if word == "RECIPE" else word for word in words]
    code = (
        "import sys\nfrom launcher.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets', 'numpy', 'rich'}\n"
        "print('IMPORTED', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("IMPORTED []\n")
    assert len(done.stdout.splitlines()) > 1, "nothing was answered"


def test_module_and_script_are_the_same_command():
    version = [
        subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
        for command in ([BIN / "sparse-zero"], [sys.executable, "-m", "launcher"])
    ]
    assert version[0] == version[1]
    assert version[0].startswith("sparse-zero 0.")


def test_overrides_may_follow_options(capsys, recipe):
    command, _ = dry_run(capsys, recipe, "training.seed=1", "--merge", "training.seed=2")
    assert command[-4:] == [recipe, "training.seed=1", "training.seed=2", "--merge"]


def test_override_with_dashes_is_refused_with_the_right_spelling(capsys, recipe):
    with pytest.raises(SystemExit) as stop:
        main(["train", recipe, "--training.seed=1", "--dry-run"])
    assert stop.value.code == 2
    assert "write an override without dashes: training.seed=1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["trian"], ["inspect", "a", "b"], ["evaluate", "r.yaml"], ["convert", "a", "b", "--to", "lora"], []]
)
def test_wrong_arguments_end_with_two(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: sparse-zero" in capsys.readouterr().err


# The command that starts ranks


def test_deepspeed_command(capsys, recipe):
    command, environment = dry_run(
        capsys, recipe, "launch.processes_per_node=2", "launch.master_port=29501", "training.seed=7"
    )
    assert command == [
        *(str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "29501"),
        *("--hostfile", "/dev/null", "--log_level", "critical"),
        *("--module", "sparse_zero.train", recipe),
        *("launch.processes_per_node=2", "launch.master_port=29501", "training.seed=7"),
    ]
    assert environment == {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "4"}


def test_torchrun_command(capsys, recipe):
    words = ["launch.launcher=torchrun", "launch.processes_per_node=3"]
    command, environment = dry_run(capsys, recipe, *words)
    torchrun = [sys.executable, "-m", "launcher.ways.torchrun"]
    ranks = ["--nproc-per-node", "3", "-m", "sparse_zero.train", recipe, *words]
    assert command == [*torchrun, "--standalone", *ranks]
    assert environment == {"OMP_NUM_THREADS": "2"}

    command, _ = dry_run(capsys, recipe, *words, "launch.master_port=29501")
    assert command[3:7] == ["--master-addr", "127.0.0.1", "--master-port", "29501"]


def test_the_users_own_environment_is_kept(capsys, recipe, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert dry_run(capsys, recipe, "launch.processes_per_node=2")[1] == {}


def test_one_rank_keeps_torchs_own_threads(capsys, recipe):
    command, environment = dry_run(capsys, recipe)
    assert command[1:3] == ["--num_gpus", "1"]
    assert environment == {"DS_ACCELERATOR": "cpu"}


def test_dry_run_prints_a_line_that_a_shell_reads_back(capsys, recipe, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    odd = ["model.name=it's a $HOME `dir`", "sparse.targets=['*.v_proj', \"o proj\"]", "data.revision=a\nb"]
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("--dry-run started a process"))
    main(["train", recipe, "launch.processes_per_node=2", "--dry-run", *odd])
    line = capsys.readouterr().out.rstrip("\n")
    monkeypatch.undo()
    read = subprocess.run(["sh", "-c", f"set -- {line}; printf '%s\\0' \"$@\""], capture_output=True, text=True)
    words = read.stdout.split("\0")[:-1]
    assert words[:5] == ["env", "-u", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=4"]
    assert words[5] == str(BIN / "deepspeed")
    assert words[-3:] == odd
    assert words == shlex.split(line)


def test_automatic_ports_of_two_runs_differ(capsys, recipe):
    def port():
        command, _ = dry_run(capsys, recipe)
        return int(command[command.index("--master_port") + 1])

    with socket.socket() as first_run:
        first_run.bind(("", port()))
        first_run.listen()
        taken = first_run.getsockname()[1]
        ports = {port() for _ in range(5)}
    assert taken not in ports
    assert len(ports) > 1, "the port is a constant"


# Accelerators


@pytest.mark.parametrize("node", ["nvidia0", "kfd", "dri/renderD128", "accel/accel0", "dxg", None])
def test_accelerators_are_counted_by_torch_only_where_there_is_a_device_node(node, tmp_path, monkeypatch):
    monkeypatch.undo()
    asked = []
    fake = SimpleNamespace(accelerator=SimpleNamespace(device_count=lambda: asked.append(1) or 4))
    monkeypatch.setitem(sys.modules, "torch", fake)
    for other in ("nvidiactl", "null", "dri/card0"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).touch()
    if node:
        (tmp_path / node).parent.mkdir(exist_ok=True)
        (tmp_path / node).touch()
    assert devices.count_accelerators(tmp_path) == (4 if node else 0)
    assert asked == ([1] if node else [])


def test_ranks_for_accelerators():
    assert devices.count_ranks("auto", 0) == 1
    assert devices.count_ranks("auto", 4) == 4
    assert devices.count_ranks(3, 4) == 3
    assert devices.count_ranks(16, 0) == 16
    with pytest.raises(UserError, match=r"5 ranks .* has 4"):
        devices.count_ranks(5, 4)


def test_gpus_of_the_machine(capsys, recipe, monkeypatch):
    monkeypatch.setattr(devices, "count_accelerators", lambda: 4)
    command, environment = dry_run(capsys, recipe)
    assert command[1:3] == ["--num_gpus", "4"]
    assert environment == {}
    command, environment = dry_run(capsys, recipe, "training.use_cpu=true", "launch.processes_per_node=8")
    assert command[1:3] == ["--num_gpus", "8"]
    assert environment == {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    assert main(["train", recipe, "launch.processes_per_node=5", "--dry-run"]) == 2
    assert "5 ranks need as many accelerators, this machine has 4" in one_error(capsys)


def test_chosen_gpus_survive_deepspeeds_runner(capsys, recipe, monkeypatch):
    monkeypatch.setattr(devices, "count_accelerators", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,2, 7")
    command, environment = dry_run(capsys, recipe, "launch.processes_per_node=2")
    assert command[1:3] == ["--include", "localhost:5,2"]
    assert environment == {"CUDA_VISIBLE_DEVICES": None}
    assert dry_run(capsys, recipe, "launch.launcher=torchrun")[1] == {}

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937,GPU-1")
    assert main(["train", recipe, "--dry-run"]) == 2
    assert "launch.launcher=torchrun" in one_error(capsys)


# Errors


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml: no such recipe"),
        (["train", "recipe.yaml", "sparse.densty=0.1"], "did you mean 'density'?"),
        (["train", "recipe.yaml", "sparse.density=2"], "sparse.density"),
        (["train", "recipe.yaml", "word"], "override 'word': write section.key=value"),
        (["train", "recipe.yaml", "launch.master_port=70000"], "70000 is not a port number"),
        (["train", "recipe.yaml", "training.output_dir=recipe.yaml/x"], "recipe.yaml is a file"),
        (["train", "recipe.yaml", "training.deepspeed=broken.json"], "broken.json: not JSON"),
        (
            ["train", "recipe.yaml", "model.name=package://no_such_package/m"],
            "'no_such_package' is not an installed package",
        ),
        (["evaluate", "recipe.yaml", "--adapter", "nowhere"], "nowhere: no such adapter directory"),
        (["inspect", "nowhere"], "nowhere: no such adapter directory"),
        (["merge", "nowhere", "out"], "nowhere: no such adapter directory"),
    ],
)
def test_user_errors_are_one_line_and_status_two(words, complaint, capsys, recipe, monkeypatch):
    monkeypatch.setattr(processes, "run", lambda *a, **k: pytest.fail("ranks were started"))
    Path("broken.json").write_text("{'zero': 1}")
    assert main(words) == 2
    assert complaint in one_error(capsys)


def test_a_taken_port_is_refused(capsys, recipe):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["train", recipe, f"launch.master_port={port}"]) == 2
    assert f"{port} is in use" in one_error(capsys)


def test_interrupt_and_lines_of_an_error(capsys, monkeypatch):
    def raising(error):
        def command(arguments):
            raise error

        return command

    monkeypatch.setattr(commands, "inspect", raising(KeyboardInterrupt()))
    assert main(["inspect", "x"]) == 130
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(commands, "inspect", raising(UserError("first\n  second")))
    assert main(["inspect", "x"]) == 2
    assert one_error(capsys) == "sparse-zero: error: first second\n"


def test_a_reader_that_leaves_is_no_error(tmp_path):
    code = (
        "import sys, time\nfrom launcher import commands\nfrom launcher.cli import main\n"
        "commands.inspect = lambda arguments: (sys.stdin.read(), print('x' * 100000), 0)[2]\n"
        "sys.exit(main(['inspect', 'x']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=-1, stdout=-1, stderr=-1, env={**os.environ}, text=True
    )
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


# Output


def stand_in(monkeypatch, module, **functions):
    """A module with `functions`, each of which also chatters on stdout as libraries do."""

    def chattering(function):
        def chatter(*arguments):
            print("Loading weights: 100%")
            return function(*arguments)

        return chatter

    fake = ModuleType(module)
    for name, function in functions.items():
        setattr(fake, name, chattering(function))
    monkeypatch.setitem(sys.modules, module, fake)


BARS = [(0, 0, 1), (0, 1e-8, 0), (1e-8, 1e-7, 3)]
DESCRIPTION = {
    "base_model": "org/[bold]model",
    "density": 0.02,
    "trainable_parameters": 453120,
    "bytes": 3 * 1024**2,
    "kinds": [{"name": f"layer.*.{'x' * 90}.weight", "shape": [384, 1536], "scalars": 11796}],
    "layers": [{"name": f"layer.{index}", "weights": 2} for index in range(40)],
    "tensors": [{"name": f"layer.{index // 2}.{index}.weight", "scalars": 1} for index in range(80)],
    "histogram": [{"from": start, "to": end, "scalars": n} for start, end, n in BARS],
    "largest": [{"name": "layer.3.weight", "position": [4, 5], "delta": -0.03125}],
    "notes": ["it was [long] ago"],
}


def test_evaluate(capsys, recipe, monkeypatch, tmp_path):
    def evaluate(recipe, adapter):
        assert (recipe.data.max_length, adapter) == (9, Path("."))
        assert os.environ["DS_ACCELERATOR"] == "cpu"
        return {"accuracy": 0.784, "loss": 0.5}

    stand_in(monkeypatch, "sparse_zero.training.evaluate", evaluate=evaluate)
    words = ["evaluate", recipe, "--adapter", ".", "data.max_length=9"]
    assert main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"accuracy": 0.784, "loss": 0.5}
    assert "Loading" in err
    assert main(words) == 0
    assert "accuracy  0.784" in capsys.readouterr().out


def test_merge(capsys, monkeypatch):
    facts = {"out": "merged", "task": "causal-lm", "scalars": 12345}
    stand_in(
        monkeypatch,
        "sparse_zero.adapters.save_and_load",
        write_merged=lambda adapter, out, scale: {**facts, "out": out},
    )
    assert main(["merge", ".", "merged", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts
    assert main(["merge", ".", "merged"]) == 0
    out = capsys.readouterr().out
    assert "12,345" in out
    assert out.endswith("next: AutoModelForCausalLM.from_pretrained('merged')\n")


def test_inspect(capsys, monkeypatch):
    stand_in(monkeypatch, "sparse_zero.adapters.inspection", describe=lambda adapter, base: DESCRIPTION)
    assert main(["inspect", ".", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == DESCRIPTION
    assert main(["inspect", "."]) == 0
    out = capsys.readouterr().out
    for shown in ("org/[bold]model", "453,120", "3.0 MiB", f"layer.*.{'x' * 90}.weight", "384 x 1536", "11,796"):
        assert shown in out, shown
    assert re.search(r"layer\.29 .*\n\.\.\. and 10 more: --json lists all\n", out)
    assert "\n80 weights: --json lists each\n" in out
    assert "layer.0.0.weight" not in out
    bars = [line.split("  ")[0] for line in out.splitlines() if re.search(r"\d\.\d% *$", line)]
    assert bars == ["0", "below 1e-08", "1e-08 to 1e-07"]
    assert f"1e-08 to 1e-07  {'#' * 40}  3  75.0%" in out
    assert "4, 5      -0.03125" in out
    assert out.endswith("note: it was [long] ago\n")


def test_convert(capsys, monkeypatch):
    def convert(source, out, to, base, max_density):
        return {"out": str(out), "to": to, "base_model": base, "max_density": max_density, "notes": ["kept whole"]}

    stand_in(monkeypatch, "sparse_zero.adapters.exchange.convert", convert=convert)
    words = ["convert", ".", "new", "--to", "shira", "--base", "org/model"]
    assert main([*words, "--max-density", "0.25", "--json"]) == 0
    facts = {"out": "new", "to": "shira", "base_model": "org/model", "max_density": 0.25, "notes": ["kept whole"]}
    assert json.loads(capsys.readouterr().out) == facts
    assert main(words) == 0
    out = capsys.readouterr().out
    assert re.search(r"to +shira *\n", out)
    assert re.search(r"max density +0\.5 *\n", out)
    assert out.endswith("note: kept whole\n")


def test_readable():
    pairs = {("bytes", 12): "12 bytes", ("bytes", 1536): "1.5 KiB", ("n", None): "-", ("n", True): "yes"}
    assert report.readable("versions", {"torch": "2.6", "deepspeed": "0.16"}) == "torch 2.6, deepspeed 0.16"
    assert {given: report.readable(*given) for given in pairs} == pairs


def ending(monkeypatch, status, **facts):
    """Stands for ranks that end so."""
    facts = {"stopped": False, **facts}
    monkeypatch.setattr(processes, "run", lambda command, watchdog, stdout, grace: processes.Ending(status, **facts))


def test_train_json_prints_the_results_of_this_run_only(capsys, recipe, monkeypatch, tmp_path):
    results = tmp_path / "runs" / "recipe" / "results.json"
    results.parent.mkdir(parents=True)
    results.write_text('{"accuracy": 0.1}')
    os.utime(results, (1, 1))

    ending(monkeypatch, 0)
    assert main(["train", recipe, "--json"]) == 2
    assert "runs/recipe/results.json: the run has finished, but wrote no results" in one_error(capsys)

    def run(command, watchdog, stdout, grace_seconds):
        assert stdout is sys.stderr
        results.write_text('{"accuracy": 0.8}')
        return processes.Ending(0, stopped=False)

    monkeypatch.setattr(processes, "run", run)
    assert main(["train", recipe, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"accuracy": 0.8}


def test_a_failed_runs_old_results_are_not_printed(capsys, recipe, monkeypatch):
    ending(monkeypatch, 3)
    assert main(["train", recipe, "--json"]) == 3
    assert capsys.readouterr() == ("", "")


def test_a_killed_rank_is_reported_but_not_after_a_stop(capsys, recipe, monkeypatch):
    ending(monkeypatch, 137)
    assert main(["train", recipe]) == 137
    assert "a rank was killed by SIGKILL (possibly by the kernel, out of memory)" in one_error(capsys)
    ending(monkeypatch, 143, stopped=True)
    assert main(["train", recipe]) == 143
    assert capsys.readouterr() == ("", "")


def test_a_death_that_the_watchdog_has_told_of_is_not_told_again(capsys, recipe, monkeypatch):
    ending(monkeypatch, 137, is_explained=True)
    assert main(["train", recipe]) == 137
    assert capsys.readouterr() == ("", "")
