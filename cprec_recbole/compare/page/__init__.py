"""A study as one page, `compare.html`, that is read without a network."""

from cprec_recbole.compare.page.write import render_page, write_page

__all__ = ["render_page", "write_page"]
