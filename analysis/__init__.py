"""Questions to a checkpoint: what its latents hold, and what its answers lose without them."""
