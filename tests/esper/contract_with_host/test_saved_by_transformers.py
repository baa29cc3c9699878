"""D6 in transformers: the Trainer's best model, ``save_pretrained`` and ``from_pretrained``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

import esper
from esper.grafting.slot import slots
from esper.sdk.frameworks.huggingface import EsperCallback
from tests.esper.contract_with_host.saved_models import Run, computed

pytestmark = pytest.mark.filterwarnings("ignore")
logging.set_verbosity_error()
logging.disable_progress_bar()
GRAFT_AT, UNDO_AT, SAVE_EVERY, STEPS = 6, 14, 4, 20
ROWS = torch.randint(11, (16, 8), generator=torch.Generator().manual_seed(0))
LAYERS = {
    "mlp_gelu_2048": "transformer.h.0.mlp.c_fc",
    "proj_lora_64": "lm_head",
    "ln_rms": "transformer.h.1.ln_1",
}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 11, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))


def output_of(model: Any) -> Tensor:
    was = model.training
    model.eval()
    with torch.no_grad():
        y: Tensor = model(ROWS[:3]).logits
    model.train(was)
    return y


class Surgeon(TrainerCallback):
    def __init__(self, callback: EsperCallback, blueprint: str, undo: bool) -> None:
        self.callback, self.blueprint, self.undo = callback, blueprint, undo
        self.receipt: Any = None
        self.outputs: dict[int, Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        session = self.callback.session
        assert session is not None
        if state.global_step == GRAFT_AT and self.blueprint:
            self.receipt = session.graft(LAYERS[self.blueprint], self.blueprint)
        if state.global_step == UNDO_AT and self.undo:
            session.undo(self.receipt, hard=False)
        self.outputs[state.global_step] = output_of(kwargs["model"])


class Judged(Trainer):
    """Its held-out loss is lowest at one step."""

    def __init__(self, best: int, **options: Any) -> None:
        super().__init__(**options)
        self.best = best

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        found = {"eval_loss": float(abs(self.state.global_step - self.best))}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found


def trainer_of(folder: Path, surgeon: Surgeon, best: int = 0, model: Any = None) -> Judged:
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=STEPS, learning_rate=1e-2,
        eval_strategy="steps", eval_steps=SAVE_EVERY, save_strategy="steps", save_steps=SAVE_EVERY,
        load_best_model_at_end=best > 0, metric_for_best_model="eval_loss", greater_is_better=False,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1000,
        dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    return Judged(
        best, model=model or gpt2(), args=arguments, train_dataset=rows, eval_dataset=rows[:4],
        callbacks=[surgeon.callback, surgeon],
    )  # fmt: skip


@pytest.mark.parametrize("blueprint", LAYERS)
@pytest.mark.parametrize(
    ("best", "undo", "grafted"),
    [(4, False, False), (12, False, True), (12, True, True), (16, True, False)],
    ids=["before the graft", "with it", "with one undone since", "after the undo"],
)
def test_the_best_model_at_the_end_is_the_best_model(
    tmp_path: Path, best: int, undo: bool, grafted: bool, blueprint: str
) -> None:
    surgeon = Surgeon(EsperCallback(run="best"), blueprint, undo)
    trainer = trainer_of(tmp_path / "run", surgeon, best)
    trainer.train()
    model: Any = trainer.model

    assert str(trainer.state.best_model_checkpoint).endswith(f"checkpoint-{best}")
    assert torch.equal(output_of(model), surgeon.outputs[best])
    assert bool([layer for layer, _, slot in slots(model) if slot.grafts()]) is grafted
    model.save_pretrained(tmp_path / "final")
    for kind in (GPT2LMHeadModel, AutoModelForCausalLM):
        for folder in (tmp_path / "final", trainer.state.best_model_checkpoint):
            loaded = kind.from_pretrained(folder)
            assert torch.equal(output_of(loaded), surgeon.outputs[best])


@pytest.mark.parametrize("blueprint", LAYERS)
def test_training_goes_on_from_a_checkpoint_with_a_graft(tmp_path: Path, blueprint: str) -> None:
    surgeon = Surgeon(EsperCallback(run="fit"), blueprint, undo=False)
    trainer_of(tmp_path, surgeon).train()
    later = Surgeon(EsperCallback(run="fit"), "", undo=False)
    trainer = trainer_of(tmp_path, later)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))

    assert torch.equal(output_of(trainer.model), surgeon.outputs[STEPS])


@pytest.mark.parametrize("shards", ["1GB", "3KB"], ids=["one file", "several files"])
def test_a_grafted_model_is_saved_and_loaded_by_transformers(tmp_path: Path, shards: str) -> None:
    run = Run("gpt2")
    for layer, slug in (("transformer.h.0.mlp.c_fc", "mlp_gelu_2048"), ("lm_head", "proj_lora_64")):
        run.graft(layer, slug)
    model: Any = run.model
    model.save_pretrained(tmp_path, max_shard_size=shards)
    expected = computed(model, "gpt2")

    loaded, keys = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(computed(loaded, "gpt2"), expected)
    assert not keys["missing_keys"]
    without_esper: Any = PreTrainedModel.from_pretrained.__func__.__wrapped__
    _, keys = without_esper(GPT2LMHeadModel, tmp_path, output_loading_info=True)
    assert "lm_head.esper.load_with_esper_load_state_dict" in keys["unexpected_keys"]
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert torch.equal(computed(GPT2LMHeadModel.from_pretrained(again), "gpt2"), expected)
    run.session.close()


def test_another_class_takes_the_grafts_of_the_layers_that_it_has(tmp_path: Path) -> None:
    run = Run("gpt2")
    run.graft("transformer.h.0.mlp.c_fc", "mlp_gelu_2048")
    run.graft("lm_head", "proj_lora_64")
    model: Any = run.model
    model.save_pretrained(tmp_path)
    body = GPT2Model.from_pretrained(tmp_path).eval()
    model.eval()

    assert [layer for layer, _, slot in slots(body) if slot.grafts()] == ["h.0.mlp.c_fc"]
    expected = model.transformer(ROWS[:3]).last_hidden_state
    assert torch.equal(body(ROWS[:3]).last_hidden_state, expected)
    run.session.close()


def test_a_model_in_half_precision_gets_the_grafts_in_half_precision(tmp_path: Path) -> None:
    run = Run("gpt2")
    run.graft("transformer.h.0.mlp.c_fc", "mlp_gelu_2048")
    model: Any = run.model
    model.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.bfloat16)

    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(
        computed(loaded, "gpt2").float(), computed(model, "gpt2"), atol=0.05, rtol=0.05
    )
    run.session.close()


def test_an_exported_model_is_saved_where_its_grafts_were_merged(tmp_path: Path) -> None:
    run = Run("gpt2")
    run.graft("transformer.h.1.attn.c_attn", "proj_ia3")
    run.graft("transformer.h.0.mlp.c_fc", "proj_lora_64")
    plain: Any = esper.export(run.model)
    plain.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)

    assert isinstance(plain, GPT2LMHeadModel)
    assert list(plain.state_dict()) == list(gpt2().state_dict())
    assert torch.equal(computed(loaded, "gpt2"), computed(plain, "gpt2"))
    torch.testing.assert_close(
        computed(loaded, "gpt2"), computed(run.model, "gpt2"), atol=1e-5, rtol=1e-5
    )
    run.session.close()
