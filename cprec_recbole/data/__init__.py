"""RecBole's interactions as arrays, and the rows and windows that are made of them on demand."""
