"""A study as one page, `compare.html`, that is read without a network."""

from cprec_recbole.compare.page.runs import read_runs
from cprec_recbole.compare.page.write import write_page

__all__ = ["read_runs", "write_page"]
