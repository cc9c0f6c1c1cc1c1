"""A page to look at an asset with a browser: one file that needs no network and runs from a disk."""

PAGE = "asset.html"
"""The name of the page beside an asset."""
