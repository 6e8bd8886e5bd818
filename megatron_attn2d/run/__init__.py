"""The directory of a run: its lock, its checkpoints, what was recorded of its steps, and pictures of that."""
