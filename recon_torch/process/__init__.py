"""The process that owns the Gaussians: its client, its worker, and what they say to each other."""
