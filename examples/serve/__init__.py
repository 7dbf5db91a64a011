"""A service for folders of `save_pretrained`; see README.md."""
