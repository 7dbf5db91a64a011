"""A study: many comparisons over data sets, models, ratios and seeds, resumable and summed up."""

from cprec_recbole.compare.study.conduct import run_study
from cprec_recbole.compare.study.spec import Goal, Spec
from cprec_recbole.compare.study.tables import write_summary

__all__ = ["Goal", "Spec", "run_study", "write_summary"]
