"""The 3D half of IM-3D in PyTorch: Gaussians, rasteriser, losses, direct fit (Sec. 3.2, 3.3). Useful alone.

Nothing here imports jax. `recon_torch.process.client` is the handle by which another process drives a fit.
"""
