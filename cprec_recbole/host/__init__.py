"""RecBole: registration with it, what mends it, and what it has written."""
