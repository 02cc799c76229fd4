"""The one training loop, its optimisers, its evaluation and its launch on Ray Train."""
