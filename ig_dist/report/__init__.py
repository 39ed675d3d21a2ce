"""The static HTML page of a run."""
