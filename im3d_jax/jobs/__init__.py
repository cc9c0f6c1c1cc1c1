"""Many assets: prompt files, shards, signals and the gallery."""
