"""How a worker survives the death of others, for every front door. Imports neither Lightning nor Accelerate."""
