"""Comparisons: contenders of one size, trained and measured under one roof."""
