"""From a plan to images: solving, decoding, writing."""
