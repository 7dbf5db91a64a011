"""A model as a folder of three files."""
