"""Autoencoders (the field also says tokenizers)."""
