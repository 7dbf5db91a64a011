"""The side-by-side experiment: an uncompressed and a compressed model under one roof."""

from cprec_recbole.compare.experiment import Contender, Experiment, contenders
from cprec_recbole.compare.render import as_markdown, as_table
from cprec_recbole.compare.results import Comparison, save

__all__ = [
    "Comparison",
    "Contender",
    "Experiment",
    "as_markdown",
    "as_table",
    "contenders",
    "save",
]
