"""How alike two layers represent the same prompts, whatever the axes: linear centred kernel alignment (CKA).

Two layers see the same n rows (tokens); X [row, d] and Y [row, d'] are what the residual stream holds there, each
column less its mean. With K = X X^T and L = Y Y^T the similarities between rows,

    CKA(X, Y) = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))
    biased    HSIC is |Y^T X|^2, the sum of squares: CKA = |Y^T X|^2 / (|X^T X| |Y^T Y|)
    unbiased  HSIC is |Y^T X|^2 - n / (n - 2) p.r + (sum p) (sum r) / ((n - 1) (n - 2)), where p and r are the squared
              lengths of the rows of X and Y: the same without the diagonals of K and L

1 says that one is the other turned and scaled. A rotation, or one factor for all axes, changes nothing; another linear
map does. The biased estimator counts how alike a row is to itself, on which all layers agree: of unrelated Gaussian
rows it expects about sqrt(d d' / ((n + d) (n + d'))), half where there are as many axes as rows. The unbiased one
expects nothing there, may fall below 0, and is what is computed unless told otherwise. As a control, the rows of one
side are permuted.

A few rows of a residual stream are many times longer than the rest, and would decide the sums alone: the first token
from some layer on, which is left out where all positions are compared, and in some layers another (after blocks 2 to 9
of smollm2-135m the first "the", so that these agree with each other and with nothing else). All blocks read the stream
through a norm, which takes the length away; so do we, unless lengths are to be kept. Rows of one prompt are not
independent, and the words of a template come again: alignment may be that of token and position. A layer whose rows
are all the same, as the embedding of one last word is, has no CKA and stays empty.

Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited" (arXiv 1905.00414), equations 3 and 4;
the unbiased HSIC: Song et al. 2012, "Feature Selection via Dependence Maximization", used for CKA by Nguyen et al. 2021
(arXiv 2010.15327), its closed form for centred columns worked out here. Rows that are longer: Sun et al. 2024 (arXiv
2402.17762).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import plotly.graph_objects as go
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from plotly.subplots import make_subplots
from torch import Tensor

from workbench import canvas, pretrained, sites
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.plots import definition, figure
from workbench.progress import track
from workbench.prompts import Batch
from workbench.registry import analysis

Estimator = Literal["unbiased", "biased"]
Position = Literal["all", "last"]
Lengths = Literal["unit", "kept"]
Layers = Sequence[Float[Tensor, "row _"]]  # one tensor a layer, of the same rows
PROMPTS_AT_ONCE = 32  # whose activations are in memory at all positions
BLOCK = 2**24  # numbers of similarities between rows in memory at once
SAME = 1e-11  # of the squared length of rows: less than rounding between batches is no difference between them


@dataclass(frozen=True)
class Alignment:
    """
    cka         of each layer of the model with each of the other; 0 is the embedding, then after each block; not a
                number where all rows of a layer are the same
    null        the same with the other's rows permuted, mean over permutations
    null_most   the largest absolute value that any permutation gave for any two layers
    rows        tokens that were compared
    names       of the model and the other; the same twice where it is compared with itself
    definition  what the number is
    """

    cka: Float[Tensor, "layer other_layer"]
    null: Float[Tensor, "layer other_layer"]
    null_most: float
    rows: int
    names: tuple[str, str]
    itself: bool
    definition: str

    def summary(self) -> dict[str, Any]:
        between = self.cka.diagonal(1)
        found = {
            "neighbours": round(float(between[between.isfinite()].mean()), 4),
            "ends": round(float(self.cka[1, -1]), 4),
        }
        best = self.cka.nan_to_num(-2).max(1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        alike = {_name(i): [_name(j), round(x, 4)] for i, (j, x) in enumerate(pairs) if x > -2}
        return {
            **(found if self.itself else {"most_alike": alike}),
            "null": round(float(self.null[self.null.isfinite()].mean()), 4),
            "null_most": round(self.null_most, 4),
            "rows": int(self.rows),
            "definition": self.definition,
        }


@analysis("cka", version=1, n=32)
def cka(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    seed: int,
    *,
    other: str = "",
    position: Position = "all",
    lengths: Lengths = "unit",
    estimator: Estimator = "unbiased",
    permutations: int = 5,
) -> Alignment:
    """How alike the residual streams after all blocks are, of a model or of two: linear CKA, and with permuted rows.

    other         a second model to compare with; empty: the model itself
    position      rows are all tokens but each prompt's first, or the last token of each prompt
    lengths       of the rows: all made 1, as the norms before each block do, or kept as they are
    estimator     without the similarity of each row to itself (unbiased), or with it (biased)
    permutations  of the rows of one side, as a control

    Raises UserError for fewer than four rows, for a second model that is not on this machine, and for all positions of
    two models that read the prompts as different tokens.
    """
    if permutations < 1:
        raise UserError(f"permutations={permutations} gives no control; ask for at least 1.")
    second, tokens = model, list(batch.clean)
    if other:
        second = load_other(other, model)
        tokens = tokens_of(second, model, batch, position)
    mine = rows(model, batch.clean, store, position, lengths)
    theirs = rows(second, tokens, store, position, lengths) if other else mine
    n = len(mine[0])
    if n < 4:
        raise UserError(f"CKA needs at least 4 rows, and {position} positions of the prompts give {n}; raise --n.")
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.arange(n), *(torch.randperm(n, generator=generator) for _ in range(permutations))]
    found, null = alignments(mine, theirs, estimator, orders).split([1, permutations])
    where = "all tokens but each prompt's first" if position == "all" else "the last token of each prompt"
    how = "all made of length 1" if lengths == "unit" else "as long as they are"
    return Alignment(
        cka=found[0].float(),
        null=null.mean(0).float(),
        null_most=float(null.nan_to_num(0).abs().max()),
        rows=n,
        names=(model.name, second.name),
        itself=not other,
        definition=f"linear CKA of residual streams, {estimator} HSIC, rows are {where}, {how}; null: mean over "
        f"{permutations} permutations of the rows of one side",
    )


# ---- rows ----


def load_other(name: str, model: LanguageModel) -> LanguageModel:
    """Raises UserError for a model without a fingerprint before it is loaded: a run is keyed by that."""
    if "," in name or pretrained.fingerprint(name) is None:  # a list of names is keyed by each
        raise UserError(
            f"other={name!r} is no model on this machine, by whose weights the run could be keyed; run an embedded one "
            f"by itself first (wb run logit-lens --model {name}), and give a model of the hub as a local folder."
        )
    return LanguageModel.load(name, device=str(model.device), dtype=str(model.dtype).removeprefix("torch."))


def tokens_of(second: LanguageModel, model: LanguageModel, batch: Batch, position: Position) -> list[Int[Tensor, "_"]]:
    """The prompts as a second model reads them: the same tokens, or at the last position what its tokenizer makes."""
    texts = [prompt.clean + prompt.answers[0] for prompt in batch.prompts]
    if all(torch.equal(model.tokenize(text), second.tokenize(text)) for text in texts):
        return list(batch.clean)
    why = f"{model.name} and {second.name} read the prompts as different tokens"
    if position == "all":
        raise UserError(f"{why}, so that rows match at the ends of prompts alone; use --position last.")
    if any(prompt.whole for prompt in batch.prompts):
        raise UserError(f"{why}, and prompts of {batch.task.name} end where a tokenizer cuts them; use another task.")
    return [second.tokenize(prompt.clean) for prompt in batch.prompts]


def rows(
    model: LanguageModel,
    sequences: Sequence[Int[Tensor, "_"]],
    store: ActivationStore,
    position: Position,
    lengths: Lengths,
) -> list[Float[Tensor, "row d_model"]]:
    """The residual stream before the first block and after each one."""
    hooks = [sites.block(0, "hook_resid_pre")]
    hooks += [sites.block(layer, "hook_resid_post") for layer in range(model.config.n_layers)]
    kept = slice(1, None) if position == "all" else slice(-1, None)
    parts: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    for start in range(0, len(sequences), PROMPTS_AT_ONCE):
        found = store.get(model, list(sequences[start : start + PROMPTS_AT_ONCE]), hooks)
        for hook in hooks:
            parts[hook] += [x[kept].clone() for x in found[hook]]  # a view would keep all positions in memory
    every = [torch.cat(parts[hook]) for hook in hooks]
    return [F.normalize(x, dim=-1) for x in every] if lengths == "unit" else every


# ---- alignment ----


def linear_cka(x: Float[Tensor, "row _"], y: Float[Tensor, "row _"], estimator: Estimator = "unbiased") -> float:
    """CKA of two representations of the same rows."""
    return float(alignments([x], [y], estimator, [torch.arange(len(x))])[0])


def alignments(
    xs: Layers, ys: Layers, estimator: Estimator, orders: Sequence[Int[Tensor, " row"]]
) -> Float[Tensor, "order layer other_layer"]:
    """CKA of all pairs in float64, once for each order of the rows of `ys`."""
    p, r = (torch.stack([centred(x).square().sum(1) for x in side]) for side in (xs, ys))
    size = sizes(xs, p, estimator)
    scale = torch.outer(size, size if ys is xs else sizes(ys, r, estimator))
    found = zip(products(xs, ys, orders), orders, strict=True)
    return torch.stack([hsic(product, p, r[:, order], estimator) / scale for product, order in found])


def sizes(xs: Layers, p: Float[Tensor, "layer row"], estimator: Estimator) -> Float[Tensor, " layer"]:
    """sqrt(HSIC(K, K)) of each layer; not a number where its rows do not differ."""
    order = torch.arange(len(xs[0]))
    product = torch.stack([products([x], [x], [order])[0, 0, 0] for x in xs])
    own = torch.stack([hsic(a.view(1, 1), q[None], q[None], estimator)[0, 0] for a, q in zip(product, p, strict=True)])
    differ = p.sum(1) > SAME * torch.stack([x.double().square().sum() for x in xs])
    return own.where(differ & (own > SAME * product), torch.nan).sqrt()


def hsic(
    product: Float[Tensor, "layer other_layer"],
    p: Float[Tensor, "layer row"],
    r: Float[Tensor, "other_layer row"],
    estimator: Estimator,
) -> Float[Tensor, "layer other_layer"]:
    """HSIC, but for a factor that CKA cancels, from |Y^T X|^2 and the squared lengths of centred rows.

    Of centred rows K 1 = 0, so that without their diagonals K and L have the row sums -p and -r.
    """
    if estimator == "biased":
        return product
    n = p.shape[1]
    return product - n / (n - 2) * p @ r.T + torch.outer(p.sum(1), r.sum(1)) / ((n - 1) * (n - 2))


def products(xs: Layers, ys: Layers, orders: Sequence[Int[Tensor, " row"]]) -> Float[Tensor, "order layer other_layer"]:
    """|Y^T X|^2 of all pairs, with centred columns: by features or by rows, whichever is less to do."""
    n, d, pairs = len(xs[0]), max(x.shape[1] for x in (*xs, *ys)), len(xs) * len(ys)
    by_features, by_rows = pairs * n * d**2, (len(xs) + len(ys)) * n**2 * d + pairs * n**2
    return products_of_features(xs, ys, orders) if by_features < by_rows else products_of_rows(xs, ys, orders)


def products_of_features(
    xs: Layers, ys: Layers, orders: Sequence[Int[Tensor, " row"]]
) -> Float[Tensor, "order layer other_layer"]:
    """Through the d x d' matrices Y^T X."""
    found = torch.empty(len(orders), len(xs), len(ys), dtype=torch.float64)
    for i, x in enumerate(track(xs, "layers", silent=len(xs) == 1)):
        left = centred(x)
        for j, y in enumerate(ys):
            right = centred(y)
            for k, order in enumerate(orders):
                found[k, i, j] = (right[order].T @ left).square().sum()
    return found


def products_of_rows(
    xs: Layers, ys: Layers, orders: Sequence[Int[Tensor, " row"]]
) -> Float[Tensor, "order layer other_layer"]:
    """Through the similarities of rows, tr(K L), some rows at a time."""
    n = len(xs[0])

    def similar(layers: Layers, order: Tensor, some: Tensor) -> Tensor:
        return torch.stack([(x := centred(one))[order[some]] @ x[order].T for one in layers]).flatten(1)

    found = torch.zeros(len(orders), len(xs), len(ys), dtype=torch.float64)
    blocks = torch.arange(n).split(max(1, BLOCK // (n * (len(xs) + len(ys)))))
    for some in track(blocks, "rows", silent=len(xs) == 1):
        left = similar(xs, torch.arange(n), some)
        for k, order in enumerate(orders):
            found[k] += left @ similar(ys, order, some).T
    return found


def centred(x: Float[Tensor, "row _"]) -> Float[Tensor, "row _"]:
    """In float64, each column less its mean."""
    x = x.double()
    return x - x.mean(0)


# ---- figure ----


@figure.register
def alignment_figure(result: Alignment) -> go.Figure:
    """CKA of all pairs of layers; beside it the same with permuted rows, on the same scale."""
    titles = ["CKA", f"rows permuted: largest {canvas.number(result.null_most, 2, signed=False)}"]
    fig = make_subplots(rows=1, cols=2, horizontal_spacing=0.08, subplot_titles=titles, shared_yaxes=True)
    for col, grid in ((1, result.cka), (2, result.null)):
        hover = [
            [f"{_name(i)}, {_name(j)}: {canvas.number(x, 3)}" for j, x in enumerate(row)]
            for i, row in enumerate(grid.tolist())
        ]
        text = [
            [canvas.number(round(x, 2) + 0.0, 2, signed=False) if x == x else "" for x in row] for row in grid.tolist()
        ]
        written = {"text": text, "texttemplate": "%{text}", "textfont": canvas.WRITTEN} if grid.numel() < 100 else {}
        trace = canvas.heatmap(grid, hover, hoverongaps=False, coloraxis="coloraxis", **written)
        fig.add_trace(trace, row=1, col=col)
    for axis, size, name in ((fig.update_xaxes, 1, result.names[1]), (fig.update_yaxes, 0, result.names[0])):
        step = canvas.step(result.cka.shape[size] - 1, 10)
        ticks = list(range(0 if step == 1 else step, result.cka.shape[size] - 1, step))
        axis(tickvals=[0, *(1 + tick for tick in ticks)], ticktext=["embed", *map(str, ticks)])
        axis(title_standoff=6, title_text="after block" + ("" if result.itself else f" of {escape(name)}"))
    fig.update_yaxes(title_text="", row=1, col=2)
    fig.update_annotations(font_size=13, yshift=4)
    bar = canvas.colorbar("CKA")
    fig.update_layout(coloraxis={"colorscale": canvas.SEQUENTIAL, "cmin": 0, "cmax": 1, "colorbar": bar})
    return canvas.finish(fig, 330, top=34)


@definition.register
def _(result: Alignment) -> str:
    return (
        f"{result.definition}; 1: one is the other turned and scaled. What two layers share may be the token and its "
        "position, and that they are alike does not say that a model uses what they share"
    )


def _name(i: int) -> str:
    return f"block {i - 1}" if i else "embedding"
