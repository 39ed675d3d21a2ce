"""Published checkpoints to ours and back. Start at ``formats.py``: names of weights, and which way their time runs."""
