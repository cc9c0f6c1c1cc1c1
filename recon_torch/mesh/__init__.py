"""Surfaces, found in Gaussians or fitted, are cleaned, textured and written (A.5, Figure 8)."""
