"""What options there are and what they may be: a mistake is reported in one line before anything is computed."""

from massdpo.config.composition import as_composed, compose
from massdpo.config.messages import explain
from massdpo.config.naming import EXPECTED, NOT_IDENTITY, identity, resolved, run_name
from massdpo.config.options import root
from massdpo.config.parts import instantiate
from massdpo.config.precision import fast_precision
from massdpo.config.rules import RULES, Rule
from massdpo.config.secrets import without_secrets
from massdpo.config.validation import check_dataset, validate
