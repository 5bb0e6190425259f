"""What a run is made of: input checks, training loop, evaluation, checkpoints, processes."""
