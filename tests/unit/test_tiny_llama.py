"""tiny-llama: it loads to the bit, its tokenizer keeps every text, and it predicts better than counting does."""

from __future__ import annotations

import pytest
import torch

from nbkit import language, models, recipes
from nbkit.errors import UnknownName

recipe = recipes.load("models/tiny_llama.py")
SMALL = {"vocab": 16, "width": 8, "layers": 2, "heads": 2, "hidden": 12, "positions": 32}


@pytest.fixture(scope="module")
def model():
    return models.load("tiny-llama", seed=0)


@pytest.fixture(scope="module")
def tokenizer():
    return models.tokenizer("tiny-llama")


@pytest.fixture(scope="module")
def texts():
    return recipe.texts()


def test_it_has_eight_layers_of_64_and_the_names_of_smollm2(model):
    assert type(model).__name__ == "LlamaForCausalLM" and not model.training
    assert sum(p.numel() for p in model.parameters()) == models.about("tiny-llama").parameters == 492_608
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert language.mlp_hidden(model) == [f"model.layers.{k}.mlp.down_proj" for k in range(8)]
    assert {p.dtype for p in model.parameters()} == {torch.float32} and all(
        p.requires_grad for p in model.parameters()
    )


def test_two_loads_are_equal_to_the_bit_and_two_seeds_are_not(model):
    ids = torch.arange(1, 200)[None]
    state = torch.random.get_rng_state()
    again, other = models.load("tiny-llama"), models.load("tiny-llama", seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    assert not torch.equal(model.model.norm.weight, other.model.norm.weight)
    with pytest.raises(ValueError, match=r"seed 2; there are seeds \[0, 1\]"):
        models.load("tiny-llama", seed=2)


def test_the_tokenizer_gives_every_text_back(tokenizer, texts):
    odd = [" two  blanks\tand\n\nlines ", "Zürich, naïve 東京 \N{ROCKET}", "", "x" * 300, *texts[1][:50]]
    for text in odd:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text and all(0 < i < 1024 for i in ids)
    assert len(tokenizer) == 1024 and tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]


def test_held_out_texts_are_less_surprising_than_to_counts_of_tokens(model, tokenizer, texts):
    train, held = (
        recipe.windows(tokenizer.backend_tokenizer, some) for some in (texts[0][:3000], texts[1][:300])
    )
    one = torch.bincount(train.flatten(), minlength=1024).double() + 1
    unigram = -(one / one.sum()).log()[held[:32, 1:]].mean()
    assert language.perplexity(model, held[:32]) < unigram.exp().item() / 4


@pytest.mark.parametrize("seed", recipe.SEEDS)
def test_its_card_says_what_it_reached_beside_a_unigram_and_a_bigram(seed):
    card = models.about("tiny-llama", seed=seed)
    losses = [card.figures[name] for name in ("held_out_loss", "bigram_loss", "unigram_loss")]
    assert losses == sorted(losses) and losses[0] < losses[1] - 0.2
    assert (
        "next-token" in card.task
        and "models.tokenizer('tiny-llama')" in card.input
        and "WordNet" in card.licence
    )
    assert card.figures["steps"] == recipe.STEPS and card.figures["settings"] == recipe.SETTINGS


def test_every_checkpoint_of_the_recipe_is_shipped():
    shipped = {c.path.stem for c in models.checkpoints("tiny-llama")}
    assert shipped == {f"{recipe.STEM}-seed{seed}" for seed in recipe.SEEDS}


def test_held_out_texts_are_a_fiftieth_and_none_is_trained_on(texts):
    train, held = texts
    wordnet_and_pages = 117_659 + 1_100
    assert len(train) + len(held) == wordnet_and_pages and len(held) == 117_659 // 50 + 1_100 // 50
    assert recipe.texts()[1] == held


def test_tied_weights_are_stored_once_and_tied_when_loaded(tmp_path):
    model, path = models.build("tiny-llama", seed=3, **SMALL), tmp_path / "net.safetensors"
    models.save_checkpoint(path, model, "tiny-llama", SMALL, seed=3)
    again, facts = models.load_checkpoint(path)
    assert again.lm_head.weight is again.model.embed_tokens.weight and facts["config"] == SMALL
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    wide = models.build("tiny-llama", seed=0, **SMALL | {"width": 16})
    before = wide.model.norm.weight.clone()
    with pytest.raises(ValueError, match="of another shape"):
        models.load_checkpoint(path, wide)
    assert torch.equal(wide.model.norm.weight, before)


def test_it_has_no_classes_and_networks_of_pictures_no_tokenizer():
    with pytest.raises(UnknownName, match="its task is next-token"):
        models.labels("tiny-llama")
    with pytest.raises(UnknownName, match="tiny-vit has no tokenizer"):
        models.tokenizer("tiny-vit")
    with pytest.raises(UnknownName, match=r"models.tokenizer\('tiny-llama'\)"):
        models.transform("tiny-llama")


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    ids = torch.randint(0, 1024, (40, 16), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(recipe, "MINUTE", 0)  # save after every step
    whole, _ = recipe.train(ids, 0, 3, make(tmp_path / "whole"))
    save = torch.save

    def stop_in_step_three(what, path):
        if what[0] == 3:
            raise KeyboardInterrupt
        save(what, path)

    monkeypatch.setattr(recipe.torch, "save", stop_in_step_three)
    with pytest.raises(KeyboardInterrupt):
        recipe.train(ids, 0, 3, make(tmp_path / "parts"))
    monkeypatch.setattr(recipe.torch, "save", save)
    parts, _ = recipe.train(ids, 0, 3, tmp_path / "parts")
    assert torch.equal(whole.model.norm.weight, parts.model.norm.weight)


def make(folder):
    folder.mkdir()
    return folder
