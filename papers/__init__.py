"""Published measurements, one file each: what it computes, its figure, and where it was published.

A file holds its analysis, its result and the figure, and needs nothing but the workbench: they are also the examples to
follow for an analysis of one's own.
"""
