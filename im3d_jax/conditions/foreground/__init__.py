"""The object in a user's picture, by alpha or before a smooth backdrop, and what is doubtful about it."""
