"""Starts runs: ranks on this host (`ranks.py`), jobs of Slurm (`slurm.py`, which renders `job.sbatch`)."""
