"""The commands of `cprec`, one a module: each adds its parser and knows how to run."""
