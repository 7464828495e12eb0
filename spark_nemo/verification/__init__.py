"""Stages I and II up to the labels: sample solutions and votes, label, filter.

No answer key is read here, except by the declared baselines of ``answer_key_baselines``.
"""
