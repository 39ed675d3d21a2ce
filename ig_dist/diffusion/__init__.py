"""The mathematics: path, loss, guidance, samplers."""
