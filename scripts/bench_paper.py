"""Measure the speed-ups of the paper's ensembles on this machine, without the paper's weights.

    python scripts/bench_paper.py --folder FOLDER [--type q8_0] [--scale 1.0] [--output docs/benchmarks.md]

Makes models in the paper's shapes with random weights (make_shaped_model), runs `me-local bench` for each ensemble, and
puts the table into the output file between the marks `<!-- bench_paper -->`, with a plot beside it. What is already in
FOLDER is not done again, so a run that was stopped goes on. An ensemble that does not fit into memory is left out, and
the table says so.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import make_shaped_model as shaped
from matplotlib.figure import Figure

from me_local.llama.weights import supports_gpu
from me_local.system.machine import available_memory

MARK = "<!-- bench_paper -->"
PER_MEMBER = 1.5e9  # bytes of cache and buffers besides the weights
PAPER = (1.78, 2.68)


@dataclass(frozen=True, slots=True)
class Case:
    """One of the paper's ensembles."""

    name: str
    shapes: tuple[str, ...]


CASES = (
    Case("2 similar: Qwen2.5-3B, Qwen2.5-Math-1.5B", ("qwen2.5-3b", "qwen2.5-math-1.5b")),
    Case("2 similar 7B: OpenChat, Nous-Hermes-2", ("openchat-3.5", "nous-hermes-2-mistral-7b")),
    Case(
        "3 similar 7B: OpenChat, Nous-Hermes-2, OpenHermes",
        ("openchat-3.5", "nous-hermes-2-mistral-7b", "openhermes-2.5-mistral-7b"),
    ),
    Case(
        "3 heterogeneous 7B: OpenChat, Mistral-Instruct, DeepSeek",
        ("openchat-3.5", "mistral-7b-instruct-v0.2", "deepseek-llm-7b"),
    ),
)


@dataclass(frozen=True, slots=True)
class Given:
    """Where, in which format and how large."""

    folder: Path
    type: str
    scale: float
    vocabularies: Path | None


def free_memory() -> float | None:
    """Bytes of GPU memory in all, or of memory that is free where nothing is offloaded; None where nobody tells."""
    if supports_gpu() and shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return sum(float(line) for line in answer.split()) * 2**20
    return available_memory()


def needed(case: Case, given: Given) -> float:
    """Bytes that an ensemble takes."""
    shapes = [shaped.scaled(shaped.SHAPES[name], given.scale) for name in case.shapes]
    return sum(shaped.weights_size(shape, given.type) + PER_MEMBER * given.scale for shape in shapes)


def measure(case: Case, given: Given) -> dict[str, Any] | str:
    """The report of `me-local bench` on an ensemble, or why there is none."""
    result = given.folder / f"{'+'.join(case.shapes)}-{given.type}-{given.scale:g}.json"
    if result.exists():
        return json.loads(result.read_text())
    free = free_memory()
    if free is not None and needed(case, given) > free:
        return f"needs {needed(case, given) / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free"
    toml = []
    for name in case.shapes:
        path = given.folder / f"{name}-{given.type}-{given.scale:g}.gguf"
        if not path.exists():
            print(f"making {path.name}", flush=True)
            shaped.make(name, path, of=given.type, scale=given.scale, vocabularies=given.vocabularies)
        toml.append(f'[[members]]\nname = "{name}"\npath = "{path.absolute()}"\nn_ctx = 2048\n')
    models = given.folder / "models.toml"
    models.write_text("\n".join(toml))
    print(f"measuring {case.name}", flush=True)
    command = [
        sys.executable,
        "-c",
        "from me_local.cli import main; main()",
        "bench",
        "--models",
        str(models),
        "--json",
    ]
    report = subprocess.check_output(command, text=True)
    result.with_suffix(".part").write_text(report)
    result.with_suffix(".part").replace(result)
    return json.loads(report)


def table(reports: dict[str, dict[str, Any] | str], given: Given, where: str) -> str:
    """The Markdown between the marks."""
    scale = (
        "" if given.scale == 1 else f", shapes shrunk by {given.scale:g}: the figures say nothing of the paper's sizes"
    )
    lines = [
        f"{where}, {given.type}{scale}. The paper's speed-ups of ME over CE are {PAPER[0]} to {PAPER[1]}, on an H100.",
        "",
        "| ensemble | CE, pieces/s | CE in parallel | ME | ME to CE | limit | outside decode |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, report in reports.items():
        if isinstance(report, str):
            lines.append(f"| {name} | {report} | | | | | |")
            continue
        speeds = {speed["kind"]: speed for speed in report["speeds"]}
        figures = [f"{speeds[kind]['pieces']:.1f}" for kind in ("ce", "ce parallel", "me")]
        figures += [f"{report['speed_up']:.2f}", f"{report['limit']:.2f}", f"{1 - speeds['me']['decode_share']:.1%}"]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return "\n".join(lines)


def machine(reports: dict[str, dict[str, Any] | str]) -> str:
    """What it ran on."""
    cpu = next(
        (
            f"{r['machine']['cores']} cores of {r['machine']['processor']}"
            for r in reports.values()
            if isinstance(r, dict)
        ),
        "",
    )
    if not (supports_gpu() and shutil.which("nvidia-smi")):
        return f"{date.today()}, {cpu}, no GPU"
    names = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return f"{date.today()}, {names.stdout.strip().replace(os.linesep, ', ')}"


def put(output: Path, content: str) -> None:
    """Write the content between the two marks of a file; add both at its end where they are missing."""
    text = output.read_text() if output.exists() else ""
    parts = text.split(MARK)
    if len(parts) != 3:
        parts = [text + "\n", "", "\n"]
    output.write_text(f"{parts[0]}{MARK}\n{content}\n{MARK}{parts[2]}")


def plot(reports: dict[str, dict[str, Any] | str], path: Path) -> None:
    """Bars of the measured speed-ups and their limits, with the paper's range behind them."""
    found = {name.split(":")[0]: report for name, report in reports.items() if isinstance(report, dict)}
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhspan(*PAPER, color="0.9", label="paper, H100")
    for offset, key in ((-0.2, "speed_up"), (0.2, "limit")):
        axes.bar([i + offset for i in range(len(found))], [report[key] for report in found.values()], 0.4, label=key)
    axes.set_xticks(range(len(found)), list(found))
    axes.set_ylabel("times as fast as CE")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Make, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="keeps the models and the results")
    parser.add_argument("--type", choices=sorted(shaped.FORMATS), default="q8_0")
    parser.add_argument("--scale", type=shaped.scale_argument, default=1.0)
    parser.add_argument("--vocabularies", type=Path, help="ggml-vocab-*.gguf")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks.md"))
    arguments = parser.parse_args()
    given = Given(arguments.folder, arguments.type, arguments.scale, arguments.vocabularies)
    given.folder.mkdir(parents=True, exist_ok=True)
    reports = {case.name: measure(case, given) for case in CASES}
    put(arguments.output, table(reports, given, machine(reports)))
    plot(reports, arguments.output.with_name(f"{arguments.output.stem}-paper.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
