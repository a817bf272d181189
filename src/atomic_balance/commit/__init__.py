"""Group commit: which changes travel together, and what follows when that fails."""
