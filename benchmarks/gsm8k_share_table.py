"""Makes the page and the plot of gsm8k_share.py from its runs."""

from functools import partial
from pathlib import Path

import gsm8k_share_plan as quality
from gsm8k_share_plan import SEEDS, Row, Scale
from noise_quality_table import mean_and_deviation, paired_difference
from share_quality_plan import CELLS, DRAWN, FULL, HEAD, LORA, SCATTERED, SHARES, Cell
from share_quality_table import NAMES, draw_curves
from tables import made_on, table, write_beside

Losses = dict[int, float]
"""By seed."""


def tested(cell: Cell, scale: Scale, done: dict[str, Row]) -> dict[int, Row]:
    """The runs at the chosen rate, by seed."""
    return {run.seed: done[run.key] for run in quality.tests(cell, scale, done) if run.key in done}


def losses(rows: dict[int, Row]) -> Losses:
    return {seed: row["loss"] for seed, row in rows.items()}


def markdown(done: dict[str, Row]) -> str:
    parts = [_introduction(done)]
    for scale in quality.scales(done):
        parts += _sections(scale, done)
    return "\n\n".join(parts) + "\n"


def _introduction(done: dict[str, Row]) -> str:
    return (
        "# SmolLM2-135M-Instruct on GSM8K: loss by share\n\n"
        "One epoch, AdamW without weight decay, warm-up over 1/30 of the steps and a linear decay, bfloat16 autocast "
        "on float32 weights; all linear layers, a share of the whole model's scalars. The base is the Q4_1 GGUF file, "
        f"dequantised. Made by `python benchmarks/gsm8k_share.py --gsm8k DIR` on {made_on(done.values())}.\n\n"
        "The loss is the mean over the tokens of the answers to test problems. Each method has at each share the "
        "learning rate with the lowest loss on other problems: one of three, or one of up to two more where the best "
        f"is at the edge, one run each. Mean ± standard deviation over {len(SEEDS)} seeds, or the number of seeds in "
        "brackets. All runs of a scale share the test problems, which the deviations do not contain."
    )


def _sections(scale: Scale, done: dict[str, Row]) -> list[str]:
    rows = [row for row in done.values() if quality.Run.of(row).scale == scale]
    problems, before = max(row["steps"] for row in rows) * scale.batch, rows[0]["before"]
    count = f"{scale.problems:,} problems" if scale.problems else f"about {problems:,} problems"
    title = f"## {count}, batches of {scale.batch}, at most {scale.longest} tokens"
    parts = [title]
    if scale != quality.FULL_SCALE:
        command = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in scale._asdict().items())
        parts.append(f"A smaller experiment than the benchmark's own (`{command}`), for lack of time on this machine.")
    parts.append(
        f"Loss on {scale.held_out:,} test problems; before training {before:.3f}:\n\n" + _quality(scale, done)
    )
    parts.append("### Best rate by share\n\n" + _rates(scale, done))
    parts.append("### Losses by rate\n\n" + _by_rate(scale, done))
    known = quality.plan(done, scale)
    missing = sum(run.key not in done for run in known)
    return [*parts, f"Missing: {missing} of the {len(known)} runs that are known so far."]


def _quality(scale: Scale, done: dict[str, Row]) -> str:
    found = {cell: tested(cell, scale, done) for cell in CELLS}
    rows = []
    for method in (SCATTERED, *DRAWN, LORA):
        cells = [found.get(Cell(method, share), {}) for share in SHARES]
        rows.append([NAMES[method], *(_mean(losses(each)) for each in cells)])
        if method != SCATTERED:
            base = [losses(found[Cell(SCATTERED, share)]) for share in SHARES]
            differences = [_difference(losses(one), other) for one, other in zip(cells, base, strict=True)]
            rows.append([f"{method} - scattered", *differences])
    for method in (SCATTERED, LORA):
        counts = [_trained(found[Cell(method, share)]) for share in SHARES]
        rows.append([f"trained, {method}", *counts])
    others = [
        f"{NAMES[cell.method]} ({_trained(found[cell])} scalars): {_mean(losses(found[cell]))}"
        for cell in (Cell(FULL, 1), Cell(HEAD, 0))
        if found[cell]
    ]
    text = table(["", *(f"{share:.1%}" for share in SHARES)], rows)
    return text + (f"\n\n{'; '.join(others)}." if others else "")


def _mean(found: Losses) -> str:
    if not found:
        return "-"
    mean, deviation = mean_and_deviation(found.values())
    text = f"{mean:.3f}" + (f" ± {deviation:.3f}" if deviation is not None else "")
    return text if len(found) == len(SEEDS) else f"{text} ({len(found)})"


def _difference(found: Losses, base: Losses) -> str:
    mean, error = paired_difference(found, base)
    if mean is None:
        return "-"
    return f"{mean:+.3f}" + (f" ± {error:.3f}" if error is not None else "")


def _trained(rows: dict[int, Row]) -> str:
    return next((f"{row['trainable']:,}" for row in rows.values()), "-")


def _rates(scale: Scale, done: dict[str, Row]) -> str:
    """The table for docs/choosing."""
    rows = []
    for method in (SCATTERED, *DRAWN, LORA):
        cells = {cell.share: cell for cell in CELLS if cell.method == method}
        rows.append(
            [NAMES[method], *(_rate(cells[share], scale, done) if share in cells else "-" for share in SHARES)]
        )
    text = table(["", *(f"{share:.1%}" for share in SHARES)], rows)
    others = ", ".join(f"{NAMES[cell.method]} {_rate(cell, scale, done)}" for cell in (Cell(FULL, 1), Cell(HEAD, 0)))
    return f"{text}\n\n{others}. In brackets the rates that were tried; +: the best is the largest, -: the smallest."


def _rate(cell: Cell, scale: Scale, done: dict[str, Row]) -> str:
    rate = quality.chosen_rate(cell, scale, done)
    if rate is None:
        return "-"
    tried = [run.learning_rate for run in quality.rate_runs(cell, scale, done) if run.key in done]
    edge = "+" if rate == max(tried) else "-" if rate == min(tried) else ""
    return f"{rate:g}{edge} ({min(tried):g} to {max(tried):g})"


def _by_rate(scale: Scale, done: dict[str, Row]) -> str:
    rows = []
    for cell in CELLS:
        texts = []
        for run in quality.rate_runs(cell, scale, done):
            if row := done.get(run.key):
                text = f"{run.learning_rate:g}: {row['validation']:.3f} ({row['loss']:.3f})"
                texts.append(f"**{text}**" if quality.chosen_rate(cell, scale, done) == run.learning_rate else text)
        share = f", {cell.share:.1%}" if 0 < cell.share < 1 else ""
        if texts:
            rows.append([f"{NAMES[cell.method]}{share}", ", ".join(texts)])
    note = "On the validation problems, in brackets on the test problems; the chosen rate is bold."
    return f"{note}\n\n{table(['', ''], rows)}"


def plot(done: dict[str, Row], path: Path) -> None:
    """Loss over trained scalars, of the largest scale with results. Raises ImportError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    complete = [s for s in quality.scales(done) if any(tested(cell, s, done) for cell in CELLS)]
    figure, axes = pyplot.subplots(figsize=(6.5, 4.5), layout="constrained")
    for scale in complete[:1]:
        draw_curves(axes, {cell: tested(cell, scale, done) for cell in CELLS}, lambda row: row["loss"])
        size = f"{scale.problems:,} problems" if scale.problems else "all problems"
        axes.set_title(f"SmolLM2-135M on GSM8K, {size}, one epoch", fontsize="medium")
    axes.set_ylabel("loss on test problems")
    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_page(done: dict[str, Row], cache: Path) -> str:
    """Write page and plot beside the results. Returns: the page."""
    return write_beside(cache, markdown(done), partial(plot, done))
