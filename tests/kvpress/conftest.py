"""These tests run in kvpress's own environment, by `make test-kvpress`; elsewhere they are not collected."""

from importlib.metadata import PackageNotFoundError, version

try:
    version("kvpress")
except PackageNotFoundError:
    collect_ignore_glob = ["*"]
