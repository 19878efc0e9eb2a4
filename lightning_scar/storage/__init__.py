"""Bytes on an fsspec file system: deltas, their store and its writer. Knows nothing of training."""
