"""How `trace` finds what a network computes.

The flat program (`program`), the pass over it (`analysis`) and its parts (`products`, `batch_norm_pattern`, `regions`,
`blocks`), and the records it makes (`structure`).
"""
