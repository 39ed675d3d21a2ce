"""Start a job on the processes of this machine: ``ig-dist launch``, from a checkout."""

from ig_dist.cli import main

if __name__ == "__main__":
    main("launch")
