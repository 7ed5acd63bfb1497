"""Testing: what tests need: tiny random models of every family, the cache's conformance kit, and reference replays."""

from evomem.testing.comparing import ConformanceError
from evomem.testing.conformance import CHECKS, CheckResult, check_manager, run_check

__all__ = ["CHECKS", "CheckResult", "ConformanceError", "check_manager", "run_check"]
