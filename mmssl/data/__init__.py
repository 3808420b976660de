"""From a manifest to a batch; readers and augmentations are handed in."""
