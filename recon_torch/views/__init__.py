"""Views of an object: cameras, directories of pictures, masks, video, and the world that they are in."""
