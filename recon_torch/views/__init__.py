"""Views of an object: cameras, directories of images, foreground masks, video, and the world they are in.

Images are float32 in [0, 1] with channels last: [K, H, W, 3] for K views; masks are [K, H, W, 1]. Everything
is NumPy, so that the JAX half can use it, too; torch is imported only where images are resized.
"""
