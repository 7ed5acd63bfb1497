"""Task: streams: requests to a memory with keys and values, one after another, and series for explicit memories."""
