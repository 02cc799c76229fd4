"""How a backbone is adapted to a target: one file a technique or family, hooks of the one loop.

Files here import ``core``, ``config``, ``nn`` and libraries, never each other.
"""
