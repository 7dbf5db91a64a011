"""Draw the pictures of docs/method.md: the partition, the tree, the sharing schemes.

python docs/pictures.py docs
"""

import sys
from pathlib import Path

from cprec_recbole.config import SHARING_SCHEMES
from cprec_recbole.sharing import sharing_plan

# Okabe and Ito's palette, which colour-blind readers can tell apart; a white ground is readable in
# light and dark pages alike
BLOCKS = ("#0072B2", "#E69F00", "#009E73")
SETS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
INK, PALE = "#222222", "#bbbbbb"


def main() -> None:
    folder = Path(sys.argv[1])
    for name, draw in (("partition", partition), ("tree", tree), ("sharing", sharing)):
        (folder / f"{name}.svg").write_text(draw(), encoding="utf-8")


def partition() -> str:
    """Items by falling popularity, and what each block keeps of them."""
    sizes, ranks, full = (40, 80, 160), (64, 16, 4), 64
    marks, x = [], 40.0
    marks.append(text(40, 52, "how often each item occurs, by falling popularity"))
    rank_of_item = 0
    for size, colour in zip(sizes, BLOCKS):
        for _ in range(size // 4):
            height = 110 / (1 + rank_of_item) ** 0.6
            marks.append(rect(x, 180 - height, 6.5, height, colour))
            x, rank_of_item = x + 8, rank_of_item + 1
    marks.append(text(40, 232, "the whole table"))
    marks.append(rect(40, 244, 128, 280, "#ffffff", PALE))
    marks.append(text(104, 390, "n × d", middle=True))
    marks.append(text(330, 232, "in blocks: rows W, and a projection P back to d"))
    names = ("head", "middle", "tail")
    y = 244
    for size, rank, colour, name in zip(sizes, ranks, BLOCKS, names):
        width = rank * 2
        marks.append(rect(330, y, width, size, colour))
        marks.append(text(316, y + size / 2 + 5, name, end=True))
        words = f"W: k × {rank}"
        if rank == full:
            marks.append(text(330 + width + 12, y + size / 2 + 5, words + ", no P"))
        else:
            marks.append(text(330 + width + 12, y + size / 2 + 5, words))
            marks.append(rect(470, y + size / 2 - rank, 128, rank * 2, colour))
            marks.append(text(608, y + size / 2 + 5, f"P: {rank} × d"))
        y += size
    return page(740, 548, "Partition and block embedding", marks)


def tree() -> str:
    """The head's softmax with a cluster for each other block."""
    marks = [text(40, 56, "softmax over the head's items and one cluster for each other block")]
    x = 40.0
    for index in range(8):
        marks.append(rect(x, 70, 40, 34, BLOCKS[0]))
        marks.append(text(x + 20, 92, f"x{index + 1}", middle=True, fill="#ffffff"))
        x += 46
    for j, colour in enumerate(BLOCKS[1:]):
        at = 440 + j * 110
        marks.append(rect(at, 70, 90, 34, "#ffffff", colour))
        marks.append(text(at + 45, 92, f"cluster {j + 2}", middle=True))
    widths = ((40, 10, "block 2"), (320, 14, "block 3"))
    for j, (left, count, name) in enumerate(widths):
        colour, right = BLOCKS[1 + j], left + count * 24
        source = 485 + j * 110
        for end in (left, right - 4):
            marks.append(line(source, 104, end, 178, colour))
        for index in range(count):
            marks.append(rect(left + index * 24, 180, 20, 28, colour))
        marks.append(text(left, 230, f"softmax over {name} alone"))
    marks.append(text(40, 274, "An item of the head: its share of the first softmax."))
    marks.append(text(40, 296, "Any other item: its cluster's share × its share of its block."))
    return page(700, 318, "Tree softmax", marks)


def sharing() -> str:
    """Which layers use the same parameters, of four residual blocks of two layers."""
    marks = []
    for block in range(4):
        marks.append(text(214 + block * 124, 58, f"residual block {block + 1}", middle=True))
    for row, scheme in enumerate(SHARING_SCHEMES):
        y = 72 + row * 46
        marks.append(text(16, y + 22, scheme))
        plan = sharing_plan(scheme, n_layers=8, layers_per_block=2)
        names = sorted(set(plan), key=plan.index)
        for i, which in enumerate(plan):
            x, colour = 160 + i * 56 + (i // 2) * 12, SETS[names.index(which)]
            marks.append(rect(x, y, 50, 32, colour))
            letter = chr(ord("A") + names.index(which))
            dark = colour in ("#F0E442", "#E69F00", "#56B4E9", "#999999", "#CC79A7")
            marks.append(text(x + 25, y + 21, letter, middle=True, fill=INK if dark else "#ffffff"))
        marks.append(text(662, y + 22, f"{len(names)} of 8 kept"))
    return page(760, 316, "Sharing: equal letters are one set of parameters", marks)


def page(width: int, height: int, title: str, marks: list[str]) -> str:
    body = "\n".join(marks)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" \
width="{width}" height="{height}" font-family="system-ui, sans-serif" font-size="14" role="img" \
aria-label="{title}">
<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>
<text x="16" y="28" font-size="16" font-weight="600" fill="{INK}">{title}</text>
{body}
</svg>
"""


def rect(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}" '
        f'stroke="{stroke}" stroke-width="2"/>'
    )


def line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        'stroke-width="1.5"/>'
    )


def text(
    x: float, y: float, words: str, *, middle: bool = False, end: bool = False, fill: str = INK
) -> str:
    anchor = "middle" if middle else "end" if end else "start"
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" text-anchor="{anchor}">{words}</text>'


if __name__ == "__main__":
    main()
