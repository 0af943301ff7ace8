"""massdpo: preference optimisation with several rejected responses, selected by their Fisher information."""

__version__ = "0.1.0"
