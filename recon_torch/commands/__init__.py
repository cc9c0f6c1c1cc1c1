"""One module per command of the 3D half: flags, orchestration and exit codes."""
