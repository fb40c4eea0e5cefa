"""Scaling studies: a matrix of runs, what they measured, and the report of it."""
