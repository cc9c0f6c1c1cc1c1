"""Files that hold an asset, in the layouts of other tools."""
