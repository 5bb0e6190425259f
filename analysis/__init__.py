"""Ask a model and look inside its thoughts: load() in Python, python -m analysis in a shell."""

from analysis.probe import Answer, Probe, load

__all__ = ["Answer", "Probe", "load"]
