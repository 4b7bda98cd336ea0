"""What the ranks do with the real Trainer. Every function is called on all ranks at once."""

import copy
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from deepspeed_sdp import SDPError
from deepspeed_sdp.hf import SDPTrainer
from tests.support.models import tiny_model

BLOCK = "subnetwork_data_parallel"
HALF = {"coverage": 0.5}


class Rows(Dataset):
    """Token sequences, the same everywhere; of different lengths if asked."""

    def __init__(self, count, seed=0, length=12, lengths=None):
        generator = torch.Generator().manual_seed(seed)
        self.rows = [
            torch.randint(3, 97, (lengths[i % len(lengths)] if lengths else length,), generator=generator).tolist()
            for i in range(count)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        ids = self.rows[index]
        return {"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}


def ds_config(stage=1, sdp=None, **extra):
    """As the documentation of transformers shows it, with "auto" where a Trainer's user has it."""
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"},
        **extra,
    }
    return {**config, BLOCK: sdp} if sdp is not None else config


def fresh():
    """As in a process that has not used accelerate yet."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def make(
    folder, sdp, stage=1, trainer=SDPTrainer, model=None, family="llama", ds=None, rows=32, lengths=None, **kwargs
):
    fresh()
    own = {
        key: kwargs.pop(key)
        for key in ("compute_metrics", "callbacks", "data_collator", "train_dataset", "optimizers")
        if key in kwargs
    }
    arguments = {
        "output_dir": folder,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
        "dataloader_pin_memory": False,
        "deepspeed": copy.deepcopy(ds_config(stage, sdp, **(ds or {}))),
        **kwargs,
    }
    args = TrainingArguments(**arguments)
    module = tiny_model(family, **(model or {})) if not isinstance(model, torch.nn.Module) else model
    return trainer(
        model=module,
        args=args,
        **{"train_dataset": Rows(rows, lengths=lengths), "eval_dataset": Rows(16, seed=5), **own},
    )


def history(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def close(trainer):
    if trainer.deepspeed is not None:
        trainer.deepspeed.destroy()
    fresh()


def train(folder, sdp, which="sdp", **values):
    """Losses, norms, and the full model."""
    trainer = make(folder, sdp, trainer=SDPTrainer if which == "sdp" else Trainer, **values)
    trainer.train()
    result = {key: history(trainer, key) for key in ("loss", "grad_norm", "learning_rate")}
    result["evaluation"] = trainer.evaluate()["eval_loss"]
    result["flos"] = trainer.state.total_flos
    trainer.save_model()
    dist.barrier()
    close(trainer)
    return result


def save_and_resume(folder, sdp, stop_at=2, resume=None, model_seed=0, **values):
    """Train with a checkpoint in the middle, or from it."""
    trainer = make(folder, sdp, save_strategy="steps", save_steps=stop_at, model={"seed": model_seed}, **values)
    trainer.train(resume_from_checkpoint=resume)
    result = {"loss": history(trainer), "step": trainer.state.global_step, "full": trainer.deepspeed.full_state_dict()}
    result["learning_rate"] = history(trainer, "learning_rate")
    close(trainer)
    return result


def accuracy(prediction):
    logits, labels = prediction.predictions, prediction.label_ids
    right = (np.argmax(logits, -1)[:, :-1] == labels[:, 1:]).mean()
    return {"accuracy": float(right), "logits": float(np.abs(logits).sum()), "rows": len(labels)}


def evaluate(folder, sdp, evaluation="gathered", eval_first=False, **values):
    """Metrics and predictions of the full model, and the folder it was saved to."""
    trainer = make(folder, {**sdp, "evaluation": evaluation}, compute_metrics=accuracy, **values)
    before = trainer.evaluate() if eval_first else None
    trainer.train()
    metrics = trainer.evaluate()
    predicted = trainer.predict(Rows(16, seed=5))
    trainer.save_model(f"{folder}/saved")
    dist.barrier()
    close(trainer)
    return {
        "before": before,
        "metrics": metrics,
        "logits": predicted.predictions,
        "test": predicted.metrics,
    }


def best_model(folder, sdp, **values):
    """Evaluate and save every step, keep few, stop early, end with the best."""
    from transformers import EarlyStoppingCallback

    trainer = make(
        folder,
        sdp,
        max_steps=12,
        rows=96,
        # At this rate it gets worse soon.
        learning_rate=0.1,
        lr_scheduler_type="constant",
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        callbacks=[EarlyStoppingCallback(3)],
        **values,
    )
    trainer.train()
    losses = history(trainer, "eval_loss")
    at_end = trainer.evaluate()["eval_loss"]
    dist.barrier()
    left = sorted(path.name for path in Path(folder).iterdir())
    best = trainer.state.best_model_checkpoint
    close(trainer)
    return losses, at_end, left, best


class Stream(IterableDataset):
    def __init__(self, count, length=12):
        self.rows = Rows(count, length=length)

    def __iter__(self):
        return iter(self.rows[i] for i in range(len(self.rows)))


def pad(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {key: torch.tensor([row[key] + [fill[key]] * (longest - len(row[key])) for row in rows]) for key in fill}


def failing_saves(folder, sdp, fails_at=(), slow_finish=False):
    """Checkpoints with ``save_total_limit=1``, some of which cannot be written: what is complete after each."""
    import time

    from transformers import TrainerCallback

    from deepspeed_sdp.checkpoint import folder as folders
    from deepspeed_sdp.checkpoint import has_checkpoint

    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            paths = Path(folder).glob("checkpoint-*")
            seen.append(sorted((path.name, has_checkpoint(path)) for path in paths))

        def on_step_end(self, args, state, control, **_):
            # A file stands where the checkpoint would be written.
            if state.global_step in fails_at and args.should_save:
                path = Path(folder) / f"checkpoint-{state.global_step}"
                path.mkdir(exist_ok=True)
                (path / f"global_step{state.global_step}").write_text("")

    finish = folders.finish
    if slow_finish:
        folders.finish = lambda *a, **k: (time.sleep(0.5), finish(*a, **k))[1]
    try:
        trainer = make(
            folder, sdp, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=1, callbacks=[Look()]
        )
        trainer.train()
    finally:
        folders.finish = finish
    dist.barrier()
    left = sorted((path.name, has_checkpoint(path)) for path in Path(folder).glob("checkpoint-*"))
    close(trainer)
    return seen, left


def built_afterwards(folder, sdp, stage=3):
    """A model built the way scripts do, after ``TrainingArguments``; its losses."""
    from transformers import AutoModelForCausalLM

    from tests.support.models import tiny_config

    fresh()
    args = TrainingArguments(
        folder, deepspeed=ds_config(stage, sdp), use_cpu=True, max_steps=2, per_device_train_batch_size=2,
        logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config())
    trainer = SDPTrainer(model=model, args=args, train_dataset=Rows(32), eval_dataset=Rows(16))
    trainer.train()
    losses = history(trainer)
    losses.append(trainer.evaluate()["eval_loss"])
    close(trainer)
    return losses


def smoothed(folder, sdp, evaluation):
    """Loss with label smoothing."""
    trainer = make(folder, {**sdp, "evaluation": evaluation}, label_smoothing_factor=0.2)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    close(trainer)
    return loss


def gathers(folder, sdp):
    """How often the full model is put together for an evaluation, after ``enable()``."""
    from deepspeed_sdp.engine.full import whole_model
    from deepspeed_sdp.hf import enable

    enable()
    calls, gather = [], whole_model.gather_model
    whole_model.gather_model = lambda *a, **k: (calls.append(1), gather(*a, **k))[1]
    try:
        counts = []
        for which in (SDPTrainer, Trainer):
            trainer = make(folder, sdp, trainer=which)
            trainer.train()
            calls.clear()
            trainer.evaluate()
            counts.append(len(calls))
            close(trainer)
    finally:
        whole_model.gather_model = gather
    return counts


def habits(folder, sdp, which="sdp", stream=False, **values):
    """Losses and what the trainer counts."""
    own = {"train_dataset": Stream(64)} if stream else {}
    trainer = make(folder, sdp, trainer=SDPTrainer if which == "sdp" else Trainer, data_collator=pad, **own, **values)
    trainer.train()
    result = {"loss": history(trainer), "norm": history(trainer, "grad_norm"), "lr": history(trainer, "learning_rate")}
    result["tokens"] = trainer.state.num_input_tokens_seen
    result["flos"] = trainer.state.total_flos
    result["worked"] = trainer.deepspeed.worked_numel if which == "sdp" else None
    result["dtypes"] = sorted({str(p.dtype) for p in trainer.model.parameters()})
    close(trainer)
    return result


def like_the_script(folder, sdp, stage=1, meta=False, masking="forward"):
    """The same model and batches in SDPTrainer, and in the loop of launch/train.py."""
    import deepspeed_sdp
    from deepspeed_sdp.pretraining.loop import train_step

    sdp = {**sdp, "masking": masking}
    trainer = make(folder, sdp, stage=stage, model={"meta": meta}, lr_scheduler_type="constant")
    batches = list(trainer.get_train_dataloader())
    trainer.train()
    losses, full = history(trainer), trainer.deepspeed.full_state_dict()
    close(trainer)
    config = ds_config(stage)
    for key in ("train_batch_size", "gradient_accumulation_steps"):
        del config[key]
    config["zero_optimization"] = {"stage": stage}
    config.update(train_micro_batch_size_per_gpu=2, gradient_clipping=1.0, bf16={"enabled": False})
    config["optimizer"] = {
        "type": "AdamW",
        "params": {"lr": 1e-3, "weight_decay": 0.1, "betas": [0.9, 0.999], "eps": 1e-8, "torch_adam": True},
    }
    model = tiny_model(meta=meta)
    decay = [p for name, p in model.named_parameters() if "norm" not in name]
    groups = [{"params": decay}, {"params": [p for p in model.parameters() if all(p is not d for d in decay)]}]
    groups[1]["weight_decay"] = 0.0
    engine, *_ = deepspeed_sdp.initialize(model=model, model_parameters=groups, config=config, sdp_config=sdp)
    own = []
    for batch in batches[:3]:
        loss = train_step(engine, [{"input_ids": batch["input_ids"], "labels": batch["labels"]}])
        dist.all_reduce(loss)
        own.append(float(loss) / dist.get_world_size())
    script_full = engine.full_state_dict()
    engine.destroy()
    return losses, own, full, script_full


def refusal(folder, what):
    """The message of a mistake, and its type."""
    from transformers import T5Config, T5ForConditionalGeneration

    import deepspeed_sdp

    sdp, model, extra = HALF, tiny_model(), {}
    if what == "no deepspeed":
        extra = {"deepspeed": None}
    elif what == "unsupported":
        model = T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, vocab_size=97))
    elif what == "peft":
        model.peft_config = {"default": object()}
    elif what == "quantized":
        model.is_quantized = True
        model.is_loaded_in_8bit = False
    elif what == "device_map":
        model.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": "disk"}
    elif what == "no block":
        sdp = None
    elif what == "auto_find_batch_size":
        extra = {"auto_find_batch_size": True}
    elif what == "meta evaluation":
        model = tiny_model(meta=True)
    elif what == "cut already":
        model, sdp = tiny_model(intermediate_size=64), {**HALF, "output_scaling": "none"}
        first = make(folder, sdp, model=model)
        first.train()
        close(first)
    elif what == "coverage":
        sdp = {"coverage": 0.3}
    elif what == "auto":
        sdp = {"coverage": 0.5, "plan": {"seq_length": "auto"}, "coverag": 1}
    elif what == "push":
        extra = {"push_to_hub": True, "hub_model_id": "nobody/none", "hub_token": "t"}
    elif what == "push-plain":
        extra, sdp = {"push_to_hub": True, "hub_model_id": "nobody/none", "hub_token": "t"}, None
    try:
        trainer = make(folder, sdp, model=model, trainer=Trainer if what == "push-plain" else SDPTrainer, **extra)
        # Only the first rank pushes.
        if "push" in what and dist.get_rank() > 0:
            return close(trainer)
        if what == "meta evaluation":
            trainer.evaluate()
        trainer.train()
    except Exception as error:
        fresh()
        return type(error).__name__, str(error), isinstance(error, deepspeed_sdp.SDPError)
    return None


def enabled(folder, sdp):
    """``Trainer`` itself after ``enable()``, beside ``SDPTrainer``."""
    from deepspeed_sdp.hf import enable

    enable()
    results = []
    for which in (SDPTrainer, Trainer):
        trainer = make(f"{folder}/{which.__name__}", sdp, trainer=which, save_strategy="steps", save_steps=2)
        trainer.train()
        result = [history(trainer), history(trainer, "grad_norm"), trainer.evaluate()["eval_loss"]]
        result.append(trainer.state.total_flos)
        trainer.save_model()
        dist.barrier()
        close(trainer)
        results.append(result)
    return results


def accelerate_loop(folder, sdp):
    """A plain loop with ``accelerator.prepare``, and the same with ``deepspeed_sdp.initialize``."""
    from accelerate import Accelerator, DeepSpeedPlugin

    import deepspeed_sdp
    from deepspeed_sdp.hf import enable

    enable()
    fresh()
    config = ds_config(1, sdp, gradient_clipping=1.0)
    config.update(train_micro_batch_size_per_gpu=2, train_batch_size=8, gradient_accumulation_steps=1)
    config["bf16"] = {"enabled": False}
    # Else accelerate sees one process where there is no GPU; Trainer does it with use_cpu.
    PartialState(cpu=True)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=copy.deepcopy(config)))
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(Rows(24), batch_size=2, collate_fn=pad)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses, batches = [], []
    for batch in loader:
        batches.append(batch)
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    weights = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(
        f"{folder}/hf", state_dict=dict(weights), is_main_process=accelerator.is_main_process
    )
    accelerator.save_state(f"{folder}/state")
    full = model.full_state_dict()
    accelerator.load_state(f"{folder}/state")
    again = model.full_state_dict()
    model.destroy()
    fresh()
    del config[BLOCK]
    module = tiny_model()
    engine, *_ = deepspeed_sdp.initialize(
        model=module,
        optimizer=torch.optim.AdamW(module.parameters(), lr=1e-3),
        config={**config, "zero_allow_untested_optimizer": True, "zero_optimization": {"stage": 1}},
        sdp_config=sdp,
    )
    expected = []
    for batch in batches:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        expected.append(float(loss.detach()))
    engine.destroy()
    return losses, expected, weights, full, again


def save_beside_another_job(folder):
    """The message of training where another job saves, steps that were done, and what is in the folder."""
    trainer = make(folder, HALF, max_steps=3, save_strategy="steps", save_steps=2)
    message = None
    try:
        trainer.train()
    except SDPError as error:
        message = f"{type(error).__name__}: {error}"
    close(trainer)
    dist.barrier()
    return message, trainer.state.global_step, sorted(path.name for path in Path(folder).iterdir())
