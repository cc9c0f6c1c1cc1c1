"""One module per command: flags, orchestration and exit codes. Imported by `im3d_jax.main` alone."""
