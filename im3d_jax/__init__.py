"""The diffusion half of IM-3D, in JAX: views are generated, trained for and denoised again here."""
