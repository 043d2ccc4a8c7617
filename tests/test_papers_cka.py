"""CKA against hand-worked numbers, kernels written out, what is known of unrelated rows, and models that are equal."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from papers import cka as paper
from papers.cka import Estimator, alignments, linear_cka, products_of_features, products_of_rows
from workbench import plots, registry, runs, sites
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.prompts import sample

ESTIMATORS: tuple[Estimator, ...] = ("unbiased", "biased")
CROSS = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the number ----


def test_stretching_an_axis_by_hand() -> None:
    """X^T X is twice the identity and Y^T X is diag(4, 2), so that CKA is (16 + 4) / (sqrt 8 sqrt 68)."""
    stretched = CROSS @ torch.diag(torch.tensor([2.0, 1.0]))
    assert linear_cka(CROSS, stretched, "biased") == pytest.approx(5 / math.sqrt(34), abs=1e-12)
    assert linear_cka(CROSS + 7, stretched - 3, "biased") == pytest.approx(5 / math.sqrt(34), abs=1e-12)


def test_the_unbiased_number_by_hand() -> None:
    """Of 0, 0, 5, 5, 5 and 0, 0, 0, 5, 5, whose centred squares are 9, 9, 4, 4, 4 and 4, 4, 4, 9, 9.

    |Y^T X|^2 = 20^2, p.r = 160, both sums are 30: 400 - 5/3 160 + 900 / 12 = 625 / 3. Of each with itself it is
    900 - 5/3 210 + 900 / 12 = 625.
    """
    x, y = (torch.tensor([row]).T for row in ([0.0, 0, 5, 5, 5], [0.0, 0, 0, 5, 5]))
    assert linear_cka(x, y) == pytest.approx(1 / 3, abs=1e-12)
    assert linear_cka(x, y, "biased") == pytest.approx(400 / 900, abs=1e-12)


def by_tuples(x: Tensor, y: Tensor) -> float:
    """The unbiased HSIC as its definition has it: over all choices of four different rows, nothing centred."""
    k, l = x @ x.T, y @ y.T  # noqa: E741
    terms = [k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in itertools.permutations(range(len(x)), 4)]
    return float(torch.stack(terms).mean())


def test_unbiased_is_the_mean_over_four_different_rows() -> None:
    x, y = normal(7, 3) + 2, normal(7, 5, seed=1) - 1
    y[:, 0] += x[:, 0]
    expected = by_tuples(x, y) / math.sqrt(by_tuples(x, x) * by_tuples(y, y))
    assert linear_cka(x, y) == pytest.approx(expected, abs=1e-10)


def test_biased_is_the_kernel_formula() -> None:
    """tr(K H L H) with the centring matrix H, from products of rows."""
    x, y = normal(9, 4) + 1, normal(9, 12, seed=1)
    h = torch.eye(9, dtype=torch.float64) - 1 / 9

    def hsic(a: Tensor, b: Tensor) -> float:
        return float(torch.trace(a @ a.T @ h @ b @ b.T @ h))

    expected = hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))
    assert linear_cka(x, y, "biased") == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rotations_and_scales_change_nothing_and_other_maps_do(estimator: Estimator) -> None:
    x, y = normal(20, 6), normal(20, 6, seed=1) + 0.5 * normal(20, 6)
    turn, _ = torch.linalg.qr(normal(6, 6, seed=2))
    found = linear_cka(x, y, estimator)
    assert linear_cka(-3.7 * x @ turn, 100 * y @ turn.T + 5, estimator) == pytest.approx(found, abs=1e-10)
    assert abs(linear_cka(x @ normal(6, 6, seed=3), y, estimator) - found) > 0.02


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_with_itself_and_the_same_both_ways(estimator: Estimator) -> None:
    layers = [normal(12, d, seed=d) for d in (3, 5, 20)]
    found = alignments(layers, layers, estimator, [torch.arange(12)])[0]
    torch.testing.assert_close(found.diagonal(), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(found, found.T)
    copies = [layer.clone() for layer in layers]
    torch.testing.assert_close(alignments(layers, copies, estimator, [torch.arange(12)])[0], found)


def test_by_features_and_by_rows_are_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of rows that do not divide them, and with rows of one side permuted."""
    xs, ys = [normal(11, 4), normal(11, 9, seed=1)], [normal(11, d, seed=d) for d in (5, 6, 7)]
    orders = [torch.arange(11), torch.arange(11).roll(3)]
    by_features = products_of_features(xs, ys, orders)
    monkeypatch.setattr(paper, "BLOCK", 11 * 5 * 3)  # three rows at a time
    torch.testing.assert_close(products_of_rows(xs, ys, orders), by_features)
    direct = (paper.centred(ys[2].roll(3, 0)).T @ paper.centred(xs[1])).square().sum()
    assert float(by_features[1, 1, 2]) == pytest.approx(float(direct), abs=1e-9)


def test_unrelated_rows_are_alike_to_the_biased_estimator_alone() -> None:
    """E |Y^T X|^2 = (n - 1) d d', E |X^T X|^2 = (n - 1) d (n + d) of a Wishart matrix."""
    n, d, e, draws = 20, 30, 10, 300
    found = {name: torch.empty(draws) for name in ESTIMATORS}
    for seed in range(draws):
        x, y = normal(n, d, seed=2 * seed), normal(n, e, seed=2 * seed + 1)
        for name in ESTIMATORS:
            found[name][seed] = linear_cka(x, y, name)
    assert float(found["biased"].mean()) == pytest.approx(math.sqrt(d * e / ((n + d) * (n + e))), abs=0.01)
    error = float(found["unbiased"].std()) / math.sqrt(draws)
    assert error < 0.01 and abs(float(found["unbiased"].mean())) < 3 * error


def test_the_mean_over_all_permutations_is_known() -> None:
    """0 of the unbiased estimator, exactly; tr K tr L / (n - 1) of the biased one, before it is scaled."""
    x, y = normal(5, 3), normal(5, 4, seed=1) + normal(5, 4)
    orders = [torch.tensor(order) for order in itertools.permutations(range(5))]
    assert abs(float(alignments([x], [y], "unbiased", orders).mean())) < 1e-12
    x, y = paper.centred(x), paper.centred(y)
    size = float((x.T @ x).norm() * (y.T @ y).norm())
    expected = float(x.square().sum() * y.square().sum()) / 4 / size
    assert float(alignments([x], [y], "biased", orders).mean()) == pytest.approx(expected, abs=1e-12)


def test_rows_that_do_not_differ_have_no_alignment() -> None:
    same = normal(1, 4).expand(9, 4) + 1e-9 * normal(9, 4, seed=1)
    assert math.isnan(linear_cka(same, normal(9, 4, seed=2)))
    for seed in range(9):  # and where one differs, none is like another: nothing but rounding
        one = torch.zeros(9, 3, dtype=torch.float64)
        one[seed] = normal(3, seed=seed)
        assert math.isnan(linear_cka(one, normal(9, 4))) and math.isfinite(linear_cka(one, normal(9, 4), "biased"))


# ---- rows of models ----


def test_rows_are_the_tokens_in_order(
    tiny: LanguageModel, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against whole passes, in parts of two prompts: all but each first, or the last; kept, or of length 1."""
    monkeypatch.setattr(paper, "PROMPTS_AT_ONCE", 2)
    batch = sample(registry.get_task("ioi"), tiny, 5, 0)
    hook = sites.block(1, "hook_resid_post")
    whole = [tiny.run(tokens[None], capture=[hook])[hook][0] for tokens in batch.clean]
    found = paper.rows(tiny, batch.clean, store, "all", "kept")
    assert len(found) == 4
    torch.testing.assert_close(found[2], torch.cat([x[1:] for x in whole]), atol=1e-5, rtol=1e-4)
    last = torch.stack([x[-1] for x in whole])
    torch.testing.assert_close(paper.rows(tiny, batch.clean, store, "last", "kept")[2], last, atol=1e-5, rtol=1e-4)
    unit = paper.rows(tiny, batch.clean, store, "last", "unit")[2]
    torch.testing.assert_close(unit, last / last.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_a_model_with_itself(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = sample(registry.get_task("ioi"), tiny, 6, 0)
    found = paper.cka(tiny, batch, store, 0)
    assert found.rows == sum(len(tokens) - 1 for tokens in batch.clean) and found.itself
    torch.testing.assert_close(found.cka, found.cka.T)
    torch.testing.assert_close(found.cka.diagonal(), torch.ones(4))
    assert 0 < found.null_most < 0.2 and abs(float(found.null.mean())) < 0.05
    biased = paper.cka(tiny, batch, store, 0, estimator="biased")
    assert float(biased.null.min()) > 0.05


def test_the_embedding_of_one_last_word_stays_empty(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = sample(registry.get_task("ioi"), tiny, 6, 0)
    assert len({int(tokens[-1]) for tokens in batch.clean}) == 1
    found = paper.cka(tiny, batch, store, 0, position="last")
    assert found.cka[0].isnan().all() and found.cka[:, 0].isnan().all() and found.cka[1:, 1:].isfinite().all()
    fig = plots.figure(found)
    assert fig.data[0].z[0] == [None] * 4 and fig.data[0].text[0] == [""] * 4 and fig.data[0].text[1][1] == "1.00"
    assert list(fig.layout.xaxis.ticktext) == ["embed", "0", "1", "2"] and list(fig.layout.xaxis.tickvals) == [
        0,
        1,
        2,
        3,
    ]
    assert math.isfinite(found.summary()["neighbours"]) and math.isfinite(found.summary()["null"])


def test_an_equal_model_is_the_model_itself(tiny: LanguageModel, tiny_folder: str, store: ActivationStore) -> None:
    batch = sample(registry.get_task("ioi"), tiny, 6, 0)
    found, itself = (paper.cka(tiny, batch, store, 3, other=other) for other in (tiny_folder, ""))
    torch.testing.assert_close(found.cka, itself.cka, atol=1e-4, rtol=0)
    assert not found.itself and found.names == (tiny.name, tiny_folder)
    best = found.summary()["most_alike"]
    assert all(name == best[name][0] for name in best) and set(best) == {"embedding", "block 0", "block 1", "block 2"}


def test_another_model_under_the_same_name_is_another_run(tiny: LanguageModel, tiny_folder: str) -> None:
    given = {"model": tiny, "task": "ioi", "n": 4, "other": tiny_folder, "permutations": 1}
    first = runs.run("cka", **given)
    assert runs.run("cka", **given).hit
    path = Path(tiny_folder) / "config.json"
    path.write_text(path.read_text() + " ")
    other = runs.run("cka", **given)
    assert other.id != first.id and not other.hit
    assert first.record["key"]["models"].keys() == other.record["key"]["models"].keys() == {tiny_folder}


def folder_of(model: LanguageModel, path: Path) -> str:
    model._module.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    return str(path)


def test_prompts_are_matched_where_tokenizers_differ(
    tiny: LanguageModel, coder: LanguageModel, store: ActivationStore, tmp_path: Path
) -> None:
    """By prompt, at its end: each model's own tokens, and one row a prompt."""
    folder = folder_of(coder, tmp_path / "coder")
    batch = sample(registry.get_task("ioi"), tiny, 8, 0)
    with pytest.raises(UserError, match=r"different tokens, so that rows match at the ends .* --position last"):
        paper.cka(tiny, batch, store, 0, other=folder)
    found = paper.cka(tiny, batch, store, 0, other=folder, position="last", lengths="kept")
    hook = sites.block(1, "hook_resid_post")
    sides = [
        torch.cat(
            [model.run(model.tokenize(prompt.clean)[None], capture=[hook])[hook][:, -1] for prompt in batch.prompts]
        )
        for model in (tiny, coder)
    ]
    assert found.rows == 8 and float(found.cka[2, 2]) == pytest.approx(linear_cka(*sides), abs=1e-3)


def test_prompts_that_a_tokenizer_cuts_are_refused(
    coder: LanguageModel, tiny_folder: str, store: ActivationStore
) -> None:
    batch = sample(registry.get_task("with_as"), coder, 5, 0)
    with pytest.raises(UserError, match="prompts of with_as end where a tokenizer cuts them"):
        paper.cka(coder, batch, store, 0, other=tiny_folder, position="last")


def test_what_cannot_be_compared_is_refused(tiny: LanguageModel, tiny_folder: str, store: ActivationStore) -> None:
    batch = sample(registry.get_task("ioi"), tiny, 3, 0)
    with pytest.raises(UserError, match="at least 4 rows, and last positions of the prompts give 3"):
        paper.cka(tiny, batch, store, 0, position="last")
    with pytest.raises(UserError, match="permutations=0 gives no control"):
        paper.cka(tiny, batch, store, 0, permutations=0)
    copy = shutil.copytree(tiny_folder, tiny_folder + ",b")  # of which a run's key would know nothing
    for name in ("smollm2-135m", "no/such-model", str(copy)):
        with pytest.raises(UserError, match=r"is no model on this machine, .* as a local folder"):
            paper.cka(tiny, batch, store, 0, other=name)


@pytest.mark.slow
def test_neighbouring_layers_are_more_alike_than_distant_ones(smollm: LanguageModel, store: ActivationStore) -> None:
    """As Kornblith et al. 2019 and Nguyen et al. 2021 find of other networks; not where long rows decide."""
    batch = sample(registry.get_task("ioi"), smollm, 16, 0)
    found = paper.cka(smollm, batch, store, 0, permutations=2)
    at = torch.arange(31)
    distance = (at[:, None] - at).abs()
    curve = torch.stack([found.cka[distance == k].mean() for k in (1, 4, 8, 16, 24, 30)])
    assert bool((curve.diff() < 0).all()) and float(curve[0]) > 0.95 and float(curve[-1]) < 0.6
    assert found.null_most < 0.05
    kept = paper.cka(smollm, batch, store, 0, permutations=1, lengths="kept").cka
    assert float(kept[3:10, 3:10].min()) > 0.95 and float(kept[3:10, 12:].max()) < 0.5  # one word's rows
    assert float(found.cka[3:10, 12].min()) > 0.8
