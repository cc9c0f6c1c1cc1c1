"""A package, so that none of this name in the environment (torch-fidelity installs one) takes its place."""
