"""Scores, sweeps, and what images are held against."""
