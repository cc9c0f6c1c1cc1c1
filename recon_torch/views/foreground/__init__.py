"""The object before a smooth backdrop, and what is doubtful about it: in views, and in a user's picture."""
