"""Draw the README's picture from a comparison: parameters by part, and quality.

python docs/figures.py examples/results/nextitnet-ml-100k docs/sizes.svg
"""

import math
import sys
from pathlib import Path
from string import Template

from cprec_recbole.compare import findings_of

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
    (table,) = findings_of(Path(source)).tables
    largest = max(point.parameters for point in table.points)
    scale = (WIDTH - LEFT - 240) / largest
    marks = []
    for index, point in enumerate(table.points):
        y = 78 + index * GAP
        marks.append(text(16, y + BAR * 0.65, point.label))
        x = float(LEFT)
        for part, colour in COLOURS.items():
            width = point.runs[0].record["parameters"][part] * scale
            marks.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{colour}"/>'
            )
            x += width
        marks.append(text(x + 10, y + 14, f"{point.parameters:,.0f} parameters", bold=True))
        quality, spread = point.quality
        spread_text = "" if math.isnan(spread) else f" ± {spread:.4f}"
        marks.append(text(x + 10, y + 31, f"NDCG@20 {quality:.4f}{spread_text}"))
    for index, (part, colour) in enumerate(COLOURS.items()):
        x = LEFT + index * 110
        marks.append(f'<rect x="{x}" y="46" width="12" height="12" fill="{colour}"/>')
        marks.append(text(x + 18, 57, part))
    page = PAGE.substitute(
        width=WIDTH,
        height=78 + len(table.points) * GAP,
        title=f"{table.cell.model} on {table.cell.dataset}: what is stored",
        marks="\n".join(marks),
    )
    Path(target).write_text(page, encoding="utf-8")


def text(x: float, y: float, words: str, *, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="#222222"{weight}>{words}</text>'


if __name__ == "__main__":
    main()
