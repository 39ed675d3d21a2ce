"""Where files are: paths, URLs, the faults of a storage."""
