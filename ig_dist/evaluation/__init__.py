"""Plans, units, features, scores, pictures."""
