"""Diffusion as pure functions of arrays: schedules, objective, sampler and guidance (Sec. 3.1, 3.4)."""
