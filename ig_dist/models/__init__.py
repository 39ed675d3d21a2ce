"""The diffusion transformer and its sizes."""
