"""ig_dist: diffusion transformers with Internal Guidance, trained, sampled and scored exactly."""

__version__ = "0.1.0"
