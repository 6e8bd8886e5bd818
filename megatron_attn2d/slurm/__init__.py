"""Jobs of Slurm: `submit.py` renders `job.sbatch` for a run and hands it in."""
