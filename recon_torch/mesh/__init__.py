"""Surfaces of Gaussians, found in their density or depth, cleaned, textured and written (A.5, Figure 8)."""
