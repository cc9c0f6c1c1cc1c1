"""The diffusion half of IM-3D in JAX, and the commands that join it to `recon_torch` (Melas-Kyriazi et al. 2024)."""
