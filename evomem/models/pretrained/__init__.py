"""Model: from the files of a pretrained model to a folder that can be loaded."""
