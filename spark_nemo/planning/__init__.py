"""``spark-nemo plan``: does a run fit a cluster, in which layouts, and about how long is a step.
From numbers alone.
"""
