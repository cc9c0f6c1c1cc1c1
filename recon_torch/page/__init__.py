"""A page to look at an asset with a browser: one file that needs no network and runs from a disk."""
