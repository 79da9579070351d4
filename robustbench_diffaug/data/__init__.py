"""Images with labels: what checkpoints are shown."""
