"""Encoding images once into shards of latents, by any number of workers."""
