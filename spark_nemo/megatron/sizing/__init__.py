"""Memory of one rank of a training run, computed from the model's sizes and the parallel layout."""
