"""Training with RecBole: its trainer for our models, on one process or several, to be resumed."""
