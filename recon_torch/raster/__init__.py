"""Differentiable rendering of Gaussians: one function, two engines, and a readable reference."""
