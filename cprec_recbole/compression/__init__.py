"""What `compress` and `recover` do, a step a module."""
