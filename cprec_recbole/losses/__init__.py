"""Cross-entropies over factorised rows, value and gradient in pieces."""
