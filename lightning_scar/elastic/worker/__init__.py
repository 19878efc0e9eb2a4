"""A worker's part in the generations of its process group."""
