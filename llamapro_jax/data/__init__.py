"""Text to fixed-length rows, rows to batches."""
