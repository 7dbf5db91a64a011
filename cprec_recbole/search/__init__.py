"""Exact top-k over a factorised catalogue, most of which is not read (CpRec, section 3.2)."""
