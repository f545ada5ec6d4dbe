"""The picture in docs/codecs.md, from what the benchmark printed.

headrace bench codecs --json | python -m bench.codecs_picture > docs/codecs.svg
"""

from __future__ import annotations

import json
import math
import sys

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 20, 50
RATIOS = (1.0, 6.0)
DIVERGENCES = (1e-5, 1e-2)  # nats; exact codecs, which have 0, lie on the lower edge
COLOURS = {
    "raw": "#555",
    "split": "#555",
    "int8": "#1769aa",
    "fp8": "#1769aa",
    "int4": "#b3541e",
    "ecsq": "#b3541e",
}


def draw(metrics: dict[str, float]) -> str:
    """SVG: ratio to bfloat16 against the KL divergence, on a logarithmic scale, a dot for each codec."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    for ratio in range(int(RATIOS[0]), int(RATIOS[1]) + 1):
        x = _x(ratio)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{ratio} ×</text>')
    for exponent in range(-5, -1):
        y = _y(10.0**exponent)
        label = "0" if exponent == -5 else f"{10.0**exponent:g}"
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for name, colour in COLOURS.items():
        x, y = _x(metrics[f"{name}_ratio"]), _y(metrics[f"{name}_kl"])
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{x + 9:.1f}" y="{y - 7:.1f}" fill="{colour}">{name}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">fewer bytes than bfloat16</text>'
    )
    parts.append(
        f'<text x="16" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 16 {HEIGHT / 2})">'
        "KL divergence, nats</text>"
    )
    return "\n".join([*parts, "</svg>", ""])


def _x(ratio: float) -> float:
    share = (ratio - RATIOS[0]) / (RATIOS[1] - RATIOS[0])
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _y(divergence: float) -> float:
    low, high = (math.log10(edge) for edge in DIVERGENCES)
    share = (math.log10(max(divergence, DIVERGENCES[0])) - low) / (high - low)
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


if __name__ == "__main__":
    sys.stdout.write(draw(json.load(sys.stdin)["metrics"]))
