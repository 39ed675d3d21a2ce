"""Hold shards of latents against their index: ``ig-dist verify``, from a checkout."""

from ig_dist.cli import main

if __name__ == "__main__":
    main("verify")
