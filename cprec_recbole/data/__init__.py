"""RecBole's interactions as arrays, and training rows made on demand."""
