"""Train a causal language model on text with HuggingFace's Trainer, from scratch or from a model in a folder.

The options are called as in transformers' own language modeling example, for text and folders on this machine; all of
TrainingArguments' are there too. The one line that SDP changes is the import of Trainer.

deepspeed --num_accelerators 4 examples/run_clm.py --deepspeed ds_configs/hf_sdp.json --do_train --do_eval \
    --model_type llama --config_overrides "hidden_size=256,..." --tokenizer_name my/tokenizer \
    --train_file my.jsonl --output_dir runs/clm
"""

import math
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from deepspeed_sdp.hf import SDPTrainer as Trainer

BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv"}


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "folder of a model to go on training"})
    model_type: str | None = field(default=None, metadata={"help": "from scratch: a type of model, such as llama"})
    config_overrides: str | None = field(
        default=None, metadata={"help": 'from scratch: changes, "key=value,key=value"'}
    )
    config_name: str | None = field(default=None, metadata={"help": "folder or file of the model's config"})
    tokenizer_name: str | None = field(default=None, metadata={"help": "folder of the tokenizer; default: the model's"})

    def __post_init__(self) -> None:
        if not (self.model_name_or_path or self.config_name or self.model_type):
            raise ValueError("takes --model_name_or_path, or --config_name or --model_type to train from scratch")
        if self.model_name_or_path and self.config_overrides:
            raise ValueError("--config_overrides is for training from scratch, without --model_name_or_path")
        if not (self.tokenizer_name or self.model_name_or_path):
            raise ValueError("training from scratch takes --tokenizer_name, the folder of a tokenizer")


@dataclass
class DataArguments:
    train_file: str | None = field(default=None, metadata={"help": "text: .txt, .json, .jsonl or .csv"})
    validation_file: str | None = field(default=None, metadata={"help": "text to evaluate on, of the same kind"})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "part of the training text to evaluate on where there is no --validation_file"}
    )
    block_size: int | None = field(
        default=None, metadata={"help": "tokens per sequence; default: the model's and the tokenizer's, at most 1024"}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "train on so many blocks"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "evaluate on so many blocks"})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "processes that tokenize"})

    def __post_init__(self) -> None:
        if not (self.train_file or self.validation_file):
            raise ValueError("takes --train_file, --validation_file, or both")
        for name in filter(None, (self.train_file, self.validation_file)):
            if Path(name).suffix not in BUILDERS:
                raise ValueError(f"{name}: takes {', '.join(BUILDERS)}")


def load_text(data: DataArguments, part: str) -> Dataset:
    """The rows of a ``part``, "train" or "validation", as they lie in its file or in its share of the training file."""
    name, rows = data.train_file, "train"
    if part == "validation" and data.validation_file:
        name = data.validation_file
    elif not data.validation_file:
        share = f"{data.validation_split_percentage}%"
        rows = f"train[{share}:]" if part == "train" else f"train[:{share}]"
    if name is None:
        raise ValueError("--do_train takes --train_file")
    builder = BUILDERS[Path(name).suffix]
    options = {"keep_linebreaks": True} if builder == "text" else {}
    return load_dataset(builder, data_files=name, split=rows, **options)


def cut_into_blocks(
    text: Dataset, tokenizer: PreTrainedTokenizerBase, size: int, count: int | None, workers: int | None
) -> Dataset:
    """The tokens of all rows end to end, in ``count`` blocks of ``size``; of each 1000 rows the rest is dropped."""
    column = "text" if "text" in text.column_names else text.column_names[0]

    def tokenize(rows: dict[str, list]) -> dict[str, list]:
        ids = list(chain.from_iterable(tokenizer(rows[column])["input_ids"]))
        blocks = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
        return {"input_ids": blocks, "labels": blocks}

    blocks = text.map(tokenize, batched=True, remove_columns=text.column_names, num_proc=workers)
    if len(blocks) == 0:
        raise ValueError(f"{len(text)} rows of text hold no block of {size} tokens")
    return blocks if count is None else blocks.select(range(min(count, len(blocks))))


def main() -> None:
    model_args, data_args, training_args = HfArgumentParser(
        (ModelArguments, DataArguments, TrainingArguments)
    ).parse_args_into_dataclasses()
    set_seed(training_args.seed)

    source = model_args.config_name or model_args.model_name_or_path
    # What a folder brings along is read, never executed.
    if source:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    else:
        config = CONFIG_MAPPING[model_args.model_type]()
    if model_args.config_overrides:
        config.update_from_string(model_args.config_overrides)
    name = model_args.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or name, trust_remote_code=False)
    if name:
        model = AutoModelForCausalLM.from_pretrained(name, config=config, trust_remote_code=False)
    else:
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))

    longest = min(1024, tokenizer.model_max_length, getattr(config, "max_position_embeddings", 1024))
    size, workers = data_args.block_size or longest, data_args.preprocessing_num_workers
    train_blocks = eval_blocks = None
    # The first process does it, the others read what it left in the cache.
    with training_args.main_process_first(desc="tokenizing"):
        if training_args.do_train:
            text = load_text(data_args, "train")
            train_blocks = cut_into_blocks(text, tokenizer, size, data_args.max_train_samples, workers)
        if training_args.do_eval:
            text = load_text(data_args, "validation")
            eval_blocks = cut_into_blocks(text, tokenizer, size, data_args.max_eval_samples, workers)

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    if training_args.do_train:
        checkpoint = training_args.resume_from_checkpoint
        if checkpoint is None and Path(training_args.output_dir).is_dir():
            checkpoint = get_last_checkpoint(training_args.output_dir)
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_model()
        metrics["train_samples"] = len(train_blocks)
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["eval_samples"] = len(eval_blocks)
        metrics["perplexity"] = math.exp(metrics["eval_loss"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
