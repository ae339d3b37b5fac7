"""placer: expert placement and scheduling for Mixture-of-Experts inference."""

__version__ = "0.1.0"
