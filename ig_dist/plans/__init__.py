"""What is to be sampled, and where it lies: plans, their units, folders of samples."""
