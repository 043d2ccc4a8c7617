"""Weight-sparse transformers (Gao et al. 2025): data, model, training, pruning to circuits."""

from circuits.sparse import figures as figures
from circuits.sparse import files as files
from circuits.sparse import training_run as training_run
