"""Several processes that train one model: their talk, and tails that are spread over them."""
