"""Published measurements, one file each: what it computes, its figure, and where it was published.

A file holds its analysis, its result and the figure, and needs nothing but the workbench: they are also the examples to
follow for an analysis of one's own.
"""

from papers import attention_entropy as attention_entropy
from papers import attention_sinks as attention_sinks
from papers import attention_truncation as attention_truncation
from papers import cka as cka
from papers import icl_regression as icl_regression
from papers import kv_saliency as kv_saliency
from papers import modular_addition as modular_addition
