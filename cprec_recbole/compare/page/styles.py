"""How each contender looks: one colour, symbol and dash in every picture.

Colours are those of Okabe and Ito, which people with any kind of colour blindness can tell apart
(M. Okabe, K. Ito, "Color Universal Design", 2008), but yellow, which white paper swallows; black is
the page's ink, white on a dark page. Contenders that share a colour differ in symbol and dash.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle, product

from cprec_recbole.compare.findings.points import in_order

INK, GREY = "var(--ink)", "var(--grey)"
ORANGE, SKY, GREEN = "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"


@dataclass(frozen=True)
class Style:
    """What a contender is drawn with, in plotly's words."""

    colour: str
    symbol: str
    dash: str


Styles = dict[str, Style]

KNOWN: Styles = {
    "uncompressed": Style(INK, "star", "solid"),
    "compressed": Style(VERMILLION, "circle", "solid"),
    "recovered": Style(VERMILLION, "circle-open", "dash"),
    "recovered-int8": Style(VERMILLION, "cross", "dot"),
    "uncompressed-recovered": Style(INK, "star-open", "dash"),
    "tree": Style(BLUE, "square", "solid"),
    "untied": Style(BLUE, "square-open", "dash"),
    "blocks-only": Style(GREEN, "triangle-up", "solid"),
    "sharing-only": Style(GREEN, "triangle-up-open", "dash"),
    "narrower": Style(ORANGE, "diamond", "solid"),
    "narrower-int8": Style(ORANGE, "cross", "dot"),
    "one-rank": Style(ORANGE, "diamond-open", "dash"),
    "recjpq-svd": Style(PURPLE, "triangle-down", "solid"),
    "recjpq-random": Style(PURPLE, "triangle-down-open", "dash"),
    "hashing": Style(GREY, "hourglass", "dashdot"),
    "uniform-svd": Style(SKY, "x", "solid"),
    "int8": Style(SKY, "cross", "dash"),
}
_SPARE = [
    Style(colour, symbol, "dot")
    for symbol, colour in product(
        ("pentagon", "pentagon-open", "bowtie", "bowtie-open", "hexagram", "hexagram-open"),
        (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION),
    )
]
# outlines in a box from -8 to 8, for the legend outside of the pictures
_OUTLINES = {
    "star": "M0-7L1.7-2.2 6.7-2.2 2.7.9 4.1 5.7 0 2.8-4.1 5.7-2.7.9-6.7-2.2-1.7-2.2Z",
    "circle": "M5.5 0A5.5 5.5 0 1 1-5.5 0 5.5 5.5 0 1 1 5.5 0Z",
    "square": "M-5-5H5V5H-5Z",
    "triangle-up": "M0-6L6 4.5H-6Z",
    "triangle-down": "M0 6L6-4.5H-6Z",
    "diamond": "M0-6.5L6.5 0 0 6.5-6.5 0Z",
    "hourglass": "M-5-5H5L-5 5H5Z",
    "x": "M0-2.3L3.6-6 6-3.6 2.3 0 6 3.6 3.6 6 0 2.3-3.6 6-6 3.6-2.3 0-6-3.6-3.6-6Z",
    "cross": "M-2-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
    "pentagon": "M0-6L5.7-1.9 3.5 4.9H-3.5L-5.7-1.9Z",
    "bowtie": "M-5-5V5L5-5V5Z",
    "hexagram": "M0-7L2-3.5H6L4 0 6 3.5H2L0 7-2 3.5H-6L-4 0-6-3.5H-2Z",
}


def assign_styles(contenders: Iterable[str]) -> Styles:
    """A style for each name, in the order of the legend; unknown names get spare ones."""
    names = in_order(contenders)
    spare = cycle(_SPARE)
    return {name: KNOWN[name] if name in KNOWN else next(spare) for name in names}


def outline(style: Style) -> str:
    """The style's symbol as an SVG path in a box from -8 to 8."""
    return _OUTLINES[style.symbol.removesuffix("-open")]
