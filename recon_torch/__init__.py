"""The 3D half of IM-3D in PyTorch (Sec. 3.2, 3.3): Gaussians, a rasteriser, losses, and the fit of views.

It never imports jax and is useful alone: `im3d fit` and `im3d render` are its commands. Another process
drives a fit through `recon_torch.process.client`.
"""
