"""What an outer run keeps on disk, and reads back: whole or not at all, by one writer, beside the training."""
