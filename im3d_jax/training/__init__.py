"""The parts of the training loop: none of them knows of video or of diffusion."""
