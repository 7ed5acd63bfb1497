"""CLI: what the commands do; `evomem.cli.app` says how they are called. Imported when a command runs, not before."""
