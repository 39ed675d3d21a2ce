"""Processes and engines."""
