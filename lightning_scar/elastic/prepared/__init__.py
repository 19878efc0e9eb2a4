"""Workers that start in a moment: a process that has imported what they import forks them."""
