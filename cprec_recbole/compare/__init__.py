"""Compressed models beside uncompressed ones and controls: one engine for a single comparison and
for a study of many, which keeps trials and computes everything else when it is read."""

from cprec_recbole.compare.report import as_markdown, as_screen, write_report
from cprec_recbole.compare.results import findings_of
from cprec_recbole.compare.runner import run_study
from cprec_recbole.compare.spec import Spec

__all__ = ["Spec", "as_markdown", "as_screen", "findings_of", "run_study", "write_report"]
