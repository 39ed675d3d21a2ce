"""Sets of images, and the features that scores are made of."""
