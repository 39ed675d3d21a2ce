"""Index shards of latents that were made elsewhere: ``ig-dist index``, from a checkout."""

from ig_dist.cli import main

if __name__ == "__main__":
    main("index")
