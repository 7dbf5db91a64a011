"""Draw the README's picture from a comparison: parameters by part, and quality.

python docs/figures.py examples/results/nextitnet-ml-100k/compare.json docs/sizes.svg
"""

import json
import sys
from pathlib import Path
from string import Template

# Okabe and Ito's palette, which colour-blind readers can tell apart
COLOURS = {"table": "#0072B2", "layers": "#E69F00", "softmax": "#009E73"}
WIDTH, LEFT, BAR, GAP = 800, 130, 34, 62
PAGE = Template("""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 $width $height" \
font-family="system-ui, sans-serif" font-size="14" role="img" aria-label="$title">
<rect width="$width" height="$height" fill="#ffffff"/>
<text x="16" y="28" font-size="16" font-weight="600" fill="#222222">$title</text>
$marks
</svg>
""")


def main() -> None:
    source, target = sys.argv[1:]
    found = json.loads(Path(source).read_text(encoding="utf-8"))
    summary = found["summary"]
    largest = max(row["parameters"]["mean"] for row in summary.values())
    scale = (WIDTH - LEFT - 240) / largest
    marks = []
    for index, (name, row) in enumerate(summary.items()):
        y = 78 + index * GAP
        marks.append(text(16, y + BAR * 0.65, name))
        x = float(LEFT)
        for part, colour in COLOURS.items():
            width = row[f"parameters: {part}"]["mean"] * scale
            marks.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{colour}"/>'
            )
            x += width
        marks.append(
            text(x + 10, y + 14, f"{row['parameters']['mean']:,.0f} parameters", bold=True)
        )
        marks.append(text(x + 10, y + 31, f"NDCG@20 {figure(row['NDCG@20'])}"))
    for index, (part, colour) in enumerate(COLOURS.items()):
        x = LEFT + index * 110
        marks.append(f'<rect x="{x}" y="46" width="12" height="12" fill="{colour}"/>')
        marks.append(text(x + 18, 57, part))
    first = next(iter(found["contenders"].values()))["model"].removeprefix("Cp")
    page = PAGE.substitute(
        width=WIDTH,
        height=78 + len(summary) * GAP,
        title=f"{first} on {found['dataset']['name']}: what is stored",
        marks="\n".join(marks),
    )
    Path(target).write_text(page, encoding="utf-8")


def figure(value: dict) -> str:
    return f"{value['mean']:.4f}" + (f" ± {value['spread']:.4f}" if value["spread"] else "")


def text(x: float, y: float, words: str, *, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="#222222"{weight}>{words}</text>'


if __name__ == "__main__":
    main()
