"""Jobs on a SLURM cluster: what is submitted, what runs on its nodes, and what became of it. Knows no training."""
