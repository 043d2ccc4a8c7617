"""Simple Python: the programs weight-sparse models are trained on, and the twenty binary tasks asked of them.

`grammar` writes programs; `pairs` registers the tasks, which ask for the idioms of these programs; `words` are the
names that both use. Gao et al. 2025, "Weight-sparse transformers have interpretable circuits", table 1 and appendix A.
"""

from __future__ import annotations

from workbench.tasks.python_code.grammar import program
from workbench.tasks.python_code.pairs import TASKS, pair_loss, pair_sides

__all__ = ["TASKS", "pair_loss", "pair_sides", "program"]
