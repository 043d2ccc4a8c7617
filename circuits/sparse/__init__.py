"""Weight-sparse transformers (Gao et al. 2025): data, model, training, pruning to circuits, bridges to dense models."""

from circuits.sparse import bridge_run as bridge_run
from circuits.sparse import circuit_figures as circuit_figures
from circuits.sparse import figures as figures
from circuits.sparse import files as files
from circuits.sparse import pruning_run as pruning_run
from circuits.sparse import shipped as shipped
from circuits.sparse import sizes as sizes
from circuits.sparse import training_run as training_run
