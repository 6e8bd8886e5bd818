"""What a run will take, told before it starts: memory, the process grid, time and bytes of attention."""
