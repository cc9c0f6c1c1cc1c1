"""LoRA: low-rank adapters of a backbone's kernels (Hu et al. 2021), their files, and their public layouts."""
