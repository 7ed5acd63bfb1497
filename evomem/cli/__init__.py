"""Around the nouns: the command line ``evomem``."""
