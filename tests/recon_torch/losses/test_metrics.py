"""Metrics in closed form."""

import math

import torch

from recon_torch.losses.metrics import psnr, silhouette_iou


def test_metrics_in_closed_form():
    images, targets = torch.full((2, 8, 8, 3), 0.6), torch.full((2, 8, 8, 3), 0.5)
    masks = torch.zeros(2, 8, 8, 1)
    masks[:, :4] = 1
    images[1, 4:] = 0.5
    torch.testing.assert_close(psnr(images, targets), torch.tensor([20.0, 20 + 10 * math.log10(2)]))
    torch.testing.assert_close(psnr(images, targets, masks), torch.tensor([20.0, 20.0]))
    alphas = torch.zeros(2, 8, 8, 1)
    alphas[0, 2:6] = 0.7
    torch.testing.assert_close(silhouette_iou(alphas, masks), torch.tensor([1 / 3, 0.0]))
    assert silhouette_iou(alphas[1:], alphas[1:]).item() == 1
