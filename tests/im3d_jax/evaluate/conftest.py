import pytest

from recon_torch.losses.lpips import PerceptualDistance


@pytest.fixture(scope="session")
def perceptual():
    """LPIPS of the smallest network, with random weights."""
    return PerceptualDistance("squeeze")
