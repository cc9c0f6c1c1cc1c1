"""Objects to train and test on: procedural ones, and renders of meshes."""
