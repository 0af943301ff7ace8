"""What the options are and may be: a mistake is reported in one line before anything is computed."""

from massdpo.config.composition import as_composed, compose
from massdpo.config.messages import explain
from massdpo.config.naming import EXPECTED, NOT_IDENTITY, identity, resolved, run_name
from massdpo.config.options import root
from massdpo.config.parts import instantiate
from massdpo.config.rules import RULES, Rule
from massdpo.config.secrets import without_secrets
from massdpo.config.validation import check_dataset, validate

__all__ = [
    "EXPECTED",
    "NOT_IDENTITY",
    "RULES",
    "Rule",
    "as_composed",
    "check_dataset",
    "compose",
    "explain",
    "identity",
    "instantiate",
    "resolved",
    "root",
    "run_name",
    "validate",
    "without_secrets",
]
