"""Codes and head scores: counted by hand and with Python sets, gradients against autograd, and the null against itself.

The synthetic heads write known things, so that what a score should be is known without a model.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import mutual_info_score
from torch import Generator, Tensor

from saes import code_statistics, codes, controls
from saes.code_statistics import NONE
from saes.codes import DiscreteSAE, TrialSettings
from workbench import registry, runs, scores
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.prompts import Batch, sample
from workbench.scores import NodeScores, PairScores, head_auc

CLEAN = torch.tensor([[1, 5, NONE], [2, 5, 7]])
CORRUPTED = torch.tensor([[1, 6, NONE], [3, 5, NONE]])


def rng(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def auc(values: Tensor, truth: Tensor) -> float:
    nodes = tuple(scores.head(0, h) for h in range(len(values)))
    return head_auc(NodeScores(nodes, values, "", ""), [nodes[h] for h in truth.nonzero()[:, 0]], absolute=False)


def no_swap(n: int) -> Tensor:
    return torch.zeros(1, n, dtype=torch.bool)


# ---- counting ----


def test_head_scores_of_four_prompts_by_hand() -> None:
    # Head 0 has {1, 2} against {1, 3}, head 1 {5} against {5, 6}, head 2 {7} against nothing at all.
    found = code_statistics.score_codes(CLEAN, CORRUPTED, 8, 4, rng())
    assert found["raw"].tolist() == [1, 0, 1]
    assert found["codes_used"].tolist() == [3, 2, 1]
    assert found["normalised"].tolist() == pytest.approx([1 / 3, 0, 1])


def test_pair_scores_and_fold_back_of_four_prompts_by_hand() -> None:
    # Heads 0, 1: (1,5) (2,5) against (1,6) (3,5). Head 2 speaks once, with 2 and with 5.
    pairs = code_statistics.pair_scores(CLEAN, CORRUPTED, 8)
    assert pairs.tolist() == [[0, 2, 1], [2, 0, 1], [1, 1, 0]]
    forward = PairScores.of(["a0.h0", "a0.h1", "a1.h0"], pairs.float(), "", "")
    assert dict(zip(forward.pairs, forward.scores.tolist(), strict=True)) == {"a0.h0->a1.h0": 1, "a0.h1->a1.h0": 1}
    # Ordered pairs, best first: (0,1) (1,0) (0,2) (1,2) (2,0) (2,1); nine heads squared halved are 4 endpoints.
    assert code_statistics.fold_back(pairs).tolist() == [2, 2, 0]
    assert code_statistics.fold_back(pairs, k=5).tolist() == [3, 2, 0]
    # Ties in row order; a head and itself is no pair, so there are 12 endpoints, however many are asked for.
    assert code_statistics.fold_back(torch.zeros(3, 3), k=4).tolist() == [2, 1, 1]
    assert code_statistics.fold_back(torch.zeros(3, 3), k=99).tolist() == [4, 4, 4]


def test_counts_equal_python_sets_under_every_swap() -> None:
    n, heads, n_codes = 12, 5, 6
    clean, corrupted = torch.randint(NONE, n_codes, (2, n, heads), generator=rng())
    swaps = torch.rand(20, n, generator=rng(1)) < 0.5
    only, used = code_statistics.unique_codes(clean, corrupted, n_codes, swaps)
    for s, swap in enumerate(swaps):
        left = torch.where(swap[:, None], corrupted, clean).tolist()
        right = torch.where(swap[:, None], clean, corrupted).tolist()
        for h in range(heads):
            p, q = ({row[h] for row in rows} - {NONE} for rows in (left, right))
            assert (int(only[s, h]), int(used[h])) == (len(p - q), len(p | q))
    pairs = code_statistics.pair_scores(clean, corrupted, n_codes)
    for a in range(heads):
        for b in range(heads):
            p, q = ({(r[a], r[b]) for r in rows.tolist() if NONE not in (r[a], r[b])} for rows in (clean, corrupted))
            assert pairs[a, b] == (len(p - q) if a != b else 0)


def test_softmax_and_ties_in_the_auc() -> None:
    u, truth = torch.tensor([3.0, 1.0, 1.0, 0.0, 2.0]), torch.tensor([1, 1, 0, 0, 0])
    # Six pairs of a true and a false head: 3 beats all three; 1 ties, wins, loses.
    assert auc(u, truth) == pytest.approx((3 + 0.5 + 1 + 0) / 6)
    assert auc(u.softmax(0), truth) == pytest.approx(auc(u, truth))
    assert auc(torch.ones(5), truth) == 0.5


# ---- the null ----


def shuffled_labels(seed: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Codes that no label enters: heads with many codes, with few, and heads that read the template a pair shares."""
    n, each, generator = 120, 40, rng(seed)
    template = torch.randint(60, (n, 1), generator=generator)
    clean, corrupted = (
        torch.cat(
            [
                torch.randint(80, (n, each), generator=generator),
                torch.randint(3, (n, each), generator=generator),
                torch.where(torch.rand(n, each, generator=generator) < 0.9, template, template + 60),
            ],
            dim=1,
        )
        for _ in range(2)
    )
    kind = torch.arange(3).repeat_interleave(each)
    return clean, corrupted, {"many codes": kind == 0, "few codes": kind == 1, "template": kind == 2}


@pytest.mark.parametrize("kind", ["many codes", "few codes", "template"])
def test_shuffled_labels_leave_z_at_chance(kind: str) -> None:
    total = 0.0
    for seed in range(20):
        clean, corrupted, kinds = shuffled_labels(seed)
        total += auc(code_statistics.score_codes(clean, corrupted, 120, 200, rng(100 + seed))["z"], kinds[kind])
    assert 0.45 < total / 20 < 0.55


def test_shuffled_labels_do_not_leave_raw_counts_at_chance() -> None:
    """The flaw that the null is for: a head with many codes always has more that happen to be on one side."""
    clean, corrupted, kinds = shuffled_labels(0)
    assert auc(code_statistics.score_codes(clean, corrupted, 120, 10, rng())["raw"], kinds["many codes"]) > 0.9


def test_a_null_that_ignores_pairs_would_be_wrong() -> None:
    """Why labels are swapped within pairs: free shuffling puts a template's two prompts on one side."""
    clean, corrupted, kinds = shuffled_labels(0)
    raw = code_statistics.score_codes(clean, corrupted, 120, 10, rng())["raw"]
    both, generator, null = torch.cat([clean, corrupted]), rng(1), []
    for _ in range(100):
        left, right = both[torch.randperm(len(both), generator=generator)].chunk(2)
        null.append(code_statistics.unique_codes(left, right, 120, no_swap(len(left)))[0][0])
    mean, std = torch.stack(null).mean(0), torch.stack(null).std(0)
    assert auc((raw - mean) / std.clamp(min=1e-9), kinds["template"]) < 0.2


def test_z_is_zero_where_the_null_does_not_vary() -> None:
    same = torch.tensor([[0], [1], [2]])  # both prompts of a pair always agree
    assert code_statistics.score_codes(same, same, 3, 50, rng())["z"].tolist() == [0]


# ---- the SAE ----


def random_sae(latents: int = 6, d: int = 5) -> DiscreteSAE:
    shapes = ((latents, d), (latents,), (d, latents), (d,))
    return DiscreteSAE(*(torch.randn(shape, generator=rng(i), dtype=torch.double) for i, shape in enumerate(shapes)))


@pytest.mark.parametrize("shift", [0.0, -3.0, -100.0])  # all latents in use; many rows silent; all silent
def test_gradients_equal_autograd(shift: float) -> None:
    sae = random_sae()._replace(encoder_bias=random_sae().encoder_bias + shift)
    rows = torch.randn(40, 5, generator=rng(9), dtype=torch.double)
    leaves = [parameter.clone().requires_grad_() for parameter in sae]
    e, e_bias, decoder, bias = leaves
    a = torch.relu((rows - bias) @ e.T + e_bias)
    loss = ((a @ decoder.T + bias - rows) ** 2).mean() + 0.02 * a.abs().sum() / len(rows)
    torch.testing.assert_close(codes.loss(sae, rows, 0.02), loss.detach())
    wanted = torch.autograd.grad(loss, leaves)
    for found, want in zip(codes.gradients(sae, rows, 0.02), wanted, strict=True):
        torch.testing.assert_close(found, want)


def test_two_steps_of_training_equal_autograd_with_projection() -> None:
    """The whole step, written a second time: renormalise, remove what is parallel to each unit vector, Adam."""
    rows = 3 * torch.randn(30, 5, generator=rng(3))
    settings = TrialSettings("paper", latents=6, steps=2, lr=0.01)
    start = codes.fit(rows, settings._replace(steps=0), rng())
    leaves = [parameter.clone().requires_grad_() for parameter in start]
    e, e_bias, decoder, bias = leaves
    adam = torch.optim.Adam(leaves, lr=0.01)
    for _ in range(2):
        adam.zero_grad()
        a = torch.relu((rows - bias) @ e.T + e_bias)
        (F.mse_loss(a @ decoder.T + bias, rows) + 0.02 * a.sum(1).mean()).backward()
        with torch.no_grad():
            for weight in (e, decoder):
                assert weight.grad is not None
                for unit, gradient in zip(weight, weight.grad, strict=True):
                    gradient -= gradient.dot(unit) * unit
            adam.step()
            for weight in (e, decoder):
                for unit in weight:
                    unit /= unit.norm()
    for found, want in zip(codes.fit(rows, settings, rng()), leaves, strict=True):
        torch.testing.assert_close(found, want.detach())


@pytest.mark.parametrize(("mode", "dim"), [("paper", 1), ("fixed", 0)])
def test_what_has_unit_norm(mode: codes.Mode, dim: int) -> None:
    rows = torch.randn(50, 16, generator=rng())
    sae = codes.fit(rows, TrialSettings(mode, latents=8, steps=20), rng())
    ones = torch.ones(8)
    torch.testing.assert_close(sae.encoder.norm(dim=1), ones)
    torch.testing.assert_close(sae.decoder.norm(dim=dim), torch.ones(16) if dim else ones)
    assert (sae.decoder.norm(dim=1 - dim) - 1).abs().max() > 0.1


def test_how_training_starts() -> None:
    sae = codes.fit(torch.randn(50, 16, generator=rng()), TrialSettings(latents=400, steps=0), rng())
    assert sae.bias.tolist() == [0] * 16
    assert 0.23 < sae.encoder_bias.max() < 0.25 and -0.25 < sae.encoder_bias.min() < -0.23


def test_training_reduces_the_loss() -> None:
    rows = 4 * torch.randn(100, 16, generator=rng()) * torch.linspace(0, 1, 16)
    before, after = (codes.fit(rows, TrialSettings(latents=24, steps=steps), rng()) for steps in (0, 300))
    assert codes.loss(after, rows, 0.02) < 0.7 * codes.loss(before, rows, 0.02)


def test_silence_is_none_and_never_code_0() -> None:
    sae = DiscreteSAE(torch.eye(3), torch.full((3,), -1.0), torch.eye(3), torch.zeros(3))
    x = torch.tensor([[[2.0, 0, 0], [0, 0, 3]], [[0.5, 0.9, 1], [-9, 0, 0]]])
    assert codes.codes(sae, x).tolist() == [[0, 2], [NONE, NONE]]


# ---- trials ----


def planted(n: int = 60, heads: int = 24, d: int = 16) -> tuple[Tensor, Tensor]:
    """Each head writes one word of its own four; a third of them save two of these for clean prompts."""
    generator = rng(5)
    task = torch.arange(heads) < heads // 3
    words = torch.randn(heads, 4, d, generator=generator)
    clean = (torch.arange(2 * n) < n)[:, None]
    spoken = torch.randint(4, (2 * n, heads), generator=generator)
    spoken = torch.where(task & ~clean, spoken % 2, spoken)
    return words[torch.arange(heads), spoken] + 0.1 * torch.randn(2 * n, heads, d, generator=generator), task


def test_planted_heads_are_found() -> None:
    x, task = planted()
    settings = TrialSettings(latents=64, examples=16, steps=200)
    assert auc(codes.trial(codes.rescale(x), settings, rng())["z"], task) > 0.95


def test_fixed_mode_knows_no_unit_of_activations() -> None:
    x, _ = planted()
    torch.testing.assert_close(codes.rescale(1000 * x), codes.rescale(x))
    assert float(codes.rescale(x).square().mean()) == pytest.approx(1)
    assert codes.rescale(torch.zeros(4, 2, 3)).isfinite().all()


def test_training_rows_are_scored_only_in_paper_mode() -> None:
    train, scored = codes.split(20, 7, "fixed", rng())
    assert len(train) == 8 and len(scored) == 16
    assert not {int(row) % 20 for row in train} & set(scored.tolist())
    train, scored = codes.split(20, 7, "paper", rng())
    assert len(train) == 7 and scored.tolist() == list(range(20))


# ---- on a model ----

SMALL: dict[str, Any] = {"latents": 12, "examples": 4, "steps": 5, "trials": 2, "permutations": 10}


@pytest.fixture
def batch(tiny: LanguageModel) -> Batch:
    return sample(registry.get_task("ioi"), tiny, 8, seed=0)


@pytest.mark.parametrize("position", ["mean", "last"])
def test_head_outputs_are_the_heads_results(
    position: str, tiny: LanguageModel, batch: Batch, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codes, "CHUNK", 3)
    x = codes.head_outputs(tiny, store, batch.clean, position)
    for i, tokens in enumerate(batch.clean):
        for layer in range(3):
            hook = f"blocks.{layer}.attn.hook_result"
            result = tiny.run(tokens[None], capture=[hook])[hook][0]
            want = result.mean(0) if position == "mean" else result[-1]
            torch.testing.assert_close(x[i, 4 * layer : 4 * layer + 4], want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["paper", "fixed"])
def test_the_seed_decides_everything(
    mode: codes.Mode, tiny: LanguageModel, batch: Batch, store: ActivationStore
) -> None:
    first, again, other = (
        codes.sae_codes(tiny, batch, store, mode=mode, pairs=True, sae_seed=seed, **SMALL) for seed in (0, 0, 1)
    )
    for field in fields(first):
        if field.name not in ("scores", "edges"):
            assert torch.equal(getattr(first, field.name), getattr(again, field.name)), field.name
    assert not torch.equal(first.loss, other.loss)
    assert torch.equal(first.scores.scores, first.raw if mode == "paper" else first.z)
    assert first.scores.nodes[5] == "a1.h1"
    assert first.edges is not None and first.pairs is not None
    at = first.edges.pairs.index("a0.h3->a2.h1")
    assert len(first.edges.pairs) == 3 * 16  # three layers of four heads
    assert mode == "fixed" or first.edges.scores[at] == first.pairs[3, 9]
    assert {"none_rate", "trials", "mean_std_over_trials", "top_heads", "top_pairs"} <= first.summary().keys()


def test_paper_mode_scores_silent_heads_as_code_0() -> None:
    x = torch.zeros(20, 3, 8)
    x[:10, 0, 0] = 50.0  # head 0 speaks on clean prompts, the others never do
    out = codes.trial(x, TrialSettings("paper", latents=10, examples=20, steps=200, lam=0.5, lr=0.02), rng())
    assert out["none"].tolist() == [0.5, 1, 1]
    assert out["codes_used"].tolist()[1:] == [1, 1]


def test_too_few_pairs_are_refused(tiny: LanguageModel, batch: Batch, store: ActivationStore) -> None:
    with pytest.raises(UserError, match="raise --n"):
        codes.sae_codes(tiny, batch, store, examples=16)


def test_a_saved_run_reads_back(tiny_folder: str) -> None:
    run = runs.run("sae-codes", model=tiny_folder, task="ioi", n=8, pairs=True, **SMALL)
    assert run.result.summary()["trials"] == 2


def test_pairs_of_heads_that_carry_the_label_together_stand_out_from_swaps() -> None:
    """Neither head tells clean from corrupted alone: their codes agree on clean prompts and differ on corrupted."""
    bits = torch.randint(2, (60, 6), generator=rng())
    clean, corrupted = bits.clone(), bits.clone()
    clean[:, 1] = clean[:, 0]
    corrupted[:, 1] = 1 - corrupted[:, 0]
    z = code_statistics.pairs_z(clean, corrupted, 2, rng(1))
    off = ~torch.eye(6, dtype=torch.bool)
    assert z[0, 1] > 4 and z[0, 1] == z[1, 0] == z[off].max()
    torch.testing.assert_close(z, z.T)


def test_a_pair_counts_by_what_it_says_on_clean_prompts_alone() -> None:
    """Clean prompts say one of the four things that corrupted ones say: nothing is theirs alone, but not so turned."""
    many = torch.randint(4, (80, 1), generator=rng()).expand(80, 2)
    one = torch.zeros(80, 2, dtype=torch.long)
    assert code_statistics.pairs_z(one, many, 4, rng(1))[0, 1] <= 0
    assert code_statistics.pairs_z(many, one, 4, rng(1))[0, 1] > 4


def test_a_head_that_says_one_thing_on_clean_and_another_on_corrupted_prompts_scores_highest() -> None:
    """No swap gives it a unique code: without the real labels among the swaps its null would have no spread."""
    clean, corrupted = torch.zeros(40, 2, dtype=torch.long), torch.ones(40, 2, dtype=torch.long)
    clean[:, 1], corrupted[:, 1] = torch.randint(5, (2, 40), generator=rng())
    z = code_statistics.score_codes(clean, corrupted, 8, 100, rng(1))["z"]
    assert z[0] == pytest.approx(10) and z[1] < 3


# ---- information ----


def test_information_of_codes_by_hand_and_against_scikit_learn() -> None:
    clean = torch.tensor([[0, 1, NONE, 3], [0, 2, NONE, 1], [0, 1, NONE, 3], [0, 2, 5, 2]])
    corrupted = torch.tensor([[1, 1, NONE, 3], [1, 2, NONE, 3], [2, 1, NONE, 1], [3, 2, NONE, 0]])
    found = code_statistics.information(clean, corrupted, 6, no_swap(4))[0]
    assert found[0] == pytest.approx(1) and found[1] == pytest.approx(0)  # nothing in common; the same
    label = [1] * 4 + [0] * 4
    for h in range(4):
        both = torch.cat([clean[:, h], corrupted[:, h]]).tolist()
        assert float(found[h]) == pytest.approx(mutual_info_score(label, both) / math.log(2), abs=1e-6)


def test_a_head_that_always_says_one_other_thing_is_found_by_information_and_not_by_counting() -> None:
    clean, corrupted = torch.zeros(40, 1, dtype=torch.long), torch.arange(40)[:, None] % 20 + 1
    counted = code_statistics.score_codes(clean, corrupted, 30, 200, rng())
    informed = code_statistics.score_codes(clean, corrupted, 30, 200, rng(), "information")
    assert float(counted["z"]) < -2 and float(informed["z"]) > 2


# ---- controls ----


def test_kmeans_finds_clusters_that_are_there() -> None:
    centres = 10 * torch.eye(4, 6)
    rows = centres.repeat_interleave(20, 0) + 0.1 * torch.randn(80, 6, generator=rng())
    found = controls.kmeans(rows, 8, rng(3))  # more than there are: none is left without one
    at = controls.nearest(rows, found).view(4, 20)
    assert len({int(row[0]) for row in at}) == 4
    assert all(set(a.tolist()).isdisjoint(b.tolist()) for i, a in enumerate(at) for b in at[:i])
    assert torch.equal(controls.nearest(rows[0], found), controls.nearest(rows[:1], found)[0])


def test_probe_codes_are_bins_along_the_difference_of_means() -> None:
    """A head that separates the classes uses disjoint bins; one that does not uses the same ones."""
    n = 200
    x = torch.randn(2 * n, 2, 5, generator=rng())
    x[:n, 0, 2] += 20
    train = torch.cat([torch.arange(50), torch.arange(n, n + 50)])
    found = controls.probe_codes(x, train, 10)
    clean, corrupted = found[:n], found[n:]
    assert set(clean[:, 0].tolist()).isdisjoint(corrupted[:, 0].tolist())
    assert set(clean[:, 1].tolist()) == set(corrupted[:, 1].tolist()) == set(range(10))
    share = found[train, 0].bincount(minlength=10).double() / 100
    assert float(share.max()) <= 0.11  # equally many training rows in each bin


@pytest.mark.parametrize("encoder", ["sae", "kmeans", "probe"])
def test_every_encoder_finds_heads_that_differ_and_not_under_shuffled_labels(encoder: str) -> None:
    generator = rng()
    x = torch.randn(120, 40, 16, generator=generator)
    x[:60, :8] += 3 * torch.randn(8, 16, generator=generator)  # eight heads say another thing on clean prompts
    truth = torch.arange(40) < 8
    settings = TrialSettings(steps=100, latents=40, permutations=100, encoder=encoder, statistic="information")  # type: ignore[arg-type]
    found = codes.trial(codes.rescale(x), settings, rng(1))
    assert auc(found["z"], truth) > 0.9
    nulls = []
    for seed in range(20):
        swap = torch.rand(60, generator=rng(seed)) < 0.5
        mixed = x.clone()
        mixed[:60][swap], mixed[60:][swap] = x[60:][swap], x[:60][swap]
        nulls.append(auc(codes.trial(codes.rescale(mixed), settings, rng(seed))["z"], truth))
    assert 0.42 < sum(nulls) / 20 < 0.58


def test_what_paper_mode_does_not_score_by_is_refused_and_what_a_probe_has_not_is_none(
    tiny: LanguageModel, store: ActivationStore
) -> None:
    batch = sample(registry.get_task("ioi"), tiny, 12, seed=0)
    with pytest.raises(UserError, match="mode='paper' scores by its count"):
        codes.sae_codes(tiny, batch, store, mode="paper", statistic="information")
    found = codes.sae_codes(tiny, batch, store, encoder="probe", trials=1, permutations=10)
    assert found.summary()["mean_loss"] is None and "20 bins" in found.scores.definition
