"""What the tests share: where the real data lies, small worlds, tiny models."""

from pathlib import Path

import pytest
from hypothesis import settings

# The same inputs each time, so that who sees a failure can see it again; others: pytest --hypothesis-profile=default
settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"  # real public data beside the checkout; outside users do not have it

needs_shared_data = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="real data is not beside this checkout")

SHARED_CASES = ROOT.parent / "shared" / "cases"  # small files in the layouts that people bring
needs_shared_cases = pytest.mark.skipif(not SHARED_CASES.is_dir(), reason="the cases are not beside this checkout")
