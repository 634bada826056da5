"""Names in a recipe's `launch` section that would become options, shell commands or lines of a batch script."""

import pytest

from sparse_zero.errors import UserError
from sparse_zero.recipe.recipe import load_recipe

SECTIONS = "model: {name: m}\ndata: {path: d, columns: {text: t, label: l}}\n"


def load(tmp_path, launch: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{SECTIONS}launch: {launch}\n")
    return load_recipe(path).launch


@pytest.mark.parametrize(
    ("launch", "complaint"),
    [
        # A line of a batch script
        (
            '{slurm: {"comment x\\n#SBATCH --uid=0\\nrm -r /": y}}',
            "launch.slurm: 'comment x\\n#SBATCH --uid=0\\nrm -r /'",
        ),
        ('{slurm: {"comment x": y}}', "launch.slurm: 'comment x' cannot be an option"),
        ('{slurm: {"partition;id": gpu}}', "launch.slurm: 'partition;id' cannot be an option"),
        ('{slurm: {"--partition": gpu}}', "launch.slurm: '--partition' cannot be an option: use its long name"),
        ('{slurm: {"": gpu}}', "launch.slurm: '' cannot be an option"),
        (
            '{slurm: {"comment": "x\\n#SBATCH --uid=0"}}',
            "launch.slurm: the value of comment has a line break or another control character: 'x\\n",
        ),
        (
            '{slurm: {"job-name": "a\\e[2Jb"}}',
            "launch.slurm: the value of job-name has a line break or another control character: 'a",
        ),
        # `env NAME=VALUE`, `export NAME=VALUE`, `mpirun -x NAME`
        ('{environment: {"-S id": x}}', "launch.environment: '-S id' cannot be a variable"),
        ('{environment: {"A;id;B": x}}', "launch.environment: 'A;id;B' cannot be a variable"),
        ('{environment: {"A=$(id) B": x}}', "launch.environment: 'A=$(id) B' cannot be a variable"),
        ('{environment: {"A B": x}}', "launch.environment: 'A B' cannot be a variable: use letters, digits and _"),
        ('{environment: {"A\\nB": x}}', "launch.environment: 'A\\nB' cannot be a variable"),
        ('{environment: {"1A": x}}', "launch.environment: '1A' cannot be a variable"),
        ('{environment: {"": x}}', "launch.environment: '' cannot be a variable"),
        ('{environment: {"A": "x\\0"}}', "launch.environment: the value of A has a NUL character"),
        # `--master_addr=ADDRESS` in the shell command of another host
        ('{master_addr: "n1;id"}', "launch.master_addr: 'n1;id' is not a host name or address"),
        ('{master_addr: "$(id)"}', "launch.master_addr: '$(id)' is not"),
        ('{master_addr: "n1 --x"}', "launch.master_addr: 'n1 --x' is not"),
        ('{master_addr: "-oProxyCommand=id"}', "launch.master_addr: '-oProxyCommand=id' is not"),
        ('{master_addr: "n%n"}', "launch.master_addr: 'n%n' is not"),
        ('{master_addr: ""}', "launch.master_addr: '' is not"),
        ('{master_port: "1;id"}', "launch.master_port: "),
        ("{master_port: 65536}", "launch.master_port: 65536 is not a port number"),
        ('{launcher_args: ["a\\0"]}', "launch.launcher_args: 'a\\x00' has a NUL character"),
        ('{container: ["a\\0"], launcher: mpi}', "launch.container: 'a\\x00'"),
    ],
)
def test_a_name_that_is_none_is_refused(tmp_path, launch: str, complaint: str) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, launch)
    assert f"recipe.yaml: {complaint}" in str(error.value)
    assert "\n" not in str(error.value)


def test_usual_names(tmp_path) -> None:
    launch = load(tmp_path, "{slurm: {gres: 'gpu:8', ntasks_per_node: 2, mem-per-cpu: 4G, comment: \"it's $5\"}}")
    assert launch.slurm["comment"] == "it's $5"
    assert load(tmp_path, "{environment: {_A1: '$(x)', HF_TOKEN: null}}").environment["_A1"] == "$(x)"
    for address in ("n1", "gpu-07.cluster.example", "10.0.0.1", "fe80::1", "::1", "my_host"):
        assert load(tmp_path, f"{{master_addr: '{address}'}}").master_addr == address
