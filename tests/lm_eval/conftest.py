"""These tests run in the harness's own environment, by `make test-lm-eval`; elsewhere they are not collected."""

from importlib.metadata import PackageNotFoundError, version

try:
    version("lm_eval")
except PackageNotFoundError:
    collect_ignore_glob = ["*"]
