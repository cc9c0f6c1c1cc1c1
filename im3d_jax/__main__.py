from im3d_jax.main import run

raise SystemExit(run())
