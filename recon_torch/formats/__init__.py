"""Files that hold an asset, in the layouts that other tools read."""
