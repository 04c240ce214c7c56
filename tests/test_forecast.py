"""What is counted without numbers is what a run of the Trainer takes, for each kind of method and model."""

from __future__ import annotations

import lightning as L
import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from lightning_peft import IA3, BottleneckAdapter, LoRA, PeftModule, PrefixTuning, PromptTuning, Selective, VeRA
from lightning_peft.analysis.gpus import KNOWN, gpus_named
from lightning_peft.analysis.largest_batch import MOST, largest_batches
from lightning_peft.analysis.live_bytes import LiveBytes
from lightning_peft.core.imitation import inputs_for
from lightning_peft.core.quantized import scales
from lightning_peft.forecast import imitated_step
from lightning_peft.tasks import task_from_config
from lightning_peft.tasks.base_model import BaseModel
from lightning_peft.tasks.made_up import made_up_batch

ROWS, TOKENS = 4, 64
SIZES = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3, "num_attention_heads": 4}
T5_SIZES = {
    "d_model": 128,
    "d_ff": 344,
    "num_layers": 2,
    "num_heads": 4,
    "d_kv": 32,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
MODELS = {
    "llama": (transformers.LlamaConfig(**SIZES, vocab_size=2000, pad_token_id=0), "causal_lm", {"packing": False}),
    "bert": (
        transformers.BertConfig(**SIZES, vocab_size=2000, attention_probs_dropout_prob=0.0),
        "text_classification",
        {"labels": ["a", "b", "c"]},
    ),
    "t5": (transformers.T5Config(**T5_SIZES, vocab_size=2000, pad_token_id=0), "seq2seq", {}),
}
METHODS = {
    "lora": lambda: LoRA(r=8, target_modules="all-linear", lora_dropout=0.1),
    "dora": lambda: LoRA(r=8, use_dora=True),
    "vera": lambda: VeRA(r=16),
    "ia3": IA3,
    "bottleneck": lambda: BottleneckAdapter(reduction_factor=8),
    "prefix": lambda: PrefixTuning(num_virtual_tokens=6),
    "prompt": lambda: PromptTuning(num_virtual_tokens=6),
    "bias": lambda: Selective(parameter_types=["bias", "norm"]),
    "full": lambda: Selective(keep_originals=False),
}
OPTIMIZER = {"name": "AdamW", "weight_decay": 0.0, "foreach": True}  # as on a GPU


class Watch(L.Callback):
    """Counts the tensors of a run's second step."""

    def on_train_start(self, trainer, pl_module):
        self.live = LiveBytes()
        parameters = list(pl_module.parameters())
        self.live.watch([*parameters, *pl_module.model.buffers(), *(t for p in parameters for t in scales(p))])
        self.live.__enter__()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.live.restart()

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.after_forward = self.live.now

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.peak = self.live.peak

    def on_train_end(self, trainer, pl_module):
        self.live.__exit__(None, None, None)


def _spec(tmp_path, name, **options):
    config, task, task_options = MODELS[name]
    config.save_pretrained(tmp_path)
    return BaseModel(str(tmp_path), **options), task_from_config({"name": task, **task_options})


def _ran(spec, task, method, precision="32-true", model=None):
    """What the Trainer takes, on a model with numbers."""
    model = spec.build(task).train() if model is None else model
    batch = made_up_batch(task, inputs_for(model, ROWS, TOKENS))
    module, watch = PeftModule(model, method, task, dict(OPTIMIZER)), Watch()
    trainer = L.Trainer(
        max_steps=2,
        precision=precision,
        callbacks=[watch],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([batch, batch], batch_size=None))
    return watch.after_forward, watch.peak


def _counted(spec, task, method, precision="32-true"):
    with imitated_step(spec, task, method, OPTIMIZER, precision) as step:
        found = step.memory(ROWS, TOKENS)
    return found.after_forward, found.peak


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_the_trainer_takes_what_was_counted(tmp_path, name, method):
    spec, task = _spec(tmp_path, name)
    found, expected = _counted(spec, task, METHODS[method]()), _ran(spec, task, METHODS[method]())
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("quantization", ["nf4", {"load_in_4bit": True, "quant_method": "bitsandbytes"}], ids=str)
def test_a_base_in_4_bits_takes_what_was_counted(tmp_path, llama_folder, precision, quantization):
    spec = BaseModel(str(llama_folder), quantization=quantization)
    task = task_from_config({"name": "causal_lm", "packing": False})
    method = LoRA(r=8, target_modules="all-linear")
    found = _counted(spec, task, method, precision)
    dtype = torch.bfloat16 if precision == "bf16-mixed" else None
    expected = _ran(spec, task, method, precision, spec.load(task, dtype))
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_the_trainer_takes_what_was_counted_in_fewer_bits(tmp_path, name, precision):
    spec, task = _spec(tmp_path, name)
    found, expected = (go(spec, task, LoRA(r=8), precision) for go in (_counted, _ran))
    assert found == pytest.approx(expected, rel=0.01)


def test_layers_that_are_run_again_leave_less(tmp_path):
    spec, task = _spec(tmp_path, "llama", activation_checkpointing=1)
    plain, _ = _spec(tmp_path, "llama")
    found, expected = (go(spec, task, LoRA(r=8)) for go in (_counted, _ran))
    assert found[0] == pytest.approx(expected[0], rel=0.01)
    assert found[0] < 0.7 * _counted(plain, task, LoRA(r=8))[0]


def test_parts_are_those_of_the_model_and_its_optimizer(tmp_path):
    spec, task = _spec(tmp_path, "bert")
    with imitated_step(spec, task, Selective(keep_originals=False), OPTIMIZER) as step:
        found = step.memory(ROWS, TOKENS)
    numbers = 4 * sum(p.numel() for p in spec.build(task).parameters())
    assert (found.trained, found.gradients) == pytest.approx((numbers, numbers), rel=0.01)
    assert found.optimizer == pytest.approx(2 * numbers, rel=0.02)
    assert found.peak > found.weights + found.trained + found.gradients + found.optimizer


def test_logits_of_all_tokens_are_counted_apart(tmp_path):
    spec, _ = _spec(tmp_path, "llama")
    task = task_from_config({"name": "causal_lm", "all_logits": True})
    with imitated_step(spec, task, LoRA(r=8), OPTIMIZER) as step:
        assert step.memory(ROWS, TOKENS).logits > ROWS * TOKENS * 2000 * 4


@pytest.mark.parametrize("options", [{"quantization": "nf4"}, {}], ids=["4 bits", "loss in chunks"])
def test_what_a_step_computes_does_not_hang_on_how(llama_folder, options):
    computed = []
    for spec, task in ((options, {}), ({}, {"all_logits": True})):
        base, task = BaseModel(str(llama_folder), **spec), task_from_config({"name": "causal_lm", **task})
        with imitated_step(base, task, LoRA(r=8), OPTIMIZER) as step:
            computed.append(step.operations(ROWS, TOKENS))
    # a row's last token needs no logits
    assert computed[0] == pytest.approx(computed[1], rel=0.02)


def test_the_largest_batch_fits_and_more_than_a_row_more_does_not(tmp_path):
    spec, task = _spec(tmp_path, "bert")
    with imitated_step(spec, task, LoRA(r=8), OPTIMIZER) as step:

        def peak(rows):
            return step.memory(rows, TOKENS).peak

        for rows in (3, 9):  # what a row takes is rounded to blocks
            (found,) = largest_batches(peak, [peak(rows) + 5000])
            assert rows - 1 <= found <= rows
        assert largest_batches(peak, [peak(1) - 1]) == [0]


def test_a_step_that_always_fits_has_a_largest_batch_too():
    assert largest_batches(lambda rows: 100, [99, 100, 10**9]) == [0, MOST, MOST]


def test_what_lies_between_two_counted_sizes_is_no_more_than_fits():
    def peak(rows):
        return max(50 + rows, 8 * rows)

    for memory in (60, 500, 3001):
        (rows,) = largest_batches(peak, [memory])
        assert 0 < peak(rows) <= memory


def test_cards_are_known_by_name_and_the_smallest_is_first():
    assert [card.name for card in gpus_named(["H200", "T4"])] == ["T4", "H200"]
    assert len(gpus_named(None)) == len(KNOWN)
    assert [card.name for card in gpus_named(["h100", "l4", "H100-80GB"])] == ["L4", "H100-80GB"]
    assert gpus_named("T4")[0].seconds(10**12, "bf16-mixed") > gpus_named("T4")[0].seconds(10**12, "16-mixed")
    with pytest.raises(ValueError, match="'H20' is unknown; did you mean 'H200'"):
        gpus_named(["H20"])
    with pytest.raises(ValueError, match="gpus is empty"):
        gpus_named([])


@pytest.mark.parametrize(
    ("method", "options", "precision", "said"),
    [
        (LoRA(r=2), {}, "16", "precision must be one of 32-true, .* but got '16'"),
        (LoRA(r=2), {"quantization": "int8"}, "32-true", "quantization=int8 takes cannot be counted"),
        (LoRA(r=2, init_lora_weights="eva"), {}, "32-true", "it looks at data first"),
        (LoRA(r=2), {"activation_checkpointing": 1, "offload_activations": True}, "32-true", "only without it"),
    ],
)
def test_what_cannot_be_counted_is_refused(tmp_path, method, options, precision, said):
    spec, task = _spec(tmp_path, "llama", **options)
    with pytest.raises(ValueError, match=said), imitated_step(spec, task, method, OPTIMIZER, precision):
        pass


def test_an_optimizer_is_counted_as_on_a_gpu(tmp_path):
    spec, task = _spec(tmp_path, "llama")
    peaks = []
    for options in ({}, {"foreach": True}, {"foreach": False}):
        optimizer = {"name": "AdamW", "weight_decay": 0.0, **options}
        with imitated_step(spec, task, Selective(keep_originals=False), optimizer) as step:
            peaks.append(step.memory(1, 8).peak)
    assert peaks[0] == peaks[1] > 1.1 * peaks[2]


def test_dropout_of_attention_keeps_no_matrices_of_all_pairs(tmp_path):
    spec, task = _spec(tmp_path, "bert")
    plain = _counted(spec, task, LoRA(r=8))
    config = {"attention_probs_dropout_prob": 0.1}
    assert _counted(BaseModel(str(tmp_path), config=config), task, LoRA(r=8)) == plain


@pytest.mark.parametrize("kind", ["Mixtral", "GraniteMoe"])
def test_experts_that_tokens_choose_are_refused_in_a_sentence(tmp_path, kind):
    sizes = {**SIZES, "vocab_size": 500, "pad_token_id": 0, "num_local_experts": 4, "num_key_value_heads": 2}
    getattr(transformers, f"{kind}Config")(**sizes).save_pretrained(tmp_path)
    with (
        imitated_step(BaseModel(str(tmp_path)), task_from_config("causal_lm"), LoRA(r=2), OPTIMIZER) as step,
        pytest.raises(ValueError, match=f"what a step of {kind}ForCausalLM takes .* without"),
    ):
        step.memory(2, 8)


@pytest.mark.parametrize(
    "config", [transformers.BartConfig(d_model=32, vocab_size=500), transformers.GPT2Config(n_embd=64, n_head=4)]
)
def test_texts_are_classified_by_models_that_look_for_their_end(tmp_path, config):
    config.save_pretrained(tmp_path)
    task = task_from_config({"name": "text_classification", "labels": ["a", "b"]})
    with imitated_step(BaseModel(str(tmp_path)), task, Selective(parameter_types=["head"]), OPTIMIZER) as step:
        assert step.memory(2, 8).trained > 0


def test_targets_are_as_long_as_the_task_lets_them_be(tmp_path):
    spec, _ = _spec(tmp_path, "t5")
    short, whole = (
        _counted(spec, task_from_config({"name": "seq2seq", "max_target_length": n}), LoRA(r=8)) for n in (8, None)
    )
    assert short[1] < whole[1]


def test_a_forecast_leaves_random_numbers_alone(tmp_path):
    spec, task = _spec(tmp_path, "bert")
    state = torch.get_rng_state()
    _counted(spec, task, LoRA(r=4, lora_dropout=0.1))
    assert torch.equal(torch.get_rng_state(), state)
