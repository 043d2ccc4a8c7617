"""EAP-IG over activations: the gradient of an edge averaged while what its source writes goes from ablated to clean.

The variant called EAP-IG-activations in MIB (Mueller et al. 2025), after the integrated gradients of Marks et al. 2024.
EAP-IG proper moves the input embeddings, so that all activations change together; here only the sources of one kind
and layer (its heads together, or its MLP) move, everything before them is the clean run, and only edges out of them
are scored:

    score(u -> v) = (clean_u - ablated_u) . mean over a of dm/d(input of v),
                    with u's layer at ablated + a (clean - ablated)

One pass per layer, kind and point, each from its layer on. (EAP-IG's own code adds the gradients of each pass to all
edges, whichever source moved; we follow the definition.)
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attribution import TOKENS_PER_PASS, Rule, alphas, gradients, products, read_hooks, summed
from circuits.graph import EdgeScores, Graph
from circuits.writes import Ablation, Writes
from workbench import sites
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel, Resume
from workbench.progress import track
from workbench.prompts import Batch
from workbench.registry import analysis


@analysis("eap-ig-activations", version=1, n=16)
def eap_ig_activations(
    model: LanguageModel,
    batch: Batch,
    store: ActivationStore,
    *,
    steps: int = 5,
    rule: Rule = "right",
    ablation: Ablation = "resample",
) -> EdgeScores:
    """Edge attribution with gradients averaged between the ablated and the clean output of each layer's sources.

    steps     interpolation points for each layer's heads and each MLP
    rule      where in each step the gradient is taken: right (clean included, ablated not), midpoint, left
    ablation  what a cut edge carries: resample (corrupted prompt), mean (over corrupted prompts), zero
    """
    if steps < 1:
        raise UserError(f"steps={steps} gives no gradient; ask for at least 1.")
    graph = Graph.of(model.config)
    total = torch.zeros(len(graph.sources), len(graph.destinations), dtype=torch.float64)
    groups = _groups(model)
    with track(total=len(batch) * len(groups), desc="eap-ig-activations") as bar:
        for part, some in batch.parts(tokens=TOKENS_PER_PASS // steps):
            writes = Writes(model, store, some, batch, ablation)
            pres = [sites.block(layer, "hook_resid_pre") for layer in range(model.config.n_layers)]
            found = store.get(model, list(some.clean), pres)
            for layer, hook, rows in groups:
                resid = torch.stack(found[pres[layer]]).to(model.device, model.dtype)
                moved = _moved(model, some, writes, resid, layer, hook, alphas(steps, rule), graph, rows)
                total[rows] += moved.cpu()
                bar.update(len(part))
    unit = batch.task.metric
    return EdgeScores(
        graph,
        (graph.flat(total) / len(batch)).float(),
        f"EAP-IG (activations): estimated {unit}(clean) - {unit}(edge ablated: {ablation}), {steps} {rule} points "
        "between ablated and clean output of the source's layer, summed over positions, mean over prompts; positive: "
        "the edge helps",
        unit,
        headline={"prompts": len(batch), "steps": steps, "ablation": ablation},
    )


def _groups(model: LanguageModel) -> list[tuple[int, str, slice]]:
    """What moves together: the layer that a pass starts at, the hook point, and the sources' rows in the graph."""
    step = model.config.n_heads + 1
    out = [(0, sites.block(0, "hook_resid_pre"), slice(0, 1))]
    for layer in range(model.config.n_layers):
        row = 1 + layer * step
        out.append((layer, sites.block(layer, "attn.hook_z"), slice(row, row + step - 1)))
        out.append((layer, sites.block(layer, "hook_mlp_out"), slice(row + step - 1, row + step)))
    return out


def _moved(
    model: LanguageModel,
    batch: Batch,
    writes: Writes,
    resid: Float[Tensor, "batch pos d_model"],
    layer: int,
    hook: str,
    points: list[float],
    graph: Graph,
    rows: slice,
) -> Float[Tensor, "source destination"]:
    """Scores of the edges out of one layer's sources, summed over prompts."""
    k = len(points)
    clean, ablated = writes.clean[hook], writes.ablated[hook]
    share = torch.tensor(points, device=clean.device, dtype=clean.dtype).view(-1, *[1] * clean.ndim)
    between = (ablated + share * (clean - ablated)).flatten(0, 1)
    start, edit = resid.repeat(k, 1, 1), {hook: lambda _: between.clone().requires_grad_()}
    into = read_hooks(model, layer)
    if sites.split(hook)[1] != "hook_resid_pre":  # a layer's own heads, and its MLP, have read already
        own_mlp = [sites.block(layer, "hook_mlp_in")] if sites.split(hook)[1] == "attn.hook_z" else []
        into = own_mlp + read_hooks(model, layer + 1)
    tokens = torch.stack(batch.clean).repeat(k, 1)
    found = gradients(model, tokens, Resume(layer, start), summed(batch, k, 1 / k), into, edit=edit)
    return products(model, graph, found, writes, k, rows)
