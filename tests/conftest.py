"""Real parts for the tests: tiny random models of every family, with a tokenizer trained on the tasks' own text, and
the embedded model. Runs and activations go to temporary folders; downloaded weights are shared between runs."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from circuits.sparse import bridges
from circuits.sparse.data import train_tokenizer
from circuits.sparse.model import SparseConfig, SparseTransformer
from circuits.sparse.train import Recipe
from saes.objectives import Spec
from saes.train import Place, Training, Units
from workbench import cli, places, registry, runs, settings, texts
from workbench.activations import ActivationStore
from workbench.models import LanguageModel
from workbench.tasks.python_code import TASKS

Wb = Callable[..., tuple[int, str, str]]
On = Callable[[str], dict[str, Any]]
# Parameters that make an analysis quick.
QUICK: dict[str, dict[str, Any]] = {
    "sae-codes": {"steps": 5, "trials": 1, "permutations": 5},
    "compare": {"methods": "patching,eap"},
    "sparse-prune": {"target": 0.7, "sure": 0.0, "settings": 1, "steps": 3, "controls": False},
    "sparse-tasks": {"target": 0.7, "settings": 1, "steps": 3, "tasks": "with_as,for_while", "pairs": 4},
    "bridge-dose": {"node": "0.mlp.act_in:3", "controls": 2},
    "sparse-bridge": {"tokens": 2048},
    "language-heads": {"n_prompts": 2},
    "language-steering": {"top": 1, "written": 2, "steps": 4, "n_validation": 3, "n_test": 3, "n_effects": 2},
    "language-layers": {"strengths": "1", "steps": 4, "n_validation": 2, "n_test": 2},
    "steer": {"latent": 7, "unit": 1.0, "steps": 4},
    "latents": {"text": "parallel", "tokens": 2000, "length": 16, "examples": 3},
    "train-sae": {
        "text": "parallel", "hooks": "1", "latents": 64, "k": 4.0, "tokens": 2000, "length": 16, "batch": 64,
        "dtype": "float32",
    },
    "attention-sinks": {"magnitude": 0.5, "ratio": 4.0, "controls": 1},
    "icl-regression": {"steps": 5, "batch": 16, "prompts": 50},
    "modular-addition": {"modulus": 23, "embedding": 12, "neurons": 32, "steps": 30, "controls": 3},
    "sparse-train": {"tokens": 4096, "width": 32, "layers": 1, "density": 0.5},
}  # fmt: skip

LANGUAGES = ("language-latents", "language-steering", "language-heads", "language-layers")

torch.set_num_threads(1)  # several workers share the machine

CONFIGS = {
    "llama": lambda v: LlamaConfig(
        vocab_size=v, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    ),
    "gpt2": lambda v: GPT2Config(vocab_size=v, n_embd=32, n_layer=3, n_head=4, n_positions=256),
    "gpt_neox": lambda v: GPTNeoXConfig(
        vocab_size=v, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=256,
    ),
    "gemma3_text": lambda v: Gemma3TextConfig(
        vocab_size=v, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=256, sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gemma2": lambda v: Gemma2Config(
        vocab_size=v, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, sliding_window=8,
        attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "mistral": lambda v: MistralConfig(
        vocab_size=v, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, sliding_window=8,
    ),
    "qwen2": lambda v: Qwen2Config(
        vocab_size=v, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    ),
    "qwen3": lambda v: Qwen3Config(
        vocab_size=v, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
    ),
    # Without AbsTopK, so that the laws of heads and their edges hold of it too.
    "weight_sparse": lambda v: SparseConfig(v, n_layer=3, d_model=32, n_head=4, d_head=8, block_size=256, sink=True),
    "weight_sparse_positions": lambda v: SparseConfig(
        v, n_layer=3, d_model=32, n_head=4, d_head=8, block_size=256, positions="added", enable_bigram_table=False,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh WORKBENCH_HOME for every test."""
    path = tmp_path / "home"
    monkeypatch.setenv("WORKBENCH_HOME", str(path))
    monkeypatch.delenv("WORKBENCH_DEVICE", raising=False)
    monkeypatch.setattr(places, "_shipped", [])
    return path


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which the tasks' words are single tokens."""
    rng = random.Random(0)
    words = [task for name, task in registry.tasks().items() if name not in TASKS]  # code has its own: `coder`
    prompts = [task.draw(rng) for task in words for _ in range(400)]
    texts = [p.clean + p.answers[0] for p in prompts] + [p.corrupted + p.wrong[0] for p in prompts]
    bpe = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)  # as in the embedded models
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


@pytest.fixture(scope="session")
def make_tiny(tokenizer: PreTrainedTokenizerFast) -> Callable[..., LanguageModel]:
    """make_tiny("gpt2", seed=1): a random model of a family."""

    def make(kind: str = "llama", seed: int = 0) -> LanguageModel:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = CONFIGS[kind](len(tokenizer))
            sparse = isinstance(config, SparseConfig)
            module = SparseTransformer(config) if sparse else AutoModelForCausalLM.from_config(config)
            if sparse and module.bigram_table is not None:
                module.bigram_table.normal_()
            for parameter in module.parameters():  # norms and biases too, so that none is trivially 0 or 1
                parameter.data += 0.1 * torch.randn_like(parameter)
        return LanguageModel(module, tokenizer, name=f"tiny-{kind}", fingerprint=f"tiny-{kind}-{seed}")

    return make


@pytest.fixture(scope="session")
def tiny(make_tiny: Callable[..., LanguageModel]) -> LanguageModel:
    """Llama with grouped-query attention: 3 layers, 4 heads on 2 key-value heads, d_model 32."""
    return make_tiny()


@pytest.fixture(scope="session")
def coder() -> LanguageModel:
    """A random model that reads code: with the smallest tokenizer of the generated programs."""
    bpe = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(512, real=0.0, size=1_000_000))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(CONFIGS["llama"](len(bpe)))
    return LanguageModel(module, bpe, name="coder", fingerprint="coder")


@pytest.fixture(scope="session")
def sparse_coder(coder: LanguageModel) -> LanguageModel:
    """A random weight-sparse model that reads code, and says what it would have been trained on."""
    vocab, sites = coder.config.d_vocab, ("attn_in", "attn_v", "mlp_neuron")
    config = SparseConfig(vocab, 2, 32, 2, block_size=128, afrac=0.5, afrac_loctypes=sites, sink=True)
    module = SparseTransformer(config, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for weight in module.parameters():
        kept = torch.rand(weight.shape, generator=generator) < 0.25
        weight.data += 0.3 * kept * torch.randn(weight.shape, generator=generator)
    module.about = {"recipe": Recipe(config, density=0.25, tokens=1).to_json()}
    return LanguageModel(module, coder.tokenizer, name="sparse-coder", fingerprint="sparse-coder")


@pytest.fixture(scope="session")
def bridged_coder(sparse_coder: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """The same with random bridges to itself beside it."""
    module, folder = sparse_coder._module, tmp_path_factory.mktemp("bridged") / "coder"
    bpe = sparse_coder.tokenizer.backend_tokenizer
    maps = bridges.Bridges(bridges.BridgeConfig(2, 32, 32), torch.Generator().manual_seed(0))
    bridges.save(bridges.TrainedBridges(module, bpe, [], module.about, module, maps), folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_HOME", str(folder.with_name("home")))
        return LanguageModel.load(str(folder))


@pytest.fixture(scope="session")
def tiny_sae(tiny: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE of `tiny`'s residual stream after block 1, trained for a moment, in a folder."""
    hook = "blocks.1.hook_resid_post"
    tokens = torch.stack(texts.sequences(texts.load("parallel"), tiny, 33, 33 * 128)[:128])
    rows = tiny.run(tokens, capture=[hook], logits="none")[hook][:, 1:].reshape(-1, 32)
    training = Training(
        Spec(latents=64, k=4, norm=1.0, lr=3e-3), Place(hook), 32, 32, steps=96, units=(Units.of(rows),) * 2
    )
    for step in range(96):
        training.step({hook: rows[step % 16 :: 16]})
    folder = tmp_path_factory.mktemp("sae") / "sae"
    training.sae({hook: rows}).save(folder)
    return folder


@pytest.fixture(scope="session")
def few_sentences(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Some of our parallel sentences, as a file of one's own."""
    path = tmp_path_factory.mktemp("parallel") / "rows.jsonl"
    path.write_text("\n".join(texts.PARALLEL.read_text(encoding="utf-8").splitlines()[:30]), encoding="utf-8")
    return str(path)


@pytest.fixture
def on(
    tiny: LanguageModel, sparse_coder: LanguageModel, bridged_coder: LanguageModel, tiny_sae: Path, few_sentences: str
) -> On:
    """on("patching"): what to run an analysis on, and its parameters, so that it takes no time."""

    def chosen(name: str) -> dict[str, Any]:
        analysis = registry.get_analysis(name)
        names = ("sparse-prune", "sparse-tasks", "sparse-bridge", "sparse-circuit")
        of_sparse = dict.fromkeys(names, sparse_coder)
        of_sparse |= {"bridge-dose": bridged_coder}
        model = {} if analysis.model is None else {"model": of_sparse.get(name, tiny)}
        task = {} if analysis.task is None else {"task": "with_as" if name in of_sparse else "ioi", "n": 6}
        more = {"sparse-bridge": {"dense": bridged_coder.name}, "latents": {"sae": str(tiny_sae)}}
        of_sae = ("language-latents", "language-steering", "language-heads", "try-on", "steer")
        more |= dict.fromkeys(of_sae, more["latents"])
        languages = {name: {"text": few_sentences} for name in LANGUAGES}
        more |= {name: more.get(name, {}) | some for name, some in languages.items()}
        if name in ("judge", "judge-sizes"):
            found = runs.run("eap", model=tiny, task="ioi", n=6)
            more[name] = {"found": found.id, "seed": 1} | ({"size": 20, "subsets": 2} if name == "judge" else {})
        if name == "language-hybrid":
            few = more["language-steering"] | QUICK["language-steering"]
            more[name] = {"found": runs.run("language-steering", model=tiny, **few).id}
        if name == "sparse-circuit":
            more[name] = {"found": runs.run("sparse-tasks", model=sparse_coder, **QUICK["sparse-tasks"]).id}
        more = more.get(name, {})
        return model | task | more | QUICK.get(name, {})

    return chosen


@pytest.fixture
def tiny_folder(tiny: LanguageModel, tmp_path: Path) -> str:
    """The same model as a local folder, for the command line."""
    folder = tmp_path / "tiny-model"
    tiny._module.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def wb(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Wb:
    """wb("run", "patching", ...) -> status, stdout, stderr; the real entry point."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["wb", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    return ActivationStore(tmp_path / "store")


@pytest.fixture(scope="session")
def shared_home() -> Path:
    """Where downloaded weights are kept between test runs."""
    saved = {name: os.environ.pop(name, None) for name in ("WORKBENCH_TEST_HOME",)}
    return Path(saved["WORKBENCH_TEST_HOME"] or "~/.mechinterp-workbench").expanduser()


@pytest.fixture
def smollm(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LanguageModel]:
    """The embedded model, fetched on first use."""
    with monkeypatch.context() as patch:
        patch.setenv("WORKBENCH_HOME", str(shared_home))
        settings.home()
        model = LanguageModel.load("smollm2-135m")
    yield model
