"""Model: small language models that are really trained, to transfer managers to; made by the scripts of this folder."""
