import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cluster_benchmark():
    """benchmarks/cluster.py, which has a stand-in for a model."""
    folder = str(Path(__file__).parents[3] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import cluster

        yield cluster
    finally:
        sys.path.remove(folder)
