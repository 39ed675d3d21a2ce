"""Encode images into WebDataset shards of latents, with an index: ``ig-dist encode``, from a checkout."""

from ig_dist.cli import main

if __name__ == "__main__":
    main("encode")
