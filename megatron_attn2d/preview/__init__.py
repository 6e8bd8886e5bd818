"""Shows before a run starts what it will take: memory, the process grid, and attention's time and bytes."""
