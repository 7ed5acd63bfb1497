"""What tests need: tiny random models of every family, the cache's conformance kit, and reference replays."""
