"""Messages against imbalance on held-out requests: every method, and placer under several caps.

    python benchmarks/frontier.py --gpus 8 --svg docs/frontier.svg

Every method is fitted to one half of the requests of the canned traces (or of --trace) and judged
on the other half. The figure that README.md shows is made by this.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from placer.evaluation import evaluate
from placer.files import atomic_path
from placer.planning import (
    Settings,
    build_problem,
    open_traces,
    placement_of,
    run_solver,
    split_sources,
)

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("contiguous", "round_robin", "random", "eplb", "exflow")
CAPS = (1.02, 1.05, 1.10, 1.15, 1.2, 1.3, 1.4, 1.6, None)
WIDTH, HEIGHT, MARGIN = 640, 400, 56


@dataclass(frozen=True)
class Point:
    """One placement: who made it, and its held-out figures."""

    name: str
    messages: float
    imbalance: float
    mine: bool


def measure_points(settings: Settings, traces: list[Path]) -> list[Point]:
    """Fit every method and judge it."""
    parts = split_sources(open_traces(traces), settings)
    problem = build_problem(parts.fit, settings, lambda _: None)
    runs = [(name, None, name) for name in PEERS]
    runs += [("local_search", cap, f"placer, cap {cap or 'none'}") for cap in CAPS]
    points = []
    for solver, cap, label in runs:
        asked = replace(settings, solver=solver)
        result = run_solver(replace(problem, max_imbalance=cap), asked)
        figures = evaluate(
            placement_of(problem, result),
            {},
            parts.judge,
            scope=parts.scope,
            dispatch=settings.dispatch,
            num_resamples=0,
        ).metrics
        messages = figures[f"messages_{settings.dispatch}"]["value"]
        imbalance = figures["imbalance"]["value"]
        points.append(Point(label, messages, imbalance, solver == "local_search"))
        print(f"{label:18} messages {messages:.3f}  imbalance {imbalance:.3f}", flush=True)
    return points


def draw(points: list[Point], title: str) -> str:
    """An SVG scatter plot; placer's points are joined."""
    low_x, high_x = 1.0, max(p.imbalance for p in points) * 1.03
    low_y = min(p.messages for p in points) * 0.97
    high_y = max(p.messages for p in points) * 1.02

    def x(value: float) -> float:
        return MARGIN + (value - low_x) / (high_x - low_x) * (WIDTH - 2 * MARGIN)

    def y(value: float) -> float:
        return HEIGHT - MARGIN - (value - low_y) / (high_y - low_y) * (HEIGHT - 2 * MARGIN)

    text = 'font-family="sans-serif" font-size="12"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{MARGIN}" y="24" {text} font-weight="bold">{title}</text>',
    ]
    bottom, left = HEIGHT - MARGIN, MARGIN
    out.append(f'<path d="M{left} {MARGIN}V{bottom}H{WIDTH - MARGIN}" fill="none" stroke="#888"/>')
    ticks = 5
    for i in range(ticks + 1):
        value_x = low_x + (high_x - low_x) * i / ticks
        value_y = low_y + (high_y - low_y) * i / ticks
        out.append(
            f'<text x="{x(value_x):.0f}" y="{bottom + 18}" {text} text-anchor="middle" '
            f'fill="#555">{value_x:.2f}</text>'
        )
        out.append(
            f'<text x="{left - 6}" y="{y(value_y) + 4:.0f}" {text} text-anchor="end" '
            f'fill="#555">{value_y:.2f}</text>'
        )
    out.append(
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" {text} text-anchor="middle">'
        "imbalance: max / mean rank load (1 is perfect)</text>"
    )
    out.append(
        f'<text x="14" y="{HEIGHT / 2}" {text} text-anchor="middle" '
        f'transform="rotate(-90 14 {HEIGHT / 2})">messages per token and layer</text>'
    )
    mine = sorted((p for p in points if p.mine), key=lambda p: p.imbalance)
    line = "L".join(f"{x(p.imbalance):.1f} {y(p.messages):.1f}" for p in mine)
    out.append(f'<path d="M{line}" fill="none" stroke="#0a7d4f" stroke-width="2"/>')
    for p in points:
        colour = "#0a7d4f" if p.mine else "#b03a2e"
        out.append(
            f'<circle cx="{x(p.imbalance):.1f}" cy="{y(p.messages):.1f}" r="4" fill="{colour}"/>'
        )
        if not p.mine:
            below = 16 if p.name == "contiguous" else 4
            out.append(
                f'<text x="{x(p.imbalance) + 7:.1f}" y="{y(p.messages) + below:.1f}" {text} '
                f'fill="{colour}">{p.name}</text>'
            )
    first = mine[len(mine) // 2]
    out.append(
        f'<text x="{x(first.imbalance) - 4:.1f}" y="{y(first.messages) + 18:.1f}" {text} '
        'text-anchor="end" fill="#0a7d4f">placer, cap by cap</text>'
    )
    return "\n".join([*out, "</svg>", ""])


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--trace", type=Path, nargs="*", help="default: the canned traces")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--slots-per-rank", type=int)
    parser.add_argument("--dispatch", default="alltoall", choices=("alltoall", "coherent"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--svg", type=Path, help="draw the figure here")
    parser.add_argument("--title", default="Held-out requests, canned traces")
    arguments = parser.parse_args()
    traces = arguments.trace or sorted(p for p in (ROOT / "traces").iterdir() if p.is_dir())
    settings = Settings(
        num_ranks=arguments.gpus,
        slots_per_rank=arguments.slots_per_rank,
        dispatch=arguments.dispatch,
        seed=arguments.seed,
    )
    points = measure_points(settings, traces)
    if arguments.svg is not None:
        with atomic_path(arguments.svg, force=True) as temporary:
            temporary.write_text(draw(points, arguments.title))


if __name__ == "__main__":
    main()
