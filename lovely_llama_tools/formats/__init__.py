"""Checkpoint formats: how models are read and written.

`files` (load, save, detection) is what other wings use, with `model.Model`. `layout` is the one table of tensor names;
`hub` finds models by name; `report` describes a checkpoint; every other module is one format, or a part of one.
"""
