"""What an outer run shows while it goes on: figures, tensors, pictures, progress."""
