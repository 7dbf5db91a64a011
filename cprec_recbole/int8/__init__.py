"""Matrices in int8: rows of blocks, layers, and `quantize`."""
