"""Selective tuning: eight slots (`slots`), and what they act through (`compact`, `entries`).

See `luthier.tune.selector.slots` for the slots and `luthier.tune.lift` for a method that fills them.
"""
