"""The rendezvous backend of a stock ``torchrun``. Start with ``plugin``."""
