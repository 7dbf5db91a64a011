"""What a study found, out of its folder alone. Tables and the page say it; they read nothing."""

from cprec_recbole.compare.findings.found import Findings, findings_of

__all__ = ["Findings", "findings_of"]
