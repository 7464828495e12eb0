"""Against reward hacking: rules that refuse a response, detectors that count, probes that ask the
reward model.

``constraints`` is on the way of every reward; ``detectors``, ``probes`` and ``divergence`` watch
and change nothing.
"""

from .constraints import CONSTRAINTS, broken_constraint, read_response

__all__ = ["CONSTRAINTS", "broken_constraint", "read_response"]
