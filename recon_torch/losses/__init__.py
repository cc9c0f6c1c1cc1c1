"""What renders are compared with views by (Sec. 3.3): LPIPS, MS-SSIM, pixels and masks; and metrics.

All take K images, float32 [K, H, W, C] in [0, 1], and give one number for each.
"""
