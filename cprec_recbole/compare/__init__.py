"""Comparisons: uncompressed, compressed and other contenders under one roof."""
