"""The weight-sparse model: selection by definition, three attention paths, laws of the forward pass, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from circuits.patching import patching
from circuits.sparse import files, topk
from circuits.sparse.model import SITES, SparseConfig, SparseTransformer, sinusoids
from circuits.sparse.topk import SAMPLE, AbsTopK, drop_weights, keep_weights, largest
from circuits.wiring import metric
from tests.test_attribution import draw
from workbench import sites
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.lenses import logit_lens
from workbench.models import LanguageModel

SMALL = {"vocab_size": 40, "n_layer": 2, "d_model": 32, "n_head": 4, "d_head": 8, "block_size": 64}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_model(seed: int = 0, **options: Any) -> SparseTransformer:
    module = SparseTransformer(SparseConfig(**{**SMALL, **options}), rng(seed))
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng(seed))
    if module.bigram_table is not None:
        module.bigram_table.data.normal_(generator=rng(seed))
    return module.requires_grad_(False)


TOKENS = torch.randint(40, (3, 12), generator=rng())


# ---- selection ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [0, 1, 7, 31, 32, 50])
def test_the_largest_are_those_that_sorting_finds(k: int, dtype: torch.dtype) -> None:
    size = torch.randn(50, 32, generator=rng()).abs().to(dtype)  # in bfloat16 some are equal
    kept = largest(size, k)
    assert kept.sum(1).tolist() == [min(k, 32)] * 50
    for row, mask in zip(size, kept, strict=True):
        assert torch.equal(row[mask].sort().values, row.sort().values[32 - min(k, 32) :])


@pytest.mark.parametrize("width", [512, 513, 768, 1024, 2048, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_long_rows_are_searched_by_sorted_runs(width: int, dtype: torch.dtype) -> None:
    """For k below, at and above powers of two, and so large that there are no runs; signs do not matter."""
    x = torch.randn(3, 7, width, generator=rng(width), dtype=torch.float64).to(dtype).requires_grad_()
    slopes = torch.randn(3, 7, width, generator=rng()).to(dtype)
    for k in (1, 64, 100, 128, 129, width // 4, 512, 513, width - 1, width, width + 1):
        kept = largest(x.detach().abs(), k)
        assert bool((kept.sum(-1) == min(k, width)).all())
        smallest_kept = x.detach().abs().masked_fill(~kept, torch.inf).amin(-1)
        assert bool((x.detach().abs().masked_fill(kept, 0).amax(-1) <= smallest_kept).all())
        found = AbsTopK(k)(x)
        assert torch.equal(found, torch.where(kept, x, 0))
        assert torch.equal(torch.autograd.grad(found, x, slopes)[0], torch.where(kept, slopes, 0))


def test_equal_entries_are_left_out_until_k_remain() -> None:
    size = torch.tensor([[1.0, 1, 1, 2], [0, 0, 0, 0], [3, 1, 2, 0]])
    assert largest(size, 2).tolist() == [
        [True, False, False, True], [True, True, False, False], [True, False, True, False],
    ]  # fmt: skip


def test_abs_topk_passes_gradients_of_what_it_keeps_alone() -> None:
    x = torch.tensor([[0.1, -3.0, 2.0, -0.5]], requires_grad=True)
    y = AbsTopK(2)(x)
    assert y.tolist() == [[0, -3, 2, 0]]
    (slope,) = torch.autograd.grad((y * torch.arange(1.0, 5)).sum(), x)
    assert slope.tolist() == [[0, 2, 3, 0]]


# ---- forward ----


@pytest.mark.parametrize("sink", [False, True])
def test_all_attention_paths_agree_and_the_sink_counts_in_each(sink: bool) -> None:
    module = random_model(sink=sink, afrac=0.5)
    logits = {}
    for kernel in ("sdpa", "eager", "workbench"):
        module.set_attn_implementation(kernel)
        logits[kernel] = module(TOKENS).logits
    torch.testing.assert_close(logits["sdpa"], logits["eager"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits["workbench"], logits["eager"], rtol=1e-4, atol=1e-5)
    if sink:
        for part in module.modules():
            if hasattr(part, "sink_logit"):
                part.sink_logit -= 20  # nobody looks there any more
        for kernel, before in logits.items():
            module.set_attn_implementation(kernel)
            assert float((module(TOKENS).logits - before).abs().max()) > 1e-2, kernel


def test_a_sink_is_one_more_key_without_value_by_hand() -> None:
    """Scores 0 and log 2 beside a sink of log 5 share the attention as 1 : 2 : 5."""
    module = random_model(n_head=1, d_head=2, sink=True).transformer.h[0].attn
    module.attn_imp.sink_logit.fill_(torch.tensor(5.0).log())
    q = torch.tensor([[0.0, 0], [1, 0]]).view(1, 1, 2, 2)
    k = torch.tensor([[0.0, 0], [torch.tensor(2.0).log() * 2**0.5, 0]]).view(1, 1, 2, 2)
    v = torch.tensor([[1.0, 0], [0, 1]]).view(1, 1, 2, 2)
    for kernel in ("sdpa", "eager", "workbench"):
        module.kernel = kernel
        torch.testing.assert_close(module._attend(q, k, v)[0, 1, 0], torch.tensor([1 / 8, 2 / 8]))


@pytest.mark.parametrize("site", SITES)
def test_every_site_keeps_its_share_and_nothing_else_changes(site: str) -> None:
    """AbsTopK at one site alone: there k entries are left of each position, at every other hook point all."""
    hooks = {
        "attn_in": "attn.hook_in", "attn_q": "attn.hook_q", "attn_k": "attn.hook_k", "attn_v": "attn.hook_v",
        "attn_out": "hook_attn_out", "mlp_in": "mlp.hook_in", "mlp_neuron": "mlp.hook_post", "mlp_out": "hook_mlp_out",
    }  # fmt: skip
    module = random_model(afrac=0.25, afrac_loctypes=(site,))
    run = language_model(module).run(TOKENS, capture=[sites.block(1, hook) for hook in hooks.values()])
    for name, hook in hooks.items():
        x = run[sites.block(1, hook)]
        x = x.flatten(2)  # queries, keys and values: over all heads together
        expected = int(0.25 * x.shape[-1]) if name == site else x.shape[-1]
        assert (x != 0).sum(-1).unique().tolist() == [expected], name


def test_the_residual_stream_is_the_sum_of_what_is_written_and_logits_have_the_bigram_of_the_last_token() -> None:
    model = language_model(random_model(afrac=0.5, sink=True))
    figures = model.self_check()
    assert figures["residual_sum_error"] < 1e-5 and figures["max_logit_difference"] < 1e-4
    last = model.hook_points[-1]
    resid = model.run(TOKENS, capture=[last])[last]
    without = model.final_norm(resid) @ model.unembed_weight
    table = model._module.bigram_table
    torch.testing.assert_close(model.run(TOKENS).logits, without + table[TOKENS], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.unembed(resid, TOKENS), without + table[TOKENS], rtol=1e-4, atol=1e-5)
    at_end = model.run(TOKENS, logits="last").logits
    torch.testing.assert_close(at_end, (without + table[TOKENS])[:, -1:], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="bigram table: its logits need the tokens"):
        model.unembed(resid)


def test_position_channels_are_read_and_not_written() -> None:
    model = language_model(random_model(d_pos_emb=6, enable_bigram_table=False))
    assert model._module.transformer.h[0].attn.c_attn.in_features == 38
    assert model.self_check()["residual_sum_error"] < 1e-5  # without them
    same = torch.full((1, 6), 7)
    logits = model.run(same).logits
    assert logits is not None and float((logits[0, 1:] - logits[0, :-1]).abs().max()) > 1e-3
    none = language_model(random_model(enable_bigram_table=False)).run(same).logits
    assert none is not None and float((none[0, 1:] - none[0, :-1]).abs().max()) < 1e-4  # nobody tells them apart


def test_sinusoids_have_periods_from_four_to_the_length() -> None:
    table = sinusoids(64, 6)
    torch.testing.assert_close(table[:, 0], table[:, 0].roll(4), atol=1e-4, rtol=0)  # 64 is a multiple of 4
    torch.testing.assert_close(table[:, 0] ** 2 + table[:, 3] ** 2, torch.ones(64))
    assert table[32, 2].abs() < 1e-4 and table[16, 2] == pytest.approx(1)  # a period of 64
    fixed = SparseTransformer(SparseConfig(**SMALL, d_pos_emb=6, sinusoidal_cat_pos_emb=True))
    assert fixed.transformer.wpe is not None and not fixed.transformer.wpe.weight.requires_grad
    torch.testing.assert_close(fixed.transformer.wpe.weight.detach(), table)


def test_initial_weights_are_as_published() -> None:
    module = SparseTransformer(SparseConfig(vocab_size=100, n_layer=8, d_model=256, n_head=16), rng())
    std = {name: float(x.detach().std()) for name, x in module.named_parameters() if x.ndim == 2}
    for name, value in std.items():
        assert value == pytest.approx(0.005 if name.endswith("c_proj.weight") else 0.02, rel=0.03), name
    assert not any(x.any() for name, x in module.named_parameters() if name.endswith("bias"))


# ---- as any other model ----


@pytest.fixture
def sparse_tiny(tokenizer: PreTrainedTokenizerFast) -> LanguageModel:
    return LanguageModel(
        random_model(vocab_size=len(tokenizer), n_layer=3, block_size=256, afrac=0.5, sink=True),
        tokenizer, name="tiny-sparse", fingerprint="tiny-sparse",
    )  # fmt: skip


def test_patching_and_lenses_work_with_sparse_activations(sparse_tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(sparse_tiny, n=4)
    found = patching(sparse_tiny, batch, store)
    site = sites.Site(sites.block(1, "attn.hook_z"), head=2)
    clean, corrupted = torch.stack(batch.clean), torch.stack(batch.corrupted)
    z = sparse_tiny.run(corrupted, capture=[site])[site]
    patched = sparse_tiny.run(clean, edit={site: lambda _: z}).logits
    plain = sparse_tiny.run(clean).logits
    assert plain is not None and patched is not None
    effect = (batch.score(plain[:, -1]) - batch.score(patched[:, -1])).mean()
    assert dict(zip(found.nodes, found.scores.tolist(), strict=True))["a1.h2"] == pytest.approx(float(effect), abs=1e-4)
    lens = logit_lens(sparse_tiny, batch, store)
    assert float(lens.metric[-1]) == pytest.approx(float(batch.score(plain[:, -1]).mean()), abs=1e-4)


def test_edges_between_heads_are_refused_where_activations_are_sparse(
    sparse_tiny: LanguageModel, store: ActivationStore
) -> None:
    with pytest.raises(UserError, match="has AbsTopK at attn_"):
        metric(sparse_tiny, draw(sparse_tiny, n=4), store, torch.zeros(1, 16, 40))


# ---- files ----


def language_model(module: SparseTransformer) -> LanguageModel:
    return LanguageModel(module, None, name="random", fingerprint="random")


def sparsify(module: SparseTransformer, share: float = 0.1) -> SparseTransformer:
    for parameter in module.parameters():
        if parameter.ndim == 2:
            parameter.data *= torch.rand(parameter.shape, generator=rng(1)) < share
    return module


class Rough(LanguageModel):
    """Whose own forward rounds more coarsely, as on another machine, while numbers are in single precision."""

    def _plain(self, tokens: Tensor) -> Tensor:
        weight = self._module.transformer.wte.weight
        kept = weight.clone()
        if weight.dtype == torch.float32:
            weight.mul_(1 + 1e-5 * torch.randn(weight.shape, generator=rng()))
        try:
            return super()._plain(tokens)
        finally:
            weight.copy_(kept)


def one_that_rounding_decides(tokenizer: PreTrainedTokenizerFast) -> LanguageModel:
    """A model of which two ways to compute, nearly equal, keep different activations of the same text."""
    for seed in range(200):
        module = random_model(seed, vocab_size=len(tokenizer), n_layer=3, d_model=64, afrac=0.25)
        model = Rough(module, tokenizer, name="sparse", fingerprint=f"s{seed}")
        text = torch.randint(model.config.d_vocab, (2, 32), generator=rng())
        logits = model.run(text).logits
        assert logits is not None
        if float((logits - model._plain(text)).abs().max()) > 2e-3:
            return model
    raise AssertionError("no model was found in which rounding decides")


def test_a_model_in_which_rounding_decides_what_is_kept_is_no_wrong_model(tokenizer: PreTrainedTokenizerFast) -> None:
    model = one_that_rounding_decides(tokenizer)
    before = {name: weight.clone() for name, weight in model._module.state_dict().items()}
    assert model.self_check()["max_logit_difference"] < 1e-9  # in double precision there are no such ties
    after = model._module.state_dict()
    assert all(
        torch.equal(weight, after[name]) and weight.dtype == after[name].dtype for name, weight in before.items()
    )

    class Wrong(type(model)):  # type: ignore[misc]
        def _plain(self, tokens: Tensor) -> Tensor:
            return super()._plain(tokens) + 0.01

    model.__class__ = Wrong
    with pytest.raises(UserError, match="cannot be trusted here"):
        model.self_check()


def test_no_other_model_is_excused_by_double_precision(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = tiny._plain

    def wrong_in_single(tokens: Tensor) -> Tensor:
        logits = right(tokens)
        return logits + 0.01 if logits.dtype == torch.float32 else logits

    monkeypatch.setattr(tiny, "_plain", wrong_in_single)
    with pytest.raises(UserError, match="cannot be trusted here"):
        tiny.self_check()


def test_a_saved_model_comes_back_bit_for_bit_and_small(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    module = sparsify(random_model(vocab_size=len(tokenizer), sink=True, d_pos_emb=6, afrac=0.5))
    assert module.bigram_table is not None
    module.bigram_table.copy_(module.bigram_table.half())
    files.save(module, tokenizer, tmp_path / "model", {"seed": 3})
    model = LanguageModel.load(str(tmp_path / "model"))
    for name, x in module.state_dict().items():
        assert torch.equal(model._module.state_dict()[name], x), name
    assert model.tokenizer("for x in y").input_ids == tokenizer("for x in y").input_ids
    packed = load_file(tmp_path / "model" / files.WEIGHTS)
    assert packed["bigram_table"].dtype == torch.float16 and "transformer.wte.weight" not in packed
    assert json.loads((tmp_path / "model" / "about.json").read_text()) == {"seed": 3}
    with pytest.raises(UserError, match="give another name"):
        files.save(module, tokenizer, tmp_path / "model")


def test_weights_of_another_model_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    files.save(random_model(vocab_size=len(tokenizer)), tokenizer, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"d_model": 16}, "hold no transformer.wte"),
        ({"depth": 3}, "has depth, which"),
        ({"n_layer": 1}, "hold transformer.h.1.* which this model has not"),  # else half a model would be read
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            LanguageModel.load(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 0}, "d_model=0 makes no model"),
        ({"afrac_loctypes": ("attn",)}, "'attn' is no place for AbsTopK"),
        ({"activation_type": "silu"}, "activation_type='silu' is not one of gelu, relu"),
        ({"afrac": 0.0}, "afrac=0 must be above 0"),
        ({"d_pos_emb": 4, "positions": "added"}, "not both"),
    ],
)
def test_impossible_configurations_are_sentences(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SparseConfig(**{**SMALL, **change})


# The fields of a released file, with a smaller model's numbers.
RELEASED = {
    "block_size": 64, "vocab_size": 40, "n_layer": 2, "n_head": 4, "d_head": 8, "d_model": 32, "dropout": 0.0,
    "bias": True, "ln_bias": True, "rms_norm": True, "residual_activation_type": "identity", "activation_type": "gelu",
    "afrac": 0.25, "afrac_loctypes": "attn_in,attn_out,mlp_in,mlp_out,mlp_neuron,attn_v", "debug_nans": False,
    "tied_unembed": False, "tokenizer_name": "tinypython_2k", "grad_checkpointing": True, "d_mlp": 128,
    "enable_bigram_table": True, "learnable_bigram_table": True, "d_pos_emb": None, "dropout_cat_pos_emb": False,
    "sinusoidal_cat_pos_emb": False, "flash": True, "sink": True,
}  # fmt: skip


def release(folder: Path, wpe: Tensor, **changes: Any) -> SparseTransformer:
    """A folder as released: torch's own format, a table of positions that is never left out, a bias of zeros."""
    folder.mkdir()
    config = {name: value for name, value in (RELEASED | changes).items() if name not in changes or value is not None}
    (folder / "beeg_config.json").write_text(json.dumps(config))
    module = random_model(
        sink=True, afrac=0.25, afrac_loctypes=tuple(RELEASED["afrac_loctypes"].split(",")), learnable_bigram_table=True,
    )  # fmt: skip
    state = dict(module.state_dict()) | {"transformer.wpe.weight": wpe, "final_logits_bias": torch.zeros(40)}
    torch.save(state, folder / "final_model.pt")
    return module


def test_a_released_checkpoint_is_converted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    module = release(tmp_path / "release", torch.zeros(64, 32))
    files.from_release(tmp_path / "release", tokenizer, tmp_path / "ours")
    again = files.load(tmp_path / "ours", torch.float32)
    assert again.config.positions == "none" and again.config.afrac_loctypes == module.config.afrac_loctypes
    torch.testing.assert_close(again(TOKENS).logits, module(TOKENS).logits)
    # One that was trained with positions adds them to the embeddings.
    wpe = torch.randn(64, 32, generator=rng())
    release(tmp_path / "with", wpe)
    added = files.from_release(tmp_path / "with", tokenizer, tmp_path / "added")
    assert added.config.positions == "added"
    states = added(TOKENS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[0], module.transformer.wte(TOKENS) + wpe[:12])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_count": 4}, "has expert_count, which"),
        ({"rms_norm": False}, "rms_norm=False is not supported"),
        ({"sink": False}, "does not fit: it has .*sink_logit"),
        ({"rms_norm": None}, "rms_norm=False is not supported"),  # what a release means by leaving it out
        ({"tied_unembed": None}, "tied_unembed=True is not supported"),
        ({"enable_bigram_table": None}, "does not fit: it has .*bigram_table"),
    ],
)
def test_what_a_release_has_beyond_this_model_is_named(
    change: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    release(tmp_path / "release", torch.zeros(64, 32), **change)
    with pytest.raises(UserError, match=message):
        files.from_release(tmp_path / "release", tokenizer, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_missing_files_of_a_release_are_sentences(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"beeg_config.json cannot be read"):
        files.from_release(tmp_path, tokenizer, tmp_path / "ours")
    (tmp_path / "beeg_config.json").write_text(json.dumps(RELEASED))
    with pytest.raises(UserError, match="no weights can be read"):
        files.from_release(tmp_path, tokenizer, tmp_path / "ours")
    save_file({"x": torch.zeros(1)}, tmp_path / files.WEIGHTS)
    with pytest.raises(UserError, match="does not fit"):
        files.from_release(tmp_path, tokenizer, tmp_path / "ours")


# ---- weights ----


def by_definition(weight: Tensor, k: int, j: int) -> Tensor:
    """Each neuron's j largest are infinitely large, then the k largest of all."""
    size = weight.abs().clone()
    for row in size:
        row[row.topk(j).indices] = torch.inf
    kept = torch.zeros(size.numel(), dtype=torch.bool)
    kept[size.flatten().topk(k).indices] = True
    return kept.view(size.shape)


@pytest.mark.parametrize("neurons", ["rows", "columns"])
@pytest.mark.parametrize("j", [0, 1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_weights_are_kept_as_defined(seed: int, j: int, neurons: Literal["rows", "columns"]) -> None:
    """With neurons of very different sizes, so that many have too few among the largest of all."""
    weight = torch.randn(30, 20, generator=rng(seed)) * torch.randn(30, 1, generator=rng(seed + 9)).exp()
    for k in (90, 150, 400, 600):
        kept = keep_weights(weight if neurons == "rows" else weight.T, k, j, neurons)
        kept = kept if neurons == "rows" else kept.T
        assert torch.equal(kept, by_definition(weight, k, j)) and int(kept.sum()) == k
        assert int(kept.sum(1).min()) >= j


def test_large_matrices_are_kept_as_small_ones() -> None:
    """Those of which a sample is looked at first: also where it misleads, and where entries are equal."""
    weight = torch.randn(400, 300, generator=rng())
    misleading = weight.clone()
    misleading.view(-1)[:: 120000 // SAMPLE] = 100.0  # all that the sample sees
    equal = weight.round(decimals=1)
    for one in (weight, misleading, equal, torch.zeros(400, 300)):
        for k in (1, 3000, 60000, 119999, 120000):
            kept = keep_weights(one, k)
            assert int(kept.sum()) == k
            assert torch.equal(one[kept].abs().sort().values, one.abs().flatten().sort().values[120000 - k :])


@pytest.mark.parametrize("neurons", ["rows", "columns"])
@pytest.mark.parametrize("seed", range(3))
def test_weights_are_dropped_as_they_are_not_kept(seed: int, neurons: Literal["rows", "columns"]) -> None:
    """In place, of many matrices on several threads, and by the definition as it is computed on a GPU."""
    some = [torch.randn(rows, 300, generator=rng(seed + rows)) for rows in (40, 257, 400)]
    some = [one * torch.randn(len(one), 1, generator=rng(seed)).exp() ** 2 for one in some]  # very unequal neurons
    some = [one if neurons == "rows" else one.T.contiguous() for one in some]
    threads = torch.get_num_threads()
    for share in (0.02, 0.3, 0.9):
        given = [(one.clone(), int(share * one.numel()), 4, neurons) for one in some]
        try:
            torch.set_num_threads(3)
            drop_weights(given, 0.75)  # exact, as products by it are rounded once
        finally:
            torch.set_num_threads(threads)
        for one, (dropped, k, j, _) in zip(some, given, strict=True):
            kept = keep_weights(one, k, j, neurons)
            assert torch.equal(dropped, one * kept * 0.75) and int(kept.sum()) == k
            by_neuron = by_definition(one if neurons == "rows" else one.T, k, j)
            assert torch.equal(kept, by_neuron if neurons == "rows" else by_neuron.T)
            assert torch.equal(kept, topk._as_defined(one, k, j, neurons))


def test_a_minimum_that_does_not_fit_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"50 weights are too few for 4 of each of 20 neurons; .* to 2"):
        keep_weights(torch.ones(20, 30), 50, 4)
