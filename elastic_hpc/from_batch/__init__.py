"""An elastic job of a batch script. Start with ``convert``."""
