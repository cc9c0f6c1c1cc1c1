"""Measuring a trained model against the ground truth of the procedural test objects: `im3d evaluate`."""
