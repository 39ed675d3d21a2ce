"""Start a job on a SLURM cluster, and keep it going until it is finished: ``ig-dist slurm``, from a checkout."""

from ig_dist.cli import main

if __name__ == "__main__":
    main("slurm")
