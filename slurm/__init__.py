"""Launching on Slurm clusters."""
