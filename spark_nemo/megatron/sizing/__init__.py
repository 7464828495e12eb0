"""How much memory one rank of a training run needs, as pure functions of the model's shape and the
layout.
"""
