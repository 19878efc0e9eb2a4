"""Blocks, distances, selection and the running checkpoint, in pure torch. Imports neither Lightning nor Accelerate."""
