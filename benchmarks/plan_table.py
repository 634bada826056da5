"""Plans Llama-3-70B and Llama-3.1-405B on 8 to 1,024 GPUs of 80 GiB, and writes results/plan.md.

python benchmarks/plan_table.py
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODELS = ("llama-3-70b", "llama-3.1-405b")
TARGETS = {"all linear layers": "all-linear", "value and output": "[v_proj, o_proj]"}
RANKS = (8, 64, 256, 1024)
RANKS_PER_NODE, GPU_GIB, BANDWIDTH_GB = 8, 80, 50
GIB = 2**30


def plan(model: str, targets: str, ranks: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "launcher", "plan", str(HERE / "shapes/plan.yaml"), "--json"]
    command += [f"model.name={HERE / 'shapes' / model}", f"sparse.targets={targets}", f"--ranks={ranks}"]
    command += [f"--nodes={ranks // RANKS_PER_NODE}", f"--gpu-memory={GPU_GIB}", f"--bandwidth={BANDWIDTH_GB}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def row(model: str, targets: str, planned: dict[str, Any]) -> str:
    by_name = {stage["stage"]: stage for stage in planned["stages"]}
    chosen = by_name[planned["stage"]] if planned["stage"] else min(by_name.values(), key=lambda s: s["device_bytes"])
    sizes = {held["what"]: held["bytes"] for held in chosen["holds"] if held["where"] == "device"}
    return " | ".join(
        (
            f"| {model}",
            targets,
            f"{planned['ranks']:,}",
            planned["stage"] or "none",
            f"{by_name['2']['device_bytes'] / GIB:.0f}",
            f"{chosen['device_bytes'] / GIB:.1f}",
            f"{sizes.get('weights', 0) / GIB:.1f}",
            f"{(sizes['originals'] + sizes['indices']) / GIB:.1f}",
            f"{12 * planned['trained'] / planned['ranks'] / GIB:.2f}",
            f"{by_name['3']['least_ranks'] or 'none'}",
            f"{chosen['sent_bytes_per_step'] / GIB:,.0f}",
            f"{chosen['seconds_per_step']:.1f}",
            f"{chosen['host_bytes_per_node'] / GIB:,.0f} |",
        )
    )


def table() -> str:
    heads = (
        "model",
        "targets, 1%",
        "GPUs",
        "stage",
        "memory, stage 2",
        "memory, this stage",
        "weights",
        "originals and indices",
        "optimizer",
        "min. GPUs, stage 3",
        "sent per step",
        f"s at {BANDWIDTH_GB} GB/s",
        "host memory per node",
    )
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * 3}{'---:|' * (len(heads) - 3)}"]
    lines += [
        row(model, name, plan(model, targets, ranks))
        for model in MODELS
        for name, targets in TARGETS.items()
        for ranks in RANKS
    ]
    return "\n".join(lines)


def main() -> None:
    text = (
        "bfloat16, one sequence of 2,048 tokens per rank and step, gradient checkpointing,\n"
        f"{GPU_GIB} GiB GPUs, of which 8% are reserved; {RANKS_PER_NODE} per node.\n"
        "GiB of each rank at its peak; activations and gathered weights are estimates.\n"
        "Sent bytes, seconds and host memory are those of the listed stage.\n"
        f"Made by `python benchmarks/plan_table.py`.\n\n{table()}\n"
    )
    (HERE / "results/plan.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
