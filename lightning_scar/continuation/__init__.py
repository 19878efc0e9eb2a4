"""How a worker outlives the others: the same for every front door. Knows neither Lightning nor Accelerate."""
