"""The data: index, order, streaming."""
