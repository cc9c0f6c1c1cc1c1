"""The optimisation of a scene (Sec. 3.3, A.1): settings, steps, recovery from failures, quality gates."""
