"""What the tests share: where the real data lies, small worlds, tiny models."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"  # real public data beside the checkout; outside users do not have it

needs_shared_data = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="real data is not beside this checkout")
