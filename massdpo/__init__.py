"""massdpo: preference optimisation with several rejected responses, selected by their Fisher information.

massdpo.select                negatives selected from log-probs and features of your own
massdpo.PreferenceScorer      log-probs and features of many responses to a prompt, which is encoded once
massdpo.MultiNegativeTrainer  a transformers.Trainer on rows of prompt, chosen and rejected (a list)
massdpo.losses                rewards in, loss per prompt out
massdpo.metrics               ranking and reward metrics per prompt
massdpo.UserError             raised for a mistake of the caller's, with a message of one line
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "MultiNegativeTrainer",
    "PreferenceScorer",
    "Selection",
    "UserError",
    "__version__",
    "losses",
    "metrics",
    "select",
]

if TYPE_CHECKING:
    from massdpo.errors import UserError
    from massdpo.evaluation import metrics
    from massdpo.model.scoring import PreferenceScorer
    from massdpo.selection.choose import Selection, select
    from massdpo.training import losses
    from massdpo.training.hf_trainer import MultiNegativeTrainer

_PLACES = {
    "MultiNegativeTrainer": "massdpo.training.hf_trainer",
    "PreferenceScorer": "massdpo.model.scoring",
    "Selection": "massdpo.selection.choose",
    "UserError": "massdpo.errors",
    "losses": "massdpo.training",
    "metrics": "massdpo.evaluation",
    "select": "massdpo.selection.choose",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is used: torch and transformers take seconds that `massdpo --help` need not wait for."""
    from importlib import import_module

    if name not in _PLACES:
        raise AttributeError(f"module 'massdpo' has no attribute {name!r}")
    place = _PLACES[name]
    return import_module(f"{place}.{name}") if name in ("losses", "metrics") else getattr(import_module(place), name)


def __dir__() -> list[str]:
    return __all__
